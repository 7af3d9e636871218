// Arithmetic on f16, bf16 and their packed pairs: computed wider and rounded once. Addition and multiplication in
// double are exact for these formats; fma rounds its double sum to odd first, so that the second rounding cannot go
// wrong.
#include "alu.h"

namespace ptx {
namespace {

enum Operation { kAdd, kSub, kMul, kFma, kNeg, kAbs, kMin, kMax, kEx2, kTanh };

double fma_to_odd(double a, double b, double c) {
  const double product = a * b;  // exact: at most 22 bits
  const double sum = product + c;
  if (!std::isfinite(sum)) return sum;
  const double part = sum - product, error = (product - (sum - part)) + (c - part);
  uint64_t bits = slot(sum);
  if (error != 0 && !(bits & 1)) bits += (error > 0) == (sum > 0) ? 1 : -1;
  return value<double>(bits);
}

double extreme(double a, double b, bool larger, bool nan_wins) {
  if (std::isnan(a) || std::isnan(b)) return nan_wins || (std::isnan(a) && std::isnan(b)) ? NAN : std::isnan(a) ? b : a;
  if (a == b) return std::signbit(a) == larger ? b : a;
  return (a > b) == larger ? a : b;
}

template <class T>
uint16_t apply(const Instruction& i, T a, T b, T c) {
  constexpr Format format = std::is_same_v<T, Half> ? kF16 : kBF16;
  if (i.mode == kNeg) return a.bits ^ 0x8000;
  if (i.mode == kAbs) return a.bits & 0x7fff;
  const double x = to_float(a), y = to_float(b), z = to_float(c);
  double result = 0;
  switch (i.mode) {
    case kAdd:
      result = x + y;
      break;
    case kSub:
      result = x - y;
      break;
    case kMul:
      result = x * y;
      break;
    case kFma:
      result = fma_to_odd(x, y, z);
      break;
    case kMin:
      result = extreme(x, y, false, i.flag);
      break;
    case kMax:
      result = extreme(x, y, true, i.flag);
      break;
    case kEx2:
      result = std::exp2(x);
      break;
    case kTanh:
      result = std::tanh(x);
      break;
  }
  if (i.saturate) result = result > 0 ? std::min(result, 1.0) : 0.0;
  if (i.submode && result < 0) result = 0;  // .relu
  return uint16_t(encode(result, format, i.rounding));
}

template <class T, bool kPacked>
void run(Warp& w, const Instruction& i, Mask mask) {
  const auto source = [&](size_t k) { return w.lanes(i.source[std::min(k, i.source.size() - 1)]); };
  const uint64_t *a = source(0), *b = source(1), *c = source(2);
  uint64_t* d = w.lanes(i.destination[0]);
  for_lanes(mask, [&](int l) {
    uint64_t result = apply(i, value<T>(a[l]), value<T>(b[l]), value<T>(c[l]));
    if (kPacked) result |= uint64_t(apply(i, value<T>(a[l] >> 16), value<T>(b[l] >> 16), value<T>(c[l] >> 16))) << 16;
    d[l] = result;
  });
}

}  // namespace

bool decode_half(Decoder& d, const Statement& s, Instruction& i) {
  static const std::map<std::string, int> kOperations = {{"add", kAdd}, {"sub", kSub},  {"mul", kMul}, {"fma", kFma},
                                                         {"neg", kNeg}, {"abs", kAbs},  {"min", kMin}, {"max", kMax},
                                                         {"ex2", kEx2}, {"tanh", kTanh}};
  const Type type = d.type(s);
  const auto operation = kOperations.find(s.opcode);
  if ((type.kind != 'h' && type.kind != 'n') || operation == kOperations.end() || s.has("xorsign") || s.has("oob"))
    return false;
  i.mode = operation->second;
  i.submode = s.has("relu");
  i.flag = s.has("NaN");
  i.category = i.mode == kEx2 || i.mode == kTanh ? "special" : "float";
  if (type.kind == 'h')
    i.run = type.packed ? run<Half, true> : run<Half, false>;
  else
    i.run = type.packed ? run<BFloat, true> : run<BFloat, false>;
  d.bind(s, i, 1, type);
  return true;
}

}  // namespace ptx
