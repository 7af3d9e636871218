// Number formats and the reinterpretation of 64-bit register slots.
#pragma once
#include <algorithm>
#include <cfenv>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

namespace ptx {

enum class Rounding : uint8_t { Nearest, Zero, Down, Up, Away };

// A binary float narrower than 32 bits (or tf32), held in the low bits of an integer.
struct Format {
  int exponent_bits, mantissa_bits;
  bool infinity;  // e4m3 has none: its largest exponent holds numbers, and only all ones is NaN
};
constexpr Format kF16{5, 10, true}, kBF16{8, 7, true}, kTF32{8, 10, true}, kE4M3{4, 3, false}, kE5M2{5, 2, true};

uint32_t encode(double value, Format format, Rounding rounding = Rounding::Nearest, bool saturate = false);
double decode(uint32_t bits, Format format);

struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

extern const float* const kHalfValues;  // all 65536 of them

inline float to_float(Half h) { return kHalfValues[h.bits]; }
inline float to_float(BFloat b) {
  const uint32_t bits = uint32_t(b.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

template <class T>
T value(uint64_t slot) {
  T result;
  std::memcpy(&result, &slot, sizeof(T));
  return result;
}

template <class T>
uint64_t slot(T value) {
  uint64_t result = 0;
  std::memcpy(&result, &value, sizeof(T));
  return result;
}

inline float flush(float x) { return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.0f, x) : x; }

// Sets the rounding of the host's float arithmetic while it lives; the files that use it are built with
// -frounding-math.
class HostRounding {
 public:
  explicit HostRounding(Rounding rounding) : changed_(rounding != Rounding::Nearest && rounding != Rounding::Away) {
    if (changed_)
      std::fesetround(rounding == Rounding::Zero   ? FE_TOWARDZERO
                      : rounding == Rounding::Down ? FE_DOWNWARD
                                                   : FE_UPWARD);
  }
  ~HostRounding() {
    if (changed_) std::fesetround(FE_TONEAREST);
  }

 private:
  bool changed_;
};

}  // namespace ptx
