// Rotary embedding of query rows: angles of the frame reduced in turns in double, row and column angles from a table.
#pragma once
#include "attention_params.h"
#include "element.h"

namespace rfkernels::cuda {

// cos and sin of 2 pi t, |t| <= 1/2, to 1e-7. Without the stack frame of sincosf's slow path for huge angles.
__device__ __forceinline__ void sincos_turns(float t, float& sin, float& cos) {
  const float quarter = rintf(4.0f * t);
  const float r = (t - 0.25f * quarter) * 6.283185307179586f;  // the difference is exact; |r| <= pi / 4
  const float r2 = r * r;
  const float s = r + r * r2 * (-1.0f / 6 + r2 * (1.0f / 120 + r2 * (-1.0f / 5040 + r2 * (1.0f / 362880))));
  const float c = 1.0f + r2 * (-0.5f + r2 * (1.0f / 24 + r2 * (-1.0f / 720 + r2 * (1.0f / 40320))));
  const int quadrant = int(quarter) & 3;
  sin = quadrant & 1 ? c : s;
  cos = quadrant & 1 ? s : c;
  if (quadrant >= 2) sin = -sin;
  if (quadrant == 1 || quadrant == 2) cos = -cos;
}

// Phases of eight consecutive pairs, computed anew only where the frame changes: rows of a tile lie in few frames.
struct PhaseCache {
  float cos[8], sin[8];
  int frame = INT32_MIN;

  __device__ __forceinline__ void set_frame(const QueryRope& rope, int first_pair, int new_frame) {
    if (new_frame == frame) return;
    frame = new_frame;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (first_pair + i >= rope.frame_pairs) break;
      double turns = double(frame) * rope.frame_turns[first_pair + i];
      turns -= rint(turns);
      sincos_turns(float(turns), sin[i], cos[i]);
    }
  }

  __device__ __forceinline__ void set(const QueryRope& rope, int first_pair, int pairs, int new_frame, int token) {
    set_frame(rope, first_pair, new_frame);
    const float* table = rope.spatial + 2 * int64_t(token) * (pairs - rope.frame_pairs);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int spatial = first_pair + i - rope.frame_pairs;
      if (spatial >= 0) cos[i] = table[2 * spatial], sin[i] = table[2 * spatial + 1];
    }
  }

  // x: both elements of each pair, (first[i], second[i]).
  __device__ __forceinline__ void rotate(float (&first)[8], float (&second)[8]) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float a = first[i], b = second[i];
      first[i] = a * cos[i] - b * sin[i];
      second[i] = a * sin[i] + b * cos[i];
    }
  }
};

// Eight consecutive elements of a row as floats.
__device__ __forceinline__ void load8(float (&x)[8], const void* row, ElementType type, int column) {
  if (type == ElementType::kFloat32) {
    const float4* source = reinterpret_cast<const float4*>(static_cast<const float*>(row) + column);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float4 four = source[i];
      x[4 * i] = four.x, x[4 * i + 1] = four.y, x[4 * i + 2] = four.z, x[4 * i + 3] = four.w;
    }
    return;
  }
  const uint4 bits = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(row) + column);
  const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 two = type == ElementType::kFloat16 ? unpack<Half>(words[i]) : unpack<BFloat16>(words[i]);
    x[2 * i] = two.x, x[2 * i + 1] = two.y;
  }
}

}  // namespace rfkernels::cuda
