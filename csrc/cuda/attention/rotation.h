// Rotation of the attention kernels' rows, four pairs a thread: by phases of the frame and a table of rows and columns.
#pragma once
#include "../element.h"
#include "../phase.h"
#include "params.h"

namespace rfkernels::cuda {

// Phases of kPhases consecutive pairs, computed anew only where the frame changes: rows of a tile lie in few frames.
// Few at a time: a kernel may hold a full accumulator while it rotates.
constexpr int kPhases = 4;

struct PhaseCache {
  float cos[kPhases], sin[kPhases];
  int frame = INT32_MIN;

  __device__ __forceinline__ void set_frame(const QueryRope& rope, int first_pair, int new_frame) {
    if (new_frame == frame) return;
    frame = new_frame;
#pragma unroll
    for (int i = 0; i < kPhases; ++i) {
      if (first_pair + i >= rope.frame_pairs) break;
      const float2 phase = frame_phase(frame, rope.frame_turns[first_pair + i]);
      cos[i] = phase.x, sin[i] = phase.y;
    }
  }

  __device__ __forceinline__ void set(const QueryRope& rope, int first_pair, int pairs, int new_frame, int token) {
    set_frame(rope, first_pair, new_frame);
    const float* table = rope.spatial + 2 * int64_t(token) * (pairs - rope.frame_pairs);
#pragma unroll
    for (int i = 0; i < kPhases; ++i) {
      const int spatial = first_pair + i - rope.frame_pairs;
      if (spatial >= 0) cos[i] = table[2 * spatial], sin[i] = table[2 * spatial + 1];
    }
  }

  // a, b: the first and the second half of what `set` knows the phases of, as it lies in memory. back: undoes it.
  __device__ __forceinline__ void rotate(float (&a)[kPhases], float (&b)[kPhases], bool half_split,
                                         bool back = false) const {
    if (half_split) {
#pragma unroll
      for (int i = 0; i < kPhases; ++i) turn(a[i], b[i], i, back);
    } else {
#pragma unroll
      for (int i = 0; i < kPhases / 2; ++i) {
        turn(a[2 * i], a[2 * i + 1], i, back);
        turn(b[2 * i], b[2 * i + 1], kPhases / 2 + i, back);
      }
    }
  }

 private:
  __device__ __forceinline__ void turn(float& first, float& second, int i, bool back) const {
    const float x = first, y = second, s = back ? -sin[i] : sin[i];
    first = x * cos[i] - y * s;
    second = x * s + y * cos[i];
  }
};

// Four consecutive elements as floats.
__device__ __forceinline__ void load4(float (&x)[4], const void* source, ElementType type) {
  if (type == ElementType::kFloat32) {
    const float4 four = *static_cast<const float4*>(source);
    x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
    return;
  }
  const uint2 bits = *static_cast<const uint2*>(source);
  const bool half = type == ElementType::kFloat16;
  const float2 low = half ? unpack<Half>(bits.x) : unpack<BFloat16>(bits.x);
  const float2 high = half ? unpack<Half>(bits.y) : unpack<BFloat16>(bits.y);
  x[0] = low.x, x[1] = low.y, x[2] = high.x, x[3] = high.y;
}

}  // namespace rfkernels::cuda
