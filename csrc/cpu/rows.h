// Rows of numbers: the only arithmetic the cache operations need. A row is one token's heads; every function is
// inlined into a caller marked RF_VECTORIZED, which the compiler builds once per instruction set.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "../kernels.h"

// One clone per x86 generation, chosen when the library is loaded: wheels run on any x86-64 and still use AVX-512.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define RF_VECTORIZED __attribute__((target_clones("arch=skylake-avx512", "arch=haswell", "default")))
#else
#define RF_VECTORIZED
#endif
#if defined(__GNUC__)
#define RF_INLINE inline __attribute__((always_inline))
#else
#define RF_INLINE inline
#endif

namespace rfkernels::cpu {

template <class Acc>
constexpr DType accumulator_dtype() {
  return sizeof(Acc) == 8 ? DType::Float64 : DType::Float32;
}

RF_INLINE uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
RF_INLINE float bits_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

RF_INLINE float from_bfloat16(uint16_t x) { return bits_float(uint32_t(x) << 16); }
RF_INLINE uint16_t to_bfloat16(float x) {
  const uint32_t bits = float_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

// float16 by integer arithmetic: branch-free, so it vectorizes where the compiler has no half type.
RF_INLINE float from_float16(uint16_t x) {
  const uint32_t sign = uint32_t(x & 0x8000u) << 16;
  const uint32_t magnitude = uint32_t(x & 0x7fffu) << 13;
  // Multiplying by 2**112 moves the exponent bias from 15 to 127 and normalizes subnormals.
  const float scaled = bits_float(magnitude) * bits_float(0x77800000u);
  const bool special = magnitude >= 0x0f800000u;
  return bits_float((special ? (magnitude | 0x7f800000u) : float_bits(scaled)) | sign);
}
// Saturates at the largest finite value: a rotation may grow a number by sqrt(2). NaN stays NaN.
RF_INLINE uint16_t to_float16(float x) {
  const uint32_t sign = (float_bits(x) >> 16) & 0x8000u;
  const uint32_t magnitude = float_bits(x) & 0x7fffffffu;
  const bool nan = magnitude > 0x7f800000u;
  const uint32_t capped = magnitude < 0x477fe000u ? magnitude : 0x477fe000u;  // 65504
  // Normal: rebias, round half to even. Subnormal: adding 0.5 lets the float adder round at bit 2**-24.
  const uint32_t normal = (capped - 0x38000000u + 0x0fffu + ((capped >> 13) & 1u)) >> 13;
  const uint32_t subnormal = float_bits(bits_float(capped) + 0.5f) - 0x3f000000u;
  const uint32_t half = capped < 0x38800000u ? subnormal : normal;
  return uint16_t(sign | (nan ? 0x7e00u : half));
}

// load: n elements of any dtype -> Acc (float, or double for float64 caches); store: the reverse, rounded once.
template <class Acc>
RF_INLINE void load_row(const char* source, DType dtype, int64_t n, Acc* row) {
  switch (dtype) {
    case DType::Float16:
      for (int64_t i = 0; i < n; ++i) row[i] = from_float16(reinterpret_cast<const uint16_t*>(source)[i]);
      return;
    case DType::BFloat16:
      for (int64_t i = 0; i < n; ++i) row[i] = from_bfloat16(reinterpret_cast<const uint16_t*>(source)[i]);
      return;
    case DType::Float32:
      for (int64_t i = 0; i < n; ++i) row[i] = reinterpret_cast<const float*>(source)[i];
      return;
    case DType::Float64:
      for (int64_t i = 0; i < n; ++i) row[i] = Acc(reinterpret_cast<const double*>(source)[i]);
      return;
  }
}

template <class Acc>
RF_INLINE void store_row(const Acc* row, DType dtype, int64_t n, char* target) {
  switch (dtype) {
    case DType::Float16:
      for (int64_t i = 0; i < n; ++i) reinterpret_cast<uint16_t*>(target)[i] = to_float16(float(row[i]));
      return;
    case DType::BFloat16:
      for (int64_t i = 0; i < n; ++i) reinterpret_cast<uint16_t*>(target)[i] = to_bfloat16(float(row[i]));
      return;
    case DType::Float32:
      for (int64_t i = 0; i < n; ++i) reinterpret_cast<float*>(target)[i] = float(row[i]);
      return;
    case DType::Float64:
      for (int64_t i = 0; i < n; ++i) reinterpret_cast<double*>(target)[i] = double(row[i]);
      return;
  }
}

template <class Acc>
RF_INLINE void copy_row(const char* source, DType source_dtype, int64_t n, Acc* scratch, char* target, DType dtype) {
  if (source_dtype == dtype) {
    std::memcpy(target, source, size_t(n * item_size(dtype)));
  } else {
    load_row(source, source_dtype, n, scratch);
    store_row(scratch, dtype, n, target);
  }
}

// Rounds a row to a half-precision dtype and back.
RF_INLINE void round_row(float* row, DType dtype, int64_t n) {
  if (dtype == DType::BFloat16)
    for (int64_t i = 0; i < n; ++i) row[i] = from_bfloat16(to_bfloat16(row[i]));
  else if (dtype == DType::Float16)
    for (int64_t i = 0; i < n; ++i) row[i] = from_float16(to_float16(row[i]));
}
RF_INLINE void round_row(double*, DType, int64_t) {}  // float64 caches hold float64 accumulators

// The row itself where it is of type Acc already, else a converted copy in scratch.
template <class Acc>
RF_INLINE const Acc* read_row(const char* source, DType dtype, int64_t n, Acc* scratch) {
  if (item_size(dtype) == sizeof(Acc)) return reinterpret_cast<const Acc*>(source);
  load_row(source, dtype, n, scratch);
  return scratch;
}

// Rotates the D/2 pairs of a head by the angles in cos/sin; direction -1 undoes a rotation.
template <class Acc>
RF_INLINE void rotate_row(const Acc* __restrict__ x, const Acc* __restrict__ cos, const Acc* __restrict__ sin,
                          int64_t pairs, bool half_split, Acc direction, Acc* __restrict__ out) {
  if (half_split) {
    for (int64_t i = 0; i < pairs; ++i) {
      const Acc a = x[i], b = x[i + pairs], s = direction * sin[i];
      out[i] = a * cos[i] - b * s;
      out[i + pairs] = a * s + b * cos[i];
    }
  } else {
    for (int64_t i = 0; i < pairs; ++i) {
      const Acc a = x[2 * i], b = x[2 * i + 1], s = direction * sin[i];
      out[2 * i] = a * cos[i] - b * s;
      out[2 * i + 1] = a * s + b * cos[i];
    }
  }
}

// rotate_row from and to memory of any dtype; scratch holds two rows.
template <class Acc>
RF_INLINE void rotate_memory(const char* source, DType source_dtype, const Acc* cos, const Acc* sin, int64_t pairs,
                             bool half_split, Acc direction, Acc* scratch, char* target, DType dtype) {
  const Acc* x = read_row(source, source_dtype, 2 * pairs, scratch);
  if (item_size(dtype) == sizeof(Acc)) {
    rotate_row(x, cos, sin, pairs, half_split, direction, reinterpret_cast<Acc*>(target));
  } else {
    rotate_row(x, cos, sin, pairs, half_split, direction, scratch + 2 * pairs);
    store_row(scratch + 2 * pairs, dtype, 2 * pairs, target);
  }
}

}  // namespace rfkernels::cpu
