// cvt in all directions, cvta.
#include "alu.h"

namespace ptx {
namespace {

// A value on its way: exact for every source type.
struct Number {
  bool is_integer;
  __int128 integer;
  double real;
};

Number read(uint64_t bits, Type type) {
  Number n{true, 0, 0};
  switch (type.kind) {
    case 'f':
      n.is_integer = false;
      n.real = type.bits == 32 ? double(value<float>(bits)) : value<double>(bits);
      break;
    case 'h':
      n.is_integer = false;
      n.real = to_float(value<Half>(bits));
      break;
    case 'n':
      n.is_integer = false;
      n.real = to_float(value<BFloat>(bits));
      break;
    default: {
      const int shift = 64 - type.bits;
      n.integer = type.kind == 's' ? __int128(int64_t(bits << shift) >> shift) : __int128(bits << shift >> shift);
    }
  }
  return n;
}

double to_integral(double x, Rounding rounding) {
  switch (rounding) {
    case Rounding::Zero:
      return std::trunc(x);
    case Rounding::Down:
      return std::floor(x);
    case Rounding::Up:
      return std::ceil(x);
    default:
      return std::nearbyint(x);
  }
}

uint64_t truncate(uint64_t bits, int width) { return width == 64 ? bits : bits & ((uint64_t(1) << width) - 1); }

uint64_t write_integer(Number n, Type to, const Instruction& i) {
  __int128 low = 0, high = (__int128(1) << to.bits) - 1;
  if (to.kind == 's') {
    low = -(__int128(1) << (to.bits - 1));
    high = (__int128(1) << (to.bits - 1)) - 1;
  }
  if (!n.is_integer) {  // floats are always clamped; NaN gives 0, or the top bit for 64-bit results
    if (std::isnan(n.real)) return to.bits == 64 ? uint64_t(1) << 63 : 0;
    const double x = to_integral(n.real, i.rounding);
    n.integer = x <= double(low) ? low : x >= double(high) ? high : __int128(x);
  } else if (i.saturate) {
    n.integer = std::clamp(n.integer, low, high);
  }
  return truncate(uint64_t(n.integer), to.bits);
}

uint64_t write_float(Number n, Type to, const Instruction& i) {
  if (i.mode && !n.is_integer) n.real = to_integral(n.real, i.rounding);  // .rni and the like
  if (i.saturate && !n.is_integer) n.real = n.real > 0 ? std::min(n.real, 1.0) : 0.0;
  if (i.submode && !n.is_integer && !(n.real > 0)) n.real = std::isnan(n.real) ? n.real : 0.0;  // .relu
  if (to.kind == 'f') {
    const HostRounding rounding(i.rounding);
    if (to.bits == 64) return slot(n.is_integer ? double(n.integer) : n.real);
    const float x = n.is_integer ? float(n.integer) : float(n.real);
    return slot(i.flush_subnormals ? flush(x) : x);
  }
  const double x = n.is_integer ? double(n.integer) : n.real;
  return encode(x, to.kind == 'h' ? kF16 : kBF16, i.rounding);
}

Type type_of(int code) { return {char(code >> 8), code & 0xff}; }
int code_of(Type type) { return int(type.kind) << 8 | type.bits; }

void convert(Warp& w, const Instruction& i, Mask mask) {
  const uint64_t* a = w.lanes(i.source[0]);
  uint64_t* d = w.lanes(i.destination[0]);
  const Type to = type_of(i.width), from = type_of(int(i.second_offset));
  if (!to.is_float() && !from.is_float() && !i.saturate) {  // the common case: sign or zero extension
    const int shift = 64 - std::min(from.bits, to.bits);
    if (from.kind == 's')  // a destination register may be wider than the type: extend into it
      for_lanes(mask, [&](int l) {
        d[l] = truncate(uint64_t(int64_t(a[l] << shift) >> shift), to.kind == 's' ? 64 : to.bits);
      });
    else
      for_lanes(mask, [&](int l) { d[l] = a[l] << shift >> shift; });
    return;
  }
  for_lanes(mask, [&](int l) {
    const Number n = read(a[l], from);
    d[l] = to.is_float() ? write_float(n, to, i) : write_integer(n, to, i);
  });
}

// Two floats to a packed pair; the first source becomes the upper half. mode selects the format.
constexpr Format kPairs[] = {kF16, kBF16, kE4M3, kE5M2};
void convert_pair(Warp& w, const Instruction& i, Mask mask) {
  const uint64_t *a = w.lanes(i.source[0]), *b = w.lanes(i.source[1]);
  uint64_t* d = w.lanes(i.destination[0]);
  const Format format = kPairs[i.mode];
  const int bits = 1 + format.exponent_bits + format.mantissa_bits;
  for_lanes(mask, [&](int l) {
    const auto one = [&](uint64_t source) {
      double x = value<float>(source);
      if (i.submode && x < 0) x = 0;  // .relu
      return uint64_t(encode(x, format, i.rounding, i.saturate));
    };
    d[l] = one(a[l]) << bits | one(b[l]);
  });
}

void widen_pair(Warp& w, const Instruction& i, Mask mask) {  // e4m3x2 or e5m2x2 to f16x2
  const uint64_t* a = w.lanes(i.source[0]);
  uint64_t* d = w.lanes(i.destination[0]);
  for_lanes(mask, [&](int l) {
    const auto one = [&](uint64_t byte) {
      return uint64_t(encode(decode(uint32_t(byte & 0xff), kPairs[i.mode]), kF16));
    };
    d[l] = one(a[l] >> 8) << 16 | one(a[l]);
  });
}

void to_tf32(Warp& w, const Instruction& i, Mask mask) {
  const uint64_t* a = w.lanes(i.source[0]);
  uint64_t* d = w.lanes(i.destination[0]);
  for_lanes(mask, [&](int l) { d[l] = uint64_t(encode(value<float>(a[l]), kTF32, i.rounding, i.saturate)) << 13; });
}

void add_window(Warp& w, const Instruction& i, Mask mask) {  // cvta and cvta.to
  const uint64_t* a = w.lanes(i.source[0]);
  uint64_t* d = w.lanes(i.destination[0]);
  const uint64_t window = i.space == Space::Shared  ? kSharedWindow
                          : i.space == Space::Local ? kLocalWindow
                          : i.space == Space::Param ? kParamWindow
                                                    : 0;
  for_lanes(mask, [&](int l) { d[l] = i.flag ? a[l] - window : a[l] + window; });
}

bool decode_cvta(Decoder& d, const Statement& s, Instruction& i) {
  i.space = s.has("shared") || s.has("shared::cta") ? Space::Shared
            : s.has("local")                        ? Space::Local
            : s.has("param")                        ? Space::Param
                                                    : Space::Global;
  i.flag = s.has("to");
  i.run = add_window;
  d.bind(s, i, 1);
  return true;
}

}  // namespace

bool decode_convert(Decoder& d, const Statement& s, Instruction& i) {
  i.category = "convert";
  if (s.opcode == "cvta") return decode_cvta(d, s, i);
  if (s.opcode != "cvt" || s.modifiers.size() < 2) return false;
  const std::string &to = s.modifiers[s.modifiers.size() - 2], &from = s.modifiers.back();
  i.submode = s.has("relu");
  static const std::map<std::string, int> kPacked = {{"f16x2", 0}, {"bf16x2", 1}, {"e4m3x2", 2}, {"e5m2x2", 3}};
  if (from == "f32" && kPacked.count(to)) {
    i.mode = kPacked.at(to);
    i.run = convert_pair;
  } else if (to == "f16x2" && kPacked.count(from)) {
    i.mode = kPacked.at(from);
    i.run = widen_pair;
  } else if (to == "tf32" && from == "f32") {
    i.run = to_tf32;
  } else {
    const Type target = parse_type(to), source = parse_type(from);
    if (!target.kind || !source.kind || target.packed || source.packed) return false;
    for (const char* integral : {"rni", "rzi", "rmi", "rpi"})
      if (s.has(integral)) i.mode = 1;
    i.width = code_of(target);
    i.second_offset = code_of(source);
    i.run = convert;
    d.bind(s, i, 1, source);
    return true;
  }
  d.bind(s, i, 1, {'f', 32});
  return true;
}

}  // namespace ptx
