#include "numeric.h"

#include <vector>

namespace ptx {
namespace {

const float* half_values() {
  static const std::vector<float> values = [] {
    std::vector<float> all(65536);
    for (uint32_t i = 0; i < 65536; ++i) all[i] = float(decode(i, kF16));
    return all;
  }();
  return values.data();
}

double round_integer(double x, Rounding rounding) {
  switch (rounding) {
    case Rounding::Zero:
      return std::trunc(x);
    case Rounding::Down:
      return std::floor(x);
    case Rounding::Up:
      return std::ceil(x);
    case Rounding::Away:
      return std::copysign(std::floor(std::fabs(x) + 0.5), x);
    default:
      return std::nearbyint(x);
  }
}

}  // namespace

const float* const kHalfValues = half_values();

uint32_t encode(double x, Format f, Rounding rounding, bool saturate) {
  const uint32_t sign = uint32_t(std::signbit(x)) << (f.exponent_bits + f.mantissa_bits);
  const uint32_t top_exponent = (1u << f.exponent_bits) - 1, mantissa_mask = (1u << f.mantissa_bits) - 1;
  const uint32_t infinity = top_exponent << f.mantissa_bits;
  // e4m3 loses one number to NaN, the others their top exponent to infinity and NaN.
  const uint32_t largest = f.infinity ? infinity - 1 : (infinity | mantissa_mask) - 1;
  if (std::isnan(x)) return infinity | mantissa_mask;
  const uint32_t overflow = saturate ? largest : f.infinity ? infinity : infinity | mantissa_mask;
  if (std::isinf(x)) return sign | overflow;
  if (x == 0) return sign;

  const int bias = (1 << (f.exponent_bits - 1)) - 1;
  int exponent;
  std::frexp(x, &exponent);  // |x| in [2^(exponent-1), 2^exponent)
  const int unit = std::max(exponent - 1, 1 - bias) - f.mantissa_bits;
  const double mantissa = std::fabs(round_integer(std::ldexp(x, -unit), rounding));
  // The implicit one of the mantissa, or a carry out of it, adds itself to the exponent field.
  const uint64_t field = uint64_t(unit + f.mantissa_bits - (1 - bias)) << f.mantissa_bits;
  const uint64_t magnitude = field + uint64_t(mantissa);
  if (magnitude <= largest) return sign | uint32_t(magnitude);
  const bool towards_zero =
      rounding == Rounding::Zero || (rounding == Rounding::Down && !sign) || (rounding == Rounding::Up && sign);
  return sign | (towards_zero ? largest : overflow);
}

double decode(uint32_t bits, Format f) {
  const uint32_t top_exponent = (1u << f.exponent_bits) - 1, mantissa_mask = (1u << f.mantissa_bits) - 1;
  const uint32_t mantissa = bits & mantissa_mask, exponent = (bits >> f.mantissa_bits) & top_exponent;
  const double sign = (bits >> (f.exponent_bits + f.mantissa_bits)) & 1 ? -1.0 : 1.0;
  if (exponent == top_exponent) {
    if (f.infinity && mantissa == 0) return sign * std::numeric_limits<double>::infinity();
    if (f.infinity || mantissa == mantissa_mask) return std::numeric_limits<double>::quiet_NaN();
  }
  const int bias = (1 << (f.exponent_bits - 1)) - 1;
  const double digits = double(mantissa) + (exponent ? double(mantissa_mask + 1) : 0.0);
  return sign * std::ldexp(digits, int(exponent ? exponent : 1) - bias - f.mantissa_bits);
}

}  // namespace ptx
