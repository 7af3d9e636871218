// ld, st, atom and red in every space, and the counting of sectors and bank conflicts.
#include <algorithm>

#include "counting.h"
#include "decode.h"

namespace ptx {

uint8_t* access(Warp& w, const Instruction& i, int lane, uint64_t address, int bytes, Access kind, const void* stored) {
  Space space = i.space;
  if (space == Space::Generic) {
    const uint64_t window = address & (uint64_t(3) << 60);
    space = window == kSharedWindow  ? Space::Shared
            : window == kLocalWindow ? Space::Local
            : window == kParamWindow ? Space::Param
                                     : Space::Global;
    if (space != Space::Global) address -= window;
  }
  Block& block = *w.block;
  try {
    switch (space) {
      case Space::Shared:
        block.shared.check(w.who(lane), int64_t(address), bytes, kind, stored);
        return block.shared.at(int64_t(address));
      case Space::Local: {
        const uint64_t size = uint64_t(w.launch->program->local_bytes);
        if (address + bytes > size) throw Error("out-of-bounds", "local access out of bounds");
        if (address % uint64_t(bytes)) throw Error("misaligned", "misaligned local access");
        return block.local.data() + size * w.thread(lane) + address;
      }
      case Space::Param:
        if (address + bytes > w.launch->parameters.size()) throw Error("out-of-bounds", "parameter out of bounds");
        return w.launch->parameters.data() + address;
      default:
        w.launch->global->check(w.who(lane), address, bytes, kind, stored);
        return reinterpret_cast<uint8_t*>(address);
    }
  } catch (Error& error) {
    if (space == Space::Global) error.tensor = w.launch->global->tensor_at(address);
    error.message += " (" + describe_thread(w, lane) + ")";
    throw;
  }
}

namespace {

uint64_t widened(uint64_t bits, int width, bool is_signed) {
  if (width == 8) return bits;
  const int shift = 64 - 8 * width;
  return is_signed ? uint64_t(int64_t(bits << shift) >> shift) : bits << shift >> shift;
}

// flag: the type is signed, so a wider register gets copies of the sign.
void load(Warp& w, const Instruction& i, Mask mask) {
  const int count = int(i.destination.size()), bytes = i.width * count;
  const uint64_t* base = w.lanes(i.source[0]);
  count_access(w, i, mask, base, bytes, false);
  for_lanes(mask, [&](int l) {
    const uint64_t address = base[l] + uint64_t(i.offset);
    const uint8_t* from = access(w, i, l, address, bytes, i.access);
    // The base may be one of the destinations, in another lane's turn never: each lane reads its own slot only.
    uint64_t elements[8];
    for (int k = 0; k < count; ++k) {
      elements[k] = 0;
      std::memcpy(&elements[k], from + k * i.width, size_t(i.width));
    }
    for (int k = 0; k < count; ++k) w.lanes(i.destination[size_t(k)])[l] = widened(elements[k], i.width, i.flag);
  });
}

void store(Warp& w, const Instruction& i, Mask mask) {
  const int count = int(i.source.size()) - 1, bytes = i.width * count;
  const uint64_t* base = w.lanes(i.source[0]);
  count_access(w, i, mask, base, bytes, true);
  for_lanes(mask, [&](int l) {
    const uint64_t address = base[l] + uint64_t(i.offset);
    uint8_t data[64];
    for (int k = 0; k < count; ++k)
      std::memcpy(data + k * i.width, &w.lanes(i.source[size_t(k) + 1])[l], size_t(i.width));
    std::memcpy(access(w, i, l, address, bytes, i.access, data), data, size_t(bytes));
  });
}

enum AtomicOperation { kAdd, kMin, kMax, kAnd, kOr, kXor, kExchange, kCompareAndSwap, kIncrement, kDecrement };

template <class T>
uint64_t combine(int operation, uint64_t old_bits, uint64_t b_bits, uint64_t c_bits) {
  const T old = value<T>(old_bits), b = value<T>(b_bits);
  switch (operation) {
    case kAdd:
      return slot(T(old + b));
    case kMin:
      return slot(std::min(old, b));
    case kMax:
      return slot(std::max(old, b));
    case kExchange:
      return slot(b);
    case kCompareAndSwap:
      return old_bits == slot(b) ? slot(value<T>(c_bits)) : old_bits;
    default:
      break;
  }
  if constexpr (std::is_integral_v<T>) {
    switch (operation) {
      case kAnd:
        return slot(T(old & b));
      case kOr:
        return slot(T(old | b));
      case kXor:
        return slot(T(old ^ b));
      case kIncrement:
        return slot(old >= b ? T(0) : T(old + 1));
      case kDecrement:
        return slot(old == 0 || old > b ? b : T(old - 1));
      default:
        break;
    }
  }
  return old_bits;
}

template <class T>
uint64_t add_halves(uint64_t old, uint64_t b, int bits) {
  constexpr Format format = std::is_same_v<T, Half> ? kF16 : kBF16;
  uint64_t result = 0;
  for (int shift = 0; shift < bits; shift += 16)
    result |= uint64_t(encode(double(to_float(value<T>(old >> shift))) + to_float(value<T>(b >> shift)), format))
              << shift;
  return result;
}

// submode: the type; each lane in turn, lowest first.
void atomic(Warp& w, const Instruction& i, Mask mask) {
  const uint64_t *base = w.lanes(i.source[0]), *b = w.lanes(i.source[1]);
  const uint64_t* c = i.source.size() > 2 ? w.lanes(i.source[2]) : b;
  count_access(w, i, mask, base, i.width, true);
  for_lanes(mask, [&](int l) {
    uint8_t* at = access(w, i, l, base[l] + uint64_t(i.offset), i.width, Access::Atomic);
    uint64_t old = 0, result;
    std::memcpy(&old, at, size_t(i.width));
    switch (i.submode) {
      case 'f':
        result = i.width == 4 ? combine<float>(i.mode, old, b[l], c[l]) : combine<double>(i.mode, old, b[l], c[l]);
        break;
      case 'h':
        result = add_halves<Half>(old, b[l], 8 * i.width);
        break;
      case 'n':
        result = add_halves<BFloat>(old, b[l], 8 * i.width);
        break;
      case 's':
        result = i.width == 4 ? combine<int32_t>(i.mode, old, b[l], c[l]) : combine<int64_t>(i.mode, old, b[l], c[l]);
        break;
      default:
        result = i.width == 2   ? combine<uint16_t>(i.mode, old, b[l], c[l])
                 : i.width == 4 ? combine<uint32_t>(i.mode, old, b[l], c[l])
                                : combine<uint64_t>(i.mode, old, b[l], c[l]);
    }
    std::memcpy(at, &result, size_t(i.width));
    if (!i.destination.empty()) w.lanes(i.destination[0])[l] = old;
  });
}

Space space_of(const Statement& s) {
  for (const std::string& m : s.modifiers) {
    if (m == "global") return Space::Global;
    if (m == "const") return Space::Const;
    if (m == "local") return Space::Local;
    if (m == "param" || m == "param::entry") return Space::Param;
    if (m == "shared" || m == "shared::cta") return Space::Shared;
  }
  return Space::Generic;
}

const char* space_name(Space space) {
  switch (space) {
    case Space::Global:
    case Space::Const:
      return "global";
    case Space::Shared:
      return "shared";
    case Space::Generic:
      return "generic";
    default:
      return "local";
  }
}

bool decode_atomic(Decoder& d, const Statement& s, Instruction& i) {
  static const std::map<std::string, int> kNames = {
      {"add", kAdd},       {"min", kMin},      {"max", kMax},       {"and", kAnd},
      {"or", kOr},         {"xor", kXor},      {"exch", kExchange}, {"cas", kCompareAndSwap},
      {"inc", kIncrement}, {"dec", kDecrement}};
  i.mode = -1;
  for (const std::string& m : s.modifiers)
    if (kNames.count(m)) i.mode = kNames.at(m);
  const Type type = d.type(s);
  if (i.mode < 0 || !type.kind || s.has("v2") || s.has("v4") || s.has("shared::cluster")) return false;
  if ((type.kind == 'h' || type.kind == 'n') && i.mode != kAdd) return false;
  i.width = type.packed ? 4 : type.bits / 8;
  i.submode = type.kind;
  i.access = Access::Atomic;
  i.run = atomic;
  d.bind(s, i, s.opcode == "atom" ? 1 : 0, type);
  return true;
}

}  // namespace

bool decode_memory(Decoder& d, const Statement& s, Instruction& i) {
  const std::string& op = s.opcode;
  if (op == "prefetch" || op == "prefetchu" || op == "discard" || op == "applypriority" || op == "createpolicy") {
    i.category = "hint";
    i.run = [](Warp&, const Instruction&, Mask) {};
    return true;
  }
  if (op == "ldmatrix" || (op != "ld" && op != "ldu" && op != "st" && op != "atom" && op != "red")) return false;
  if (s.has("async") || s.has("shared::cluster")) return false;
  i.space = space_of(s);
  i.category = op == "atom" || op == "red" ? "atomic" : space_name(i.space);
  if (op == "atom" || op == "red") return decode_atomic(d, s, i);
  const Type type = d.type(s);
  if (!type.kind || type.bits > 64) return false;
  i.width = type.packed ? 4 : type.bits / 8;
  i.flag = type.kind == 's';
  const bool is_strong = s.has("volatile") || s.has("relaxed") || s.has("acquire") || s.has("release") || s.has("mmio");
  Statement without_policy = s;  // the operand of .L2::cache_hint changes nothing here
  if (s.has("L2::cache_hint")) without_policy.operands.pop_back();
  if (op == "st") {
    i.access = is_strong ? Access::StrongWrite : Access::Write;
    i.run = store;
    d.bind(without_policy, i, 0, type);
  } else {
    i.access = s.has("nc") ? Access::ReadOnly : is_strong ? Access::StrongRead : Access::Read;
    i.run = load;
    d.bind(without_policy, i, 1, type);
  }
  return true;
}

}  // namespace ptx
