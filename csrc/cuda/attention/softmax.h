// Online softmax in base 2 over the rows of one thread.
#pragma once
#include <cfloat>
#include <cstdint>

namespace rfkernels::cuda {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// A score that is not seen. exp2 of it is 0 whatever the shift, which is never infinite.
constexpr float kUnseen = -__builtin_huge_valf();

__device__ __forceinline__ float exp2_fast(float x) {  // one instruction; subnormal results are zero
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The largest value over the four lanes that share a row of an accumulator.
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// Weights of a row are exp2(scale2 * score - shift). The shift is the row's largest scaled score when it was last
// raised; it is raised (and everything summed so far multiplied) only where a weight may exceed 2**kSlack. The final
// division by `total` takes the shift out again, so the result does not depend on when that happens.
template <int kRows>
struct SoftmaxState {
  static constexpr float kSlack = 8.0f;      // weights up to 256 keep their precision in float16 and bfloat16 alike
  static constexpr float kLargest = 256.0f;  // 2**kSlack
  float shift[kRows];
  float total[kRows];  // of this thread's columns; summed over the quad at the end

  __device__ __forceinline__ SoftmaxState() {
#pragma unroll
    for (int r = 0; r < kRows; ++r) shift[r] = -FLT_MAX, total[r] = 0.0f;  // finite: an empty row makes no NaN
  }

  // Whether a row of the warp must be raised; the same for every lane.
  __device__ __forceinline__ bool exceeds(const float (&largest)[kRows], float scale2) const {
    float excess = -FLT_MAX;
#pragma unroll
    for (int r = 0; r < kRows; ++r) excess = fmaxf(excess, __fmaf_rn(largest[r], scale2, -shift[r]));
    return __any_sync(0xffffffffu, excess > kSlack);
  }
  // sums: per row, of new weights formed with the shift as it is. They bound every weight; in the first tile they
  // overflow.
  template <int kCount>
  static __device__ __forceinline__ bool too_large(const float (&sums)[kCount]) {
    bool any = false;
#pragma unroll
    for (int r = 0; r < kCount; ++r) any = any || !(sums[r] <= kLargest);  // NaN too
    return __any_sync(0xffffffffu, any);
  }

  // Raises the shift of some rows to the largest score so far; factor: by which sums of older weights are to be
  // multiplied.
  template <int kCount>
  __device__ __forceinline__ void raise(const float (&largest)[kCount], float scale2, float (&factor)[kCount],
                                        int first = 0) {
#pragma unroll
    for (int r = 0; r < kCount; ++r) {
      const float raised = fmaxf(shift[first + r], quad_max(largest[r]) * scale2);
      factor[r] = exp2_fast(shift[first + r] - raised);
      total[first + r] *= factor[r];
      shift[first + r] = raised;
    }
  }

  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int r = 0; r < kRows; ++r) total[r] = quad_sum(total[r]);
  }

  // A row that saw nothing: 0 and -inf. NaN stays NaN.
  __device__ __forceinline__ float normaliser(int r) const {
    return total[r] == 0.0f ? 0.0f : __fdividef(1.0f, total[r]);
  }
  __device__ __forceinline__ float lse(int r) const {  // natural log
    return total[r] == 0.0f ? kUnseen : (shift[r] + log2f(total[r])) * kLn2;
  }
};

}  // namespace rfkernels::cuda
