// Joins attention over disjoint parts of the keys by their normalisers. A warp owns one row (sample, query, head).
#include <cfloat>

#include "attention_params.h"
#include "element.h"
#include "softmax.h"

namespace rfkernels::cuda {

constexpr int kMergeWarps = 8;

template <class T>
__device__ __forceinline__ void attention_merge(const MergeParams& p) {
  const int64_t row = int64_t(blockIdx.x) * kMergeWarps + threadIdx.x / 32;  // (sample, query, head)
  const int lane = threadIdx.x % 32;
  const int64_t rows = int64_t(p.batch) * p.queries * p.heads;
  if (row >= rows) return;
  const int head = row % p.heads, query = row / p.heads % p.queries;
  const int64_t sample = row / p.heads / p.queries;
  const int64_t at_lse = (sample * p.heads + head) * p.queries + query;
  float top = kUnseen;
  for (int s = 0; s < p.splits; ++s) top = fmaxf(top, p.part_lse[s * rows + at_lse]);
  const bool empty = top == kUnseen;
  float total = 0.0f;
  for (int s = 0; s < p.splits; ++s) total += empty ? 0.0f : exp2_fast((p.part_lse[s * rows + at_lse] - top) * kLog2E);
  if (lane == 0) p.lse[at_lse] = empty ? kUnseen : top + log2f(total) * kLn2;
  for (int column = 2 * lane; column < p.head_dim; column += 64) {
    float2 sum = make_float2(0.0f, 0.0f);
    for (int s = 0; s < p.splits; ++s) {
      const float weight = empty ? 0.0f : exp2_fast((p.part_lse[s * rows + at_lse] - top) * kLog2E) / total;
      const float2 part = *reinterpret_cast<const float2*>(p.parts + (s * rows + row) * p.head_dim + column);
      sum.x += weight * part.x, sum.y += weight * part.y;
    }
    reinterpret_cast<uint32_t*>(static_cast<T*>(p.out) + row * p.head_dim)[column / 2] = pack<T>(sum.x, sum.y);
  }
}

}  // namespace rfkernels::cuda

#define RF_ATTENTION_MERGE(name, T)                                               \
  extern "C" __global__ void __launch_bounds__(32 * rfkernels::cuda::kMergeWarps) \
      name(const __grid_constant__ rfkernels::cuda::MergeParams params) {         \
    rfkernels::cuda::attention_merge<T>(params);                                  \
  }

RF_ATTENTION_MERGE(rf_attention_merge_bf16, rfkernels::cuda::BFloat16)
RF_ATTENTION_MERGE(rf_attention_merge_fp16, rfkernels::cuda::Half)
