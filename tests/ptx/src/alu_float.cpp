// Arithmetic on f32 and f64. Approximations (ex2.approx, ...) are computed exactly and rounded once: better than a GPU.
#include "alu.h"

namespace ptx {
namespace {

using I = const Instruction&;

struct Add {
  template <class T>
  static T apply(T a, T b, I) {
    return a + b;
  }
};
struct Sub {
  template <class T>
  static T apply(T a, T b, I) {
    return a - b;
  }
};
struct Mul {
  template <class T>
  static T apply(T a, T b, I) {
    return a * b;
  }
};
struct Div {
  template <class T>
  static T apply(T a, T b, I) {
    return a / b;
  }
};
struct Fma {
  template <class T>
  static T apply(T a, T b, T c, I) {
    return std::fma(a, b, c);
  }
};
template <bool kLarger>
struct Extreme {  // mode 1: .NaN; else a NaN loses to a number
  template <class T>
  static T apply(T a, T b, I i) {
    if (std::isnan(a) || std::isnan(b))
      return i.mode || (std::isnan(a) && std::isnan(b)) ? std::numeric_limits<T>::quiet_NaN() : std::isnan(a) ? b : a;
    if (a == b) return std::signbit(a) == kLarger ? b : a;
    return (a > b) == kLarger ? a : b;
  }
};
template <bool kLarger>
struct Extreme3 {
  template <class T>
  static T apply(T a, T b, T c, I i) {
    return Extreme<kLarger>::apply(Extreme<kLarger>::apply(a, b, i), c, i);
  }
};
struct Neg {
  template <class T>
  static T apply(T a, I) {
    return -a;
  }
};
struct Abs {
  template <class T>
  static T apply(T a, I) {
    return std::fabs(a);
  }
};
struct CopySign {  // the sign of a, the magnitude of b
  template <class T>
  static T apply(T a, T b, I) {
    return std::copysign(b, a);
  }
};
struct Rcp {
  template <class T>
  static T apply(T a, I) {
    return 1 / a;
  }
};
struct Sqrt {
  template <class T>
  static T apply(T a, I) {
    return std::sqrt(a);
  }
};
struct Rsqrt {
  template <class T>
  static T apply(T a, I) {
    return T(1.0 / std::sqrt(double(a)));
  }
};
struct Ex2 {
  template <class T>
  static T apply(T a, I) {
    return std::exp2(a);
  }
};
struct Lg2 {
  template <class T>
  static T apply(T a, I) {
    return std::log2(a);
  }
};
struct Sin {
  template <class T>
  static T apply(T a, I) {
    return T(std::sin(double(a)));
  }
};
struct Cos {
  template <class T>
  static T apply(T a, I) {
    return T(std::cos(double(a)));
  }
};
struct Tanh {
  template <class T>
  static T apply(T a, I) {
    return T(std::tanh(double(a)));
  }
};

template <class T>
T finish(T x, I i) {
  if constexpr (std::is_same_v<T, float>) {
    if (i.flush_subnormals) x = flush(x);
    if (i.saturate) x = x > 0 ? std::min(x, 1.0f) : 0.0f;  // NaN becomes 0
  }
  return x;
}
template <class T>
T operand(uint64_t bits, I i) {
  const T x = value<T>(bits);
  if constexpr (std::is_same_v<T, float>) return i.flush_subnormals ? flush(x) : x;
  return x;
}

template <class Op, class T>
void run1(Warp& w, I i, Mask mask) {
  const HostRounding rounding(i.rounding);
  const uint64_t* a = w.lanes(i.source[0]);
  uint64_t* d = w.lanes(i.destination[0]);
  for_lanes(mask, [&](int l) { d[l] = slot(finish(Op::apply(operand<T>(a[l], i), i), i)); });
}
template <class Op, class T>
void run2(Warp& w, I i, Mask mask) {
  const HostRounding rounding(i.rounding);
  const uint64_t *a = w.lanes(i.source[0]), *b = w.lanes(i.source[1]);
  uint64_t* d = w.lanes(i.destination[0]);
  for_lanes(mask, [&](int l) { d[l] = slot(finish(Op::apply(operand<T>(a[l], i), operand<T>(b[l], i), i), i)); });
}
template <class Op, class T>
void run3(Warp& w, I i, Mask mask) {
  const HostRounding rounding(i.rounding);
  const uint64_t *a = w.lanes(i.source[0]), *b = w.lanes(i.source[1]), *c = w.lanes(i.source[2]);
  uint64_t* d = w.lanes(i.destination[0]);
  for_lanes(mask, [&](int l) {
    d[l] = slot(finish(Op::apply(operand<T>(a[l], i), operand<T>(b[l], i), operand<T>(c[l], i), i), i));
  });
}

// f32x2 of Blackwell: two floats in a 64-bit register. mode: 0 add, 1 sub, 2 mul, 3 fma.
void run_pair(Warp& w, I i, Mask mask) {
  const HostRounding rounding(i.rounding);
  const uint64_t *a = w.lanes(i.source[0]), *b = w.lanes(i.source[1]), *c = w.lanes(i.source.back());
  uint64_t* d = w.lanes(i.destination[0]);
  for_lanes(mask, [&](int l) {
    uint64_t result = 0;
    for (int shift = 0; shift < 64; shift += 32) {
      const float x = operand<float>(a[l] >> shift, i), y = operand<float>(b[l] >> shift, i);
      const float z = operand<float>(c[l] >> shift, i);
      const float r = i.mode == 0 ? x + y : i.mode == 1 ? x - y : i.mode == 2 ? x * y : std::fma(x, y, z);
      result |= slot(finish(r, i)) << shift;
    }
    d[l] = result;
  });
}

bool decode_pair(Decoder& d, const Statement& s, Instruction& i) {
  static const std::map<std::string, int> kNames = {{"add", 0}, {"sub", 1}, {"mul", 2}, {"fma", 3}};
  const auto found = kNames.find(s.opcode);
  if (found == kNames.end()) return false;
  i.mode = found->second;
  i.run = run_pair;
  i.category = "float";
  d.bind(s, i, 1);
  return true;
}

template <class T>
Handler select(const Statement& s) {
  const std::string& op = s.opcode;
  if (op == "add") return run2<Add, T>;
  if (op == "sub") return run2<Sub, T>;
  if (op == "mul") return run2<Mul, T>;
  if (op == "div") return run2<Div, T>;
  if (op == "fma" || op == "mad") return run3<Fma, T>;
  if (op == "min" && s.operands.size() == 3) return run2<Extreme<false>, T>;
  if (op == "max" && s.operands.size() == 3) return run2<Extreme<true>, T>;
  if (op == "min" && s.operands.size() == 4) return run3<Extreme3<false>, T>;
  if (op == "max" && s.operands.size() == 4) return run3<Extreme3<true>, T>;
  if (op == "neg") return run1<Neg, T>;
  if (op == "abs") return run1<Abs, T>;
  if (op == "copysign") return run2<CopySign, T>;
  if (op == "rcp") return run1<Rcp, T>;
  if (op == "sqrt") return run1<Sqrt, T>;
  if (op == "rsqrt") return run1<Rsqrt, T>;
  if (op == "ex2") return run1<Ex2, T>;
  if (op == "lg2") return run1<Lg2, T>;
  if (op == "sin") return run1<Sin, T>;
  if (op == "cos") return run1<Cos, T>;
  if (op == "tanh") return run1<Tanh, T>;
  return nullptr;
}

}  // namespace

bool decode_float(Decoder& d, const Statement& s, Instruction& i) {
  if (s.has("f32x2")) return decode_pair(d, s, i);
  const Type type = d.type(s);
  if (type.kind != 'f' || s.has("xorsign")) return false;
  i.run = type.bits == 32 ? select<float>(s) : select<double>(s);
  if (!i.run) return false;
  const bool special = s.opcode == "ex2" || s.opcode == "lg2" || s.opcode == "rcp" || s.opcode == "sqrt" ||
                       s.opcode == "rsqrt" || s.opcode == "sin" || s.opcode == "cos" || s.opcode == "tanh" ||
                       s.opcode == "div";
  i.category = special ? "special" : "float";
  i.mode = s.has("NaN");
  d.bind(s, i, 1, type);
  return true;
}

}  // namespace ptx
