// Joins attention over shares of the keys by their normalisers. A warp owns one row of a tile of queries.
#include "../element.h"
#include "params.h"
#include "softmax.h"

namespace rfkernels::cuda {

template <class T>
__device__ __forceinline__ void attention_merge(const MergeParams& p) {
  constexpr int kRows = ForwardTiles::kRows;
  const int warp = blockIdx.x * kMergeRows + threadIdx.x / 32, lane = threadIdx.x % 32;
  const int part = warp / kRows, local = warp % kRows, index = p.whole + part;
  const int row = index % p.row_blocks * kRows + local, head = index / p.row_blocks % p.heads;
  const int64_t sample = index / p.row_blocks / p.heads, at_lse = (sample * p.heads + head) * p.queries + row;
  if (row >= p.queries) return;

  // Each lane weighs one part.
  const int64_t first = int64_t(part) * p.shares * kRows + local;
  const float lse = lane < p.shares ? p.part_lse[first + lane * kRows] : kUnseen;
  float top = lse;
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, distance));
  const float weight = top == kUnseen ? 0.0f : exp2_fast((lse - top) * kLog2E);
  float total = weight;
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) total += __shfl_xor_sync(0xffffffffu, total, distance);
  const float share = top == kUnseen ? 0.0f : __fdividef(weight, total);
  if (lane == 0) p.lse[at_lse] = top == kUnseen ? kUnseen : top + log2f(total) * kLn2;

  for (int begin = 0; begin < p.head_dim; begin += 4 * 32) {
    const int column = begin + 4 * lane;
    const bool inside = column < p.head_dim;
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    for (int s = 0; s < p.shares; ++s) {
      const float w = __shfl_sync(0xffffffffu, share, s);
      if (!inside) continue;
      const float4 part = *reinterpret_cast<const float4*>(p.parts + (first + s * kRows) * p.head_dim + column);
      sum.x += w * part.x, sum.y += w * part.y, sum.z += w * part.z, sum.w += w * part.w;
    }
    if (inside)
      *reinterpret_cast<uint2*>(static_cast<T*>(p.out) + ((sample * p.queries + row) * p.heads + head) * p.head_dim +
                                column) = make_uint2(pack<T>(sum.x, sum.y), pack<T>(sum.z, sum.w));
  }
}

}  // namespace rfkernels::cuda

#define RF_ATTENTION_MERGE(name, T)                                              \
  extern "C" __global__ void __launch_bounds__(32 * rfkernels::cuda::kMergeRows) \
      name(const __grid_constant__ rfkernels::cuda::MergeParams params) {        \
    rfkernels::cuda::attention_merge<T>(params);                                 \
  }

RF_ATTENTION_MERGE(rf_attention_merge_bf16, rfkernels::cuda::BFloat16)
RF_ATTENTION_MERGE(rf_attention_merge_fp16, rfkernels::cuda::Half)
