// setp, set, selp, slct, testp and mov.
#include "alu.h"

namespace ptx {
namespace {

enum Comparison { kEq, kNe, kLt, kLe, kGt, kGe, kNum, kNan };
enum Combination { kNone, kAnd, kOr, kXor };

template <class T>
bool compare(T a, T b, int mode, bool unordered) {
  if constexpr (std::is_floating_point_v<T>) {
    const bool nan = std::isnan(a) || std::isnan(b);
    if (mode == kNum) return !nan;
    if (mode == kNan) return nan;
    if (nan) return unordered;
  }
  switch (mode) {
    case kEq:
      return a == b;
    case kNe:
      return a != b;
    case kLt:
      return a < b;
    case kLe:
      return a <= b;
    case kGt:
      return a > b;
    default:
      return a >= b;
  }
}

template <class T>
auto widen(uint64_t bits, const Instruction& i) {
  if constexpr (std::is_same_v<T, Half> || std::is_same_v<T, BFloat>)
    return to_float(value<T>(bits));
  else if constexpr (std::is_same_v<T, float>)
    return i.flush_subnormals ? flush(value<float>(bits)) : value<float>(bits);
  else
    return value<T>(bits);
}

// flag: unordered comparison. For set, width is the size of the result: 4 (all ones), -4 (1.0f), 2 (packed halves).
template <class T>
struct SetPredicate {
  static void run(Warp& w, const Instruction& i, Mask mask) {
    const uint64_t *a = w.lanes(i.source[0]), *b = w.lanes(i.source[1]);
    const uint64_t* c = i.submode ? w.lanes(i.source[2]) : nullptr;
    uint64_t* p = w.lanes(i.destination[0]);
    uint64_t* q = i.destination.size() > 1 ? w.lanes(i.destination[1]) : nullptr;
    const auto combine = [&](bool x, bool y) {
      return i.submode == kAnd ? x && y : i.submode == kOr ? x || y : i.submode == kXor ? x != y : x;
    };
    for_lanes(mask, [&](int l) {
      const bool result = compare(widen<T>(a[l], i), widen<T>(b[l], i), i.mode, i.flag);
      const bool other = c && ((c[l] & 1) != uint64_t(i.negated));
      p[l] = combine(result, other);
      if (i.width == 4) p[l] = p[l] ? 0xffffffff : 0;
      if (i.width == -4) p[l] = p[l] ? 0x3f800000 : 0;
      if (q) q[l] = combine(!result, other);
    });
  }
};

// Two halves compared into two predicates.
template <class T>
void compare_packed(Warp& w, const Instruction& i, Mask mask) {
  const uint64_t *a = w.lanes(i.source[0]), *b = w.lanes(i.source[1]);
  uint64_t *p = w.lanes(i.destination[0]), *q = w.lanes(i.destination[1]);
  for_lanes(mask, [&](int l) {
    const bool low = compare(widen<T>(a[l], i), widen<T>(b[l], i), i.mode, i.flag);
    const bool high = compare(widen<T>(a[l] >> 16, i), widen<T>(b[l] >> 16, i), i.mode, i.flag);
    p[l] = low;
    q[l] = high;
  });
}

void select_by_predicate(Warp& w, const Instruction& i, Mask mask) {
  const uint64_t *a = w.lanes(i.source[0]), *b = w.lanes(i.source[1]), *c = w.lanes(i.source[2]);
  uint64_t* d = w.lanes(i.destination[0]);
  for_lanes(mask, [&](int l) { d[l] = (c[l] & 1) != uint64_t(i.negated) ? a[l] : b[l]; });
}

void select_by_sign(Warp& w, const Instruction& i, Mask mask) {  // slct
  const uint64_t *a = w.lanes(i.source[0]), *b = w.lanes(i.source[1]), *c = w.lanes(i.source[2]);
  uint64_t* d = w.lanes(i.destination[0]);
  for_lanes(mask, [&](int l) {
    const bool first = i.mode ? value<float>(c[l]) >= 0 : value<int32_t>(c[l]) >= 0;
    d[l] = first ? a[l] : b[l];
  });
}

template <class T>
void test_property(Warp& w, const Instruction& i, Mask mask) {  // testp
  const uint64_t* a = w.lanes(i.source[0]);
  uint64_t* p = w.lanes(i.destination[0]);
  for_lanes(mask, [&](int l) {
    const T x = value<T>(a[l]);
    const int kind = std::fpclassify(x);
    switch (i.mode) {
      case 0:
        p[l] = std::isfinite(x);
        break;
      case 1:
        p[l] = std::isinf(x);
        break;
      case 2:
        p[l] = !std::isnan(x);
        break;
      case 3:
        p[l] = std::isnan(x);
        break;
      case 4:
        p[l] = kind == FP_NORMAL;
        break;
      default:
        p[l] = kind == FP_SUBNORMAL;
    }
  });
}

void move(Warp& w, const Instruction& i, Mask mask) {
  const uint64_t* a = w.lanes(i.source[0]);
  uint64_t* d = w.lanes(i.destination[0]);
  const uint64_t keep = i.width == 8 ? ~uint64_t(0) : (uint64_t(1) << (8 * i.width)) - 1;
  for_lanes(mask, [&](int l) { d[l] = a[l] & keep; });
}

void move_predicate(Warp& w, const Instruction& i, Mask mask) {
  const uint64_t* a = w.lanes(i.source[0]);
  uint64_t* d = w.lanes(i.destination[0]);
  for_lanes(mask, [&](int l) { d[l] = a[l] != 0; });
}

void pack(Warp& w, const Instruction& i, Mask mask) {  // mov.b32 r, {lo, hi}
  const int bits = 8 * i.width / int(i.source.size());
  uint64_t* d = w.lanes(i.destination[0]);
  for_lanes(mask, [&](int l) {
    uint64_t result = 0;
    for (size_t k = 0; k < i.source.size(); ++k)
      result |= (w.lanes(i.source[k])[l] & ((uint64_t(1) << bits) - 1)) << (bits * int(k));
    d[l] = result;
  });
}

void unpack(Warp& w, const Instruction& i, Mask mask) {  // mov.b32 {lo, hi}, r
  const int bits = 8 * i.width / int(i.destination.size());
  const uint64_t* a = w.lanes(i.source[0]);
  for_lanes(mask, [&](int l) {
    const uint64_t x = a[l];
    for (size_t k = 0; k < i.destination.size(); ++k)
      w.lanes(i.destination[k])[l] = (x >> (bits * int(k))) & ((uint64_t(1) << bits) - 1);
  });
}

Handler comparison(Type type, bool pair) {
  if (type.packed && pair) return type.kind == 'h' ? compare_packed<Half> : compare_packed<BFloat>;
  if (type.packed) return nullptr;
  if (type.kind == 'f') return type.bits == 32 ? SetPredicate<float>::run : SetPredicate<double>::run;
  if (type.kind == 'h') return SetPredicate<Half>::run;
  if (type.kind == 'n') return SetPredicate<BFloat>::run;
  return for_integer<SetPredicate>(type);
}

bool decode_set(Decoder& d, const Statement& s, Instruction& i) {
  static const std::map<std::string, int> kNames = {{"eq", kEq}, {"ne", kNe}, {"lt", kLt},   {"le", kLe},
                                                    {"gt", kGt}, {"ge", kGe}, {"lo", kLt},   {"ls", kLe},
                                                    {"hi", kGt}, {"hs", kGe}, {"num", kNum}, {"nan", kNan}};
  std::string name = s.modifiers.at(0);
  if (name.size() == 3 && name[2] == 'u' && name != "num") {
    i.flag = true;
    name.pop_back();
  }
  const auto found = kNames.find(name);
  if (found == kNames.end()) return false;
  i.mode = found->second;
  i.submode = s.has("and") ? kAnd : s.has("or") ? kOr : s.has("xor") ? kXor : kNone;
  const bool is_set = s.opcode == "set";
  const Type type = d.type(s, is_set ? 1 : 0);
  if (is_set) i.width = d.type(s).kind == 'f' ? -4 : 4;
  const size_t sources = i.submode ? 3 : 2;
  i.run = comparison(type, s.operands.size() == sources + 2);
  d.bind(s, i, s.operands.size() - sources, type);
  return true;
}

}  // namespace

bool decode_compare(Decoder& d, const Statement& s, Instruction& i) {
  const Type type = d.type(s);
  i.category = "compare";
  if (s.opcode == "setp" || s.opcode == "set") return decode_set(d, s, i);
  if (s.opcode == "selp") {
    i.run = select_by_predicate;
    d.bind(s, i, 1, type);
    return true;
  }
  if (s.opcode == "slct") {
    i.mode = d.type(s, 1).kind == 'f';
    i.run = select_by_sign;
    d.bind(s, i, 1, type);
    return true;
  }
  if (s.opcode == "testp") {
    static const char* const kNames[] = {"finite", "infinite", "number", "notanumber", "normal", "subnormal"};
    for (int k = 0; k < 6; ++k)
      if (s.has(kNames[k])) i.mode = k;
    i.run = type.bits == 32 ? test_property<float> : test_property<double>;
    d.bind(s, i, 1, type);
    return true;
  }
  if (s.opcode == "mov") {
    i.category = "move";
    i.width = std::max(type.bits / 8, type.packed ? 4 : 0);
    const bool to_vector = s.operands.at(0).kind == Operand::Vector,
               from_vector = s.operands.at(1).kind == Operand::Vector;
    i.run = type.kind == 'p' ? move_predicate : to_vector ? unpack : from_vector ? pack : move;
    d.bind(s, i, 1, type);
    return true;
  }
  return false;
}

}  // namespace ptx
