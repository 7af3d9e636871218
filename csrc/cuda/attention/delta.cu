// What the attention backward needs of each query row: its normaliser in base 2, and sum(out * grad_out) - grad_lse.
#include "../element.h"
#include "backward_params.h"
#include "softmax.h"

namespace rfkernels::cuda {

template <class T>
__device__ __forceinline__ float dot(uint32_t a, uint32_t b) {
  const float2 x = unpack<T>(a), y = unpack<T>(b);
  return x.x * y.x + x.y * y.y;
}

// Eight lanes own a row (sample, query, head).
template <class T>
__device__ __forceinline__ void attention_delta(const DeltaParams& p) {
  const int64_t rows = int64_t(p.batch) * p.queries * p.heads;
  const int64_t row = (int64_t(blockIdx.x) * kDeltaThreads + threadIdx.x) / kDeltaLanes;
  const int64_t known = row < rows ? row : rows - 1;  // lanes past the end take part in the shuffles
  const int lane = threadIdx.x % kDeltaLanes;
  const int64_t head = known % p.heads, query = known / p.heads % p.queries, sample = known / p.heads / p.queries;
  const auto* out =
      static_cast<const uint16_t*>(p.out.data) + sample * p.out.batch + query * p.out.token + head * p.out.head;
  const auto* grad = static_cast<const uint16_t*>(p.grad_out.data) + sample * p.grad_out.batch +
                     query * p.grad_out.token + head * p.grad_out.head;
  float sum = 0.0f;
  for (int column = 8 * lane; column < p.head_dim; column += 8 * kDeltaLanes) {
    const uint4 a = *reinterpret_cast<const uint4*>(out + column), b = *reinterpret_cast<const uint4*>(grad + column);
    sum += dot<T>(a.x, b.x) + dot<T>(a.y, b.y) + dot<T>(a.z, b.z) + dot<T>(a.w, b.w);
  }
#pragma unroll
  for (int distance = kDeltaLanes / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  if (row >= rows || lane != 0) return;
  const int64_t at = (sample * p.heads + head) * p.queries + query;
  const float lse = p.lse[at];
  const float grad_lse = p.grad_lse[sample * p.lse_batch + head * p.lse_head + query * p.lse_token];
  const bool empty = lse == kUnseen;
  reinterpret_cast<float2*>(p.row_terms)[at] =
      empty ? make_float2(-kUnseen, 0.0f) : make_float2(lse * kLog2E, sum - grad_lse);
}

}  // namespace rfkernels::cuda

#define RF_ATTENTION_DELTA(name, T)                                            \
  extern "C" __global__ void __launch_bounds__(rfkernels::cuda::kDeltaThreads) \
      name(const __grid_constant__ rfkernels::cuda::DeltaParams params) {      \
    rfkernels::cuda::attention_delta<T>(params);                               \
  }

RF_ATTENTION_DELTA(rf_attention_delta_bf16, rfkernels::cuda::BFloat16)
RF_ATTENTION_DELTA(rf_attention_delta_fp16, rfkernels::cuda::Half)
