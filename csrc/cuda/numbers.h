// Eight numbers at a time, of any dtype: what the cache and loss kernels move. These kernels wait for memory, so a
// dtype is a value that every thread agrees on rather than a template argument: one kernel per operation.
#pragma once
#include "../kernels.h"
#include "element.h"

namespace rfkernels::cuda {

constexpr int kVector = 8;  // 16 bytes of a half type

// Rounds once. float16 saturates, since a rotation may grow a number by sqrt(2); NaN stays NaN.
template <class T>
__device__ __forceinline__ T narrow(float x, bool saturate = true);
template <>
__device__ __forceinline__ float narrow<float>(float x, bool) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float x, bool) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half narrow<__half>(float x, bool saturate) {
  return __float2half_rn(saturate ? saturate_half(x) : x);
}

__device__ __forceinline__ float round_to(float x, DType dtype) {
  return dtype == DType::Float16    ? float(narrow<__half>(x))
         : dtype == DType::BFloat16 ? float(__float2bfloat16_rn(x))
                                    : x;
}

template <class T>
__device__ __forceinline__ void load_as(const char* source, bool aligned, float (&x)[kVector]) {
  alignas(16) T raw[kVector];
  if (aligned) {
#pragma unroll
    for (int i = 0; i < int(sizeof raw / 16); ++i)
      reinterpret_cast<uint4*>(raw)[i] = reinterpret_cast<const uint4*>(source)[i];
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i) raw[i] = reinterpret_cast<const T*>(source)[i];
  }
#pragma unroll
  for (int i = 0; i < kVector; ++i) x[i] = float(raw[i]);
}

__device__ __forceinline__ void load(const char* source, DType dtype, bool aligned, float (&x)[kVector]) {
  switch (dtype) {
    case DType::Float16:
      return load_as<__half>(source, aligned, x);
    case DType::BFloat16:
      return load_as<__nv_bfloat16>(source, aligned, x);
    case DType::Float32:
      return load_as<float>(source, aligned, x);
    case DType::Float64:
      return load_as<double>(source, aligned, x);
  }
}

template <class T>
__device__ __forceinline__ void store_as(char* target, const float (&x)[kVector], bool aligned, bool saturate) {
  alignas(16) T raw[kVector];
#pragma unroll
  for (int i = 0; i < kVector; ++i) raw[i] = narrow<T>(x[i], saturate);
  if (aligned) {
#pragma unroll
    for (int i = 0; i < int(sizeof raw / 16); ++i)
      reinterpret_cast<uint4*>(target)[i] = reinterpret_cast<const uint4*>(raw)[i];
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i) reinterpret_cast<T*>(target)[i] = raw[i];
  }
}

// float16, bfloat16 or float32. saturate = false: what was read as float16 goes back bit for bit, infinities too.
__device__ __forceinline__ void store(char* target, DType dtype, bool aligned, const float (&x)[kVector],
                                      bool saturate = true) {
  switch (dtype) {
    case DType::Float16:
      return store_as<__half>(target, x, aligned, saturate);
    case DType::BFloat16:
      return store_as<__nv_bfloat16>(target, x, aligned, saturate);
    default:
      return store_as<float>(target, x, aligned, saturate);
  }
}

}  // namespace rfkernels::cuda
