// The Re-DMD loss in two passes over memory: each sample's normaliser, then the gradient and its square. A thread
// sums in float, threads and blocks are joined in double, in a fixed order: results repeat.
#include "../numbers.h"
#include "tiles.h"

namespace rfkernels::cuda {
namespace {

template <class T>
__device__ __forceinline__ T block_sum(T x, T* shared) {  // shared: one entry per warp; the sum reaches every thread
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  T sum = 0;
  for (int warp = 0; warp < kLossThreads / 32; ++warp) sum += shared[warp];
  return sum;
}

struct Tile {
  int64_t at;  // element of the whole latent
  int count;   // 1..8

  __device__ void load(const LatentView& latent, bool aligned, float (&x)[kVector]) const {
    const char* source = latent.data + at * item_size(latent.dtype);
    if (count == kVector) return cuda::load(source, latent.dtype, aligned, x);
#pragma unroll
    for (int i = 0; i < kVector; ++i) x[i] = i < count ? one(source, latent.dtype, i) : 0.0f;
  }

 private:
  static __device__ float one(const char* source, DType dtype, int i) {
    switch (dtype) {
      case DType::Float16:
        return float(reinterpret_cast<const __half*>(source)[i]);
      case DType::BFloat16:
        return float(reinterpret_cast<const __nv_bfloat16*>(source)[i]);
      case DType::Float32:
        return reinterpret_cast<const float*>(source)[i];
      default:
        return float(reinterpret_cast<const double*>(source)[i]);
    }
  }
};

// The vectors of this block's share of its sample, one after another.
template <class Body>
__device__ __forceinline__ void for_vectors(const ReDMD& a, Body body) {
  const int64_t sample = blockIdx.x / a.parts, begin = blockIdx.x % a.parts * a.span;
  const int64_t end = min(a.loss.elements, begin + a.span);
  for (int64_t i = begin + threadIdx.x * kVector; i < end; i += kLossTile)
    body(Tile{sample * a.loss.elements + i, int(min(int64_t(kVector), end - i))});
}

// cond + scale * (cond - uncond), or cond where there is no uncond.
__device__ __forceinline__ void guided(const ReDMD& a, const Tile& tile, const LatentView& cond,
                                       const LatentView& uncond, float scale, float (&x)[kVector]) {
  tile.load(cond, a.aligned, x);
  if (uncond.data == nullptr) return;
  float other[kVector];
  tile.load(uncond, a.aligned, other);
#pragma unroll
  for (int i = 0; i < kVector; ++i) x[i] += scale * (x[i] - other[i]);
}

__device__ __forceinline__ uint64_t mask_bytes(const ReDMD& a, const Tile& tile) {
  const uint8_t* mask = a.loss.mask + tile.at;
  if (a.aligned && tile.count == kVector) return *reinterpret_cast<const uint64_t*>(mask);
  uint64_t bytes = 0;
#pragma unroll
  for (int i = 0; i < kVector; ++i)
    if (i < tile.count) bytes |= uint64_t(mask[i]) << (8 * i);
  return bytes;
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kLossThreads) rf_redmd_norm(const __grid_constant__ ReDMD a) {
  __shared__ double sums[kLossThreads / 32];
  __shared__ int32_t counts[kLossThreads / 32];
  float total = 0.0f;
  int32_t count = 0;
  for_vectors(a, [&](const Tile& tile) {
    float x[kVector], real[kVector];
    tile.load(a.loss.x, a.aligned, x);
    guided(a, tile, a.loss.real_cond, a.loss.real_uncond, float(a.loss.guidance_scale), real);
#pragma unroll
    for (int i = 0; i < kVector; ++i) total += i < tile.count ? fabsf(x[i] - real[i]) : 0.0f;
    if (a.loss.mask != nullptr) count += __popcll(mask_bytes(a, tile));
  });
  const double all = block_sum(double(total), sums);
  count = block_sum(count, counts);
  if (threadIdx.x == 0) a.norms[blockIdx.x] = all, a.counts[blockIdx.x] = count;
}

extern "C" __global__ void __launch_bounds__(kLossThreads) rf_redmd_grad(const __grid_constant__ ReDMD a) {
  __shared__ double sums[kLossThreads / 32];
  __shared__ int64_t counts[kLossThreads / 32];
  const int64_t sample = blockIdx.x / a.parts;
  const double distance = block_sum(threadIdx.x < a.parts ? a.norms[sample * a.parts + threadIdx.x] : 0.0, sums);
  const float norm = float(distance / double(a.loss.elements));
  int64_t selected = a.loss.batch * a.loss.elements;
  if (a.loss.mask != nullptr) {
    int64_t count = 0;
    for (int64_t i = threadIdx.x; i < a.loss.batch * a.parts; i += kLossThreads) count += a.counts[i];
    selected = block_sum(count, counts);
  }
  const double share = double(static_cast<const float*>(a.loss.weight)[sample]) / double(max(selected, int64_t(1)));
  const float weight = float(share);
  float total = 0.0f;
  for_vectors(a, [&](const Tile& tile) {
    float real[kVector], grad[kVector];
    guided(a, tile, a.loss.real_cond, a.loss.real_uncond, float(a.loss.guidance_scale), real);
    guided(a, tile, a.loss.fake, a.loss.fake_uncond, float(a.loss.fake_guidance_scale), grad);
    const uint64_t mask = a.loss.mask == nullptr ? ~uint64_t(0) : mask_bytes(a, tile);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const float g = (grad[i] - real[i]) / norm;
      const bool counts = i < tile.count && (mask >> (8 * i) & 1) && fabsf(g) < INFINITY;  // a NaN compares false
      grad[i] = counts ? g : 0.0f;
      total += grad[i] * grad[i];
      grad[i] *= weight;
    }
    if (a.loss.grad == nullptr) return;
    char* target = a.loss.grad + tile.at * item_size(a.loss.x.dtype);
    if (tile.count == kVector) return store(target, a.loss.x.dtype, a.aligned, grad, false);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (i >= tile.count) continue;
      switch (a.loss.x.dtype) {
        case DType::Float16:
          reinterpret_cast<__half*>(target)[i] = narrow<__half>(grad[i], false);
          break;
        case DType::BFloat16:
          reinterpret_cast<__nv_bfloat16*>(target)[i] = narrow<__nv_bfloat16>(grad[i]);
          break;
        default:
          reinterpret_cast<float*>(target)[i] = grad[i];
      }
    }
  });
  const double all = block_sum(double(total), sums);
  if (threadIdx.x == 0) a.squares[blockIdx.x] = share * all;
}

// One block: half the sum of all shares.
extern "C" __global__ void __launch_bounds__(kLossThreads) rf_redmd_sum(const __grid_constant__ ReDMD a) {
  __shared__ double sums[kLossThreads / 32];
  double total = 0.0;
  for (int64_t i = threadIdx.x; i < a.loss.batch * a.parts; i += kLossThreads) total += a.squares[i];
  total = block_sum(total, sums);
  if (threadIdx.x == 0) *static_cast<float*>(a.loss.loss) = float(0.5 * total);
}

}  // namespace rfkernels::cuda
