// float16 and bfloat16 as the kernels use them: converted in pairs, moved as bits.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace rfkernels::cuda {

using Half = __half;
using BFloat16 = __nv_bfloat16;

// Two floats rounded to T; low is the element that comes first in memory.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t bits;
  if constexpr (sizeof(T) == 2 && __is_same(T, Half))
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}

__device__ __forceinline__ float saturate_half(float x) {  // NaN stays NaN, which fminf and fmaxf would lose
  return x > 65504.0f ? 65504.0f : x < -65504.0f ? -65504.0f : x;
}

// The same for what a rotation may have grown by sqrt(2): float16 saturates.
template <class T>
__device__ __forceinline__ uint32_t pack_saturated(float low, float high) {
  if constexpr (__is_same(T, Half)) return pack<T>(saturate_half(low), saturate_half(high));
  return pack<T>(low, high);
}

template <class T>
__device__ __forceinline__ float2 unpack(uint32_t bits) {
  if constexpr (__is_same(T, Half)) return __half22float2(*reinterpret_cast<const __half2*>(&bits));
  return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u));
}

}  // namespace rfkernels::cuda
