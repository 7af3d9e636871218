// Integer arithmetic, logic and bit fields. Built with -fwrapv: two's complement throughout.
#include "alu.h"

namespace ptx {
namespace {

using I = const Instruction&;

struct Add {
  template <class T>
  static T apply(T a, T b, I i) {
    if constexpr (std::is_same_v<T, int32_t>) {
      if (i.saturate) return T(std::clamp<int64_t>(int64_t(a) + b, INT32_MIN, INT32_MAX));
    }
    return T(a + b);
  }
};
struct Sub {
  template <class T>
  static T apply(T a, T b, I i) {
    if constexpr (std::is_same_v<T, int32_t>) {
      if (i.saturate) return T(std::clamp<int64_t>(int64_t(a) - b, INT32_MIN, INT32_MAX));
    }
    return T(a - b);
  }
};
template <class T>
using Wide = std::conditional_t<sizeof(T) == 8, std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>,
                                std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>>;
struct MulLow {
  template <class T>
  static T apply(T a, T b, I) {
    return T(Wide<T>(a) * b);
  }
};
struct MulHigh {
  template <class T>
  static T apply(T a, T b, I) {
    return T((Wide<T>(a) * b) >> (8 * sizeof(T)));
  }
};
struct MulWide {
  template <class T>
  static auto apply(T a, T b, I) {
    return std::conditional_t<sizeof(T) == 2, int32_t, int64_t>(Wide<T>(a) * b);
  }
};
struct Mul24 {
  template <class T>
  static T apply(T a, T b, I) {
    return T((a << 8 >> 8) * (b << 8 >> 8));
  }
};
struct MadLow {
  template <class T>
  static T apply(T a, T b, T c, I i) {
    return T(MulLow::apply(a, b, i) + c);
  }
};
struct MadHigh {
  template <class T>
  static T apply(T a, T b, T c, I i) {
    return T(MulHigh::apply(a, b, i) + c);
  }
};
struct Div {  // division by zero is undefined in PTX; GPUs give all ones
  template <class T>
  static T apply(T a, T b, I) {
    return b == 0 ? T(-1) : T(Wide<T>(a) / b);
  }
};
struct Rem {
  template <class T>
  static T apply(T a, T b, I) {
    return b == 0 ? a : T(Wide<T>(a) % b);
  }
};
struct Min {
  template <class T>
  static T apply(T a, T b, I) {
    return std::min(a, b);
  }
};
struct Max {
  template <class T>
  static T apply(T a, T b, I) {
    return std::max(a, b);
  }
};
struct SumOfDifferences {
  template <class T>
  static T apply(T a, T b, T c, I) {
    return T(c + (a < b ? b - a : a - b));
  }
};
struct And {
  template <class T>
  static T apply(T a, T b, I) {
    return a & b;
  }
};
struct Or {
  template <class T>
  static T apply(T a, T b, I) {
    return a | b;
  }
};
struct Xor {
  template <class T>
  static T apply(T a, T b, I) {
    return a ^ b;
  }
};
struct Not {
  template <class T>
  static T apply(T a, I i) {
    return i.mode ? T(!(a & 1)) : T(~a);
  }  // mode: a predicate
};
struct CNot {
  template <class T>
  static T apply(T a, I) {
    return a == 0;
  }
};
struct Neg {
  template <class T>
  static T apply(T a, I) {
    return T(-a);
  }
};
struct Abs {
  template <class T>
  static T apply(T a, I) {
    return a < 0 ? T(-a) : a;
  }
};
struct Popc {
  template <class T>
  static uint32_t apply(T a, I) {
    return uint32_t(std::popcount(std::make_unsigned_t<T>(a)));
  }
};
struct Clz {
  template <class T>
  static uint32_t apply(T a, I) {
    return uint32_t(std::countl_zero(std::make_unsigned_t<T>(a)));
  }
};
struct BFind {
  template <class T>
  static uint32_t apply(T a, I i) {
    const auto bits = std::make_unsigned_t<T>(a < 0 ? ~a : a);
    if (bits == 0) return ~0u;
    const int position = int(8 * sizeof(T)) - 1 - std::countl_zero(bits);
    return uint32_t(i.flag ? int(8 * sizeof(T)) - 1 - position : position);
  }
};
struct Brev {
  template <class T>
  static T apply(T a, I) {
    T result = 0;
    for (size_t k = 0; k < 8 * sizeof(T); ++k) result = T(result << 1 | ((a >> k) & 1));
    return result;
  }
};

template <class T>
struct ShiftLeft {
  static void run(Warp& w, const Instruction& i, Mask mask) {
    const uint64_t *a = w.lanes(i.source[0]), *b = w.lanes(i.source[1]);
    uint64_t* d = w.lanes(i.destination[0]);
    for_lanes(mask, [&](int l) {
      const uint32_t n = uint32_t(b[l]);
      d[l] = n >= 8 * sizeof(T) ? 0 : slot(T(value<T>(a[l]) << n));
    });
  }
};
template <class T>
struct ShiftRight {
  static void run(Warp& w, const Instruction& i, Mask mask) {
    const uint64_t *a = w.lanes(i.source[0]), *b = w.lanes(i.source[1]);
    uint64_t* d = w.lanes(i.destination[0]);
    for_lanes(mask, [&](int l) {
      const uint32_t n = uint32_t(b[l]), most = 8 * sizeof(T) - 1;
      const T x = value<T>(a[l]);
      d[l] = n > most && !std::is_signed_v<T> ? 0 : slot(T(x >> std::min(n, most)));
    });
  }
};
template <class T>
struct BitFieldExtract {
  static void run(Warp& w, const Instruction& i, Mask mask) {
    const uint64_t *a = w.lanes(i.source[0]), *b = w.lanes(i.source[1]), *c = w.lanes(i.source[2]);
    uint64_t* d = w.lanes(i.destination[0]);
    for_lanes(mask, [&](int l) {
      const int position = int(b[l] & 0xff), length = int(c[l] & 0xff), bits = 8 * sizeof(T);
      const T x = value<T>(a[l]);
      const T sign = std::is_signed_v<T> && length ? T((x >> std::min(position + length - 1, bits - 1)) & 1) : T(0);
      std::make_unsigned_t<T> result = 0;
      for (int k = bits - 1; k >= 0; --k)
        result = decltype(result)(result << 1 | (k < length && position + k < bits ? (x >> (position + k)) & 1 : sign));
      d[l] = slot(result);
    });
  }
};
template <class T>
struct BitFieldInsert {
  static void run(Warp& w, const Instruction& i, Mask mask) {
    const uint64_t *a = w.lanes(i.source[0]), *b = w.lanes(i.source[1]);
    const uint64_t *c = w.lanes(i.source[2]), *e = w.lanes(i.source[3]);
    uint64_t* d = w.lanes(i.destination[0]);
    for_lanes(mask, [&](int l) {
      const uint32_t position = c[l] & 0xff, length = e[l] & 0xff, bits = 8 * sizeof(T);
      const uint64_t field =
          position >= bits ? 0 : (length >= 64 ? ~uint64_t(0) : (uint64_t(1) << length) - 1) << position;
      d[l] = slot(T((b[l] & ~field) | (position >= bits ? 0 : (a[l] << position) & field)));
    });
  }
};

void permute_bytes(Warp& w, const Instruction& i, Mask mask) {
  const uint64_t *a = w.lanes(i.source[0]), *b = w.lanes(i.source[1]), *c = w.lanes(i.source[2]);
  uint64_t* d = w.lanes(i.destination[0]);
  for_lanes(mask, [&](int l) {
    const uint64_t bytes = (a[l] & 0xffffffff) | b[l] << 32;
    uint32_t result = 0;
    for (int k = 0; k < 4; ++k) {
      const uint32_t selector = (c[l] >> (4 * k)) & 15;
      uint8_t byte = uint8_t(bytes >> (8 * (selector & 7)));
      if (selector & 8) byte = byte & 0x80 ? 0xff : 0;
      result |= uint32_t(byte) << (8 * k);
    }
    d[l] = result;
  });
}

void lookup_logic(Warp& w, const Instruction& i, Mask mask) {  // lop3.b32
  const uint64_t *a = w.lanes(i.source[0]), *b = w.lanes(i.source[1]), *c = w.lanes(i.source[2]);
  const uint64_t* table = w.lanes(i.source[3]);
  uint64_t* d = w.lanes(i.destination[0]);
  for_lanes(mask, [&](int l) {
    const uint32_t x = uint32_t(a[l]), y = uint32_t(b[l]), z = uint32_t(c[l]);
    uint32_t result = 0;
    for (int k = 0; k < 8; ++k)
      if (table[l] >> k & 1) result |= (k & 4 ? x : ~x) & (k & 2 ? y : ~y) & (k & 1 ? z : ~z);
    d[l] = result;
  });
}

void funnel_shift(Warp& w, const Instruction& i, Mask mask) {
  const uint64_t *a = w.lanes(i.source[0]), *b = w.lanes(i.source[1]), *c = w.lanes(i.source[2]);
  uint64_t* d = w.lanes(i.destination[0]);
  for_lanes(mask, [&](int l) {
    const uint64_t both = (a[l] & 0xffffffff) | b[l] << 32;
    const uint32_t n = i.flag ? uint32_t(c[l]) & 31 : std::min(uint32_t(c[l]), 32u);
    d[l] = uint32_t(i.mode ? both >> n : (both << n) >> 32);
  });
}

// dp4a: c plus four products of bytes; mode and submode: the bytes of a and b are signed.
void dot_of_bytes(Warp& w, const Instruction& i, Mask mask) {
  const uint64_t *a = w.lanes(i.source[0]), *b = w.lanes(i.source[1]), *c = w.lanes(i.source[2]);
  uint64_t* d = w.lanes(i.destination[0]);
  const auto byte = [](uint64_t bits, int k, bool is_signed) {
    return is_signed ? int32_t(int8_t(bits >> (8 * k))) : int32_t(uint8_t(bits >> (8 * k)));
  };
  for_lanes(mask, [&](int l) {
    int32_t sum = int32_t(c[l]);
    for (int k = 0; k < 4; ++k) sum += byte(a[l], k, i.mode) * byte(b[l], k, i.submode);
    d[l] = slot(sum);
  });
}

template <class T>
struct WithCarry {  // add.cc, addc, sub.cc, subc; mode 1: subtract, flag: reads the carry, submode: writes it
  static void run(Warp& w, const Instruction& i, Mask mask) {
    using U = std::make_unsigned_t<T>;
    const uint64_t *a = w.lanes(i.source[0]), *b = w.lanes(i.source[1]);
    uint64_t *d = w.lanes(i.destination[0]), *carry = w.lanes(w.launch->program->carry);
    for_lanes(mask, [&](int l) {
      const U x = value<U>(a[l]), y = i.mode ? U(~value<U>(b[l])) : value<U>(b[l]);
      const unsigned __int128 sum = (unsigned __int128)x + y + (i.flag ? carry[l] & 1 : uint64_t(i.mode));
      d[l] = slot(U(sum));
      if (i.submode) carry[l] = uint64_t(sum >> (8 * sizeof(T))) & 1;
    });
  }
};

template <class Op>
struct Bind {
  template <class T>
  struct Unary {
    static void run(Warp& w, const Instruction& i, Mask m) { unary<Op, T>(w, i, m); }
  };
  template <class T>
  struct Binary {
    static void run(Warp& w, const Instruction& i, Mask m) { binary<Op, T>(w, i, m); }
  };
  template <class T>
  struct Ternary {
    static void run(Warp& w, const Instruction& i, Mask m) { ternary<Op, T>(w, i, m); }
  };
};

template <class T>
struct MadWide {
  static void run(Warp& w, const Instruction& i, Mask mask) {
    const uint64_t *a = w.lanes(i.source[0]), *b = w.lanes(i.source[1]), *c = w.lanes(i.source[2]);
    uint64_t* d = w.lanes(i.destination[0]);
    for_lanes(mask, [&](int l) {
      const auto product = MulWide::apply(value<T>(a[l]), value<T>(b[l]), i);
      d[l] = slot(decltype(product)(product + value<std::remove_const_t<decltype(product)>>(c[l])));
    });
  }
};

Handler select(Decoder& d, const Statement& s, Instruction& i, Type type) {
  const std::string& op = s.opcode;
  if (op == "add" || op == "sub" || op == "addc" || op == "subc") {
    i.mode = op[0] == 's';
    i.flag = op.size() == 4;
    i.submode = s.has("cc");
    if (i.flag || i.submode) {
      d.carry();
      return for_integer<WithCarry>(type);
    }
    return i.mode ? for_integer<Bind<Sub>::Binary>(type) : for_integer<Bind<Add>::Binary>(type);
  }
  if (s.has("cc")) return nullptr;
  if (op == "mul" && s.has("hi")) return for_integer<Bind<MulHigh>::Binary>(type);
  if (op == "mul" && s.has("wide")) return for_integer<Bind<MulWide>::Binary>(type);
  if (op == "mul") return for_integer<Bind<MulLow>::Binary>(type);
  if (op == "mul24" && s.has("lo")) return for_integer<Bind<Mul24>::Binary>(type);
  if (op == "mad" && s.has("hi")) return for_integer<Bind<MadHigh>::Ternary>(type);
  if (op == "mad" && s.has("wide")) return for_integer<MadWide>(type);
  if (op == "mad") return for_integer<Bind<MadLow>::Ternary>(type);
  if (op == "div") return for_integer<Bind<Div>::Binary>(type);
  if (op == "rem") return for_integer<Bind<Rem>::Binary>(type);
  if (op == "min") return for_integer<Bind<Min>::Binary>(type);
  if (op == "max") return for_integer<Bind<Max>::Binary>(type);
  if (op == "sad") return for_integer<Bind<SumOfDifferences>::Ternary>(type);
  if (op == "neg") return for_integer<Bind<Neg>::Unary>(type);
  if (op == "abs") return for_integer<Bind<Abs>::Unary>(type);
  if (op == "popc") return for_integer<Bind<Popc>::Unary>(type);
  if (op == "clz") return for_integer<Bind<Clz>::Unary>(type);
  if (op == "bfind") {
    i.flag = s.has("shiftamt");
    return for_integer<Bind<BFind>::Unary>(type);
  }
  if (op == "brev") return for_integer<Bind<Brev>::Unary>(type);
  if (op == "shl") return for_integer<ShiftLeft>(type);
  if (op == "shr") return for_integer<ShiftRight>(type);
  if (op == "bfe") return for_integer<BitFieldExtract>(type);
  if (op == "bfi") return for_integer<BitFieldInsert>(type);
  if (op == "and") return for_integer<Bind<And>::Binary>(type);
  if (op == "or") return for_integer<Bind<Or>::Binary>(type);
  if (op == "xor") return for_integer<Bind<Xor>::Binary>(type);
  if (op == "not") return for_integer<Bind<Not>::Unary>(type);
  if (op == "cnot") return for_integer<Bind<CNot>::Unary>(type);
  if (op == "lop3") return lookup_logic;
  if (op == "prmt" && s.modifiers.size() == 1) return permute_bytes;
  if (op == "dp4a") {
    i.mode = type.kind == 's';
    i.submode = d.type(s, 1).kind == 's';
    return dot_of_bytes;
  }
  if (op == "shf") {
    i.mode = s.has("r");
    i.flag = s.has("wrap");
    return funnel_shift;
  }
  return nullptr;
}

}  // namespace

bool decode_integer(Decoder& d, const Statement& s, Instruction& i) {
  Type type = d.type(s);
  if (!type.kind || type.is_float()) return false;
  if (type.kind == 'p') {  // and.pred, or.pred, xor.pred, not.pred on slots of 0 and 1
    type = {'b', 32};
    i.mode = 1;
  }
  const int mode = i.mode;
  i.run = select(d, s, i, type);
  if (!i.run) return false;
  if (s.opcode == "not") i.mode = mode;
  i.category = "integer";
  d.bind(s, i, 1);
  if (i.negated) d.unsupported(s, "negated operand");
  return true;
}

}  // namespace ptx
