// Rotary phases and the rotation of the columns that a thread owns.
#pragma once
#include "../numbers.h"
#include "../phase.h"
#include "tiles.h"

namespace rfkernels::cuda {

// The phases of all frame pairs of one frame, once per block. Every thread must come here.
__device__ __forceinline__ void share_frame_phases(float2* shared, int64_t frame, const RopeView& rope) {
  __syncthreads();  // nobody reads the previous frame's any more
  for (int i = threadIdx.x; i < rope.frame_pairs; i += kThreads) shared[i] = frame_phase(frame, rope.frame_turns[i]);
  __syncthreads();
}

// What a thread owns of every row it moves: columns [first, first + 8) and [second, second + 8), half a head apart.
// So each access is 16 bytes of a half type, neighbours touch neighbours, and both pairings find their pairs here.
struct Columns {
  int row, first, second;

  __device__ explicit Columns(int64_t head_dim) {
    const int lanes = int(head_dim) / kColumns;
    row = int(threadIdx.x) / lanes;
    first = int(threadIdx.x) % lanes * kVector;
    second = first + int(head_dim) / 2;
  }
  // Pair i of the eight that lie in these columns.
  __device__ int pair(int i, bool half_split) const {
    return half_split ? first + i : i < kVector / 2 ? first / 2 + i : second / 2 + i - kVector / 2;
  }
};

struct Row {
  float a[kVector], b[kVector];  // the first and the second columns

  __device__ void load(const TensorView& x, const char* row, const Columns& c) {
    const int64_t item = item_size(x.dtype);
    cuda::load(row + c.first * item, x.dtype, x.aligned, a);
    cuda::load(row + c.second * item, x.dtype, x.aligned, b);
  }
  __device__ void store(const TensorView& x, char* row, const Columns& c, bool saturate = true) const {
    const int64_t item = item_size(x.dtype);
    cuda::store(row + c.first * item, x.dtype, x.aligned, a, saturate);
    cuda::store(row + c.second * item, x.dtype, x.aligned, b, saturate);
  }
};

struct Phases {
  float cos[kVector], sin[kVector];

  // frame(pair): phases of the frame pairs; those of rows and columns come from the table.
  template <class Frame>
  __device__ void find(const RopeView& rope, const Columns& c, int64_t token, Frame frame) {
    const float2* spatial = static_cast<const float2*>(rope.spatial) + token * rope.spatial_pairs;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const int pair = c.pair(i, rope.half_split);
      const float2 phase = pair < rope.frame_pairs ? frame(pair) : spatial[pair - rope.frame_pairs];
      cos[i] = phase.x;
      sin[i] = phase.y;
    }
  }

  // direction -1 undoes a rotation.
  __device__ void turn(Row& x, bool half_split, float direction) const {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const float s = direction * sin[i];
      if (half_split) {
        const float a = x.a[i], b = x.b[i];
        x.a[i] = a * cos[i] - b * s;
        x.b[i] = a * s + b * cos[i];
      } else {
        float (&half)[kVector] = i < kVector / 2 ? x.a : x.b;
        const int at = 2 * i % kVector;
        const float a = half[at], b = half[at + 1];
        half[at] = a * cos[i] - b * s;
        half[at + 1] = a * s + b * cos[i];
      }
    }
  }
};

}  // namespace rfkernels::cuda
