// shfl, vote, match, redux, activemask, elect: instructions whose lanes see each other.
#include "decode.h"

namespace ptx {
namespace {

enum Shuffle { kUp, kDown, kButterfly, kIndex };

void shuffle(Warp& w, const Instruction& i, Mask mask) {
  const uint64_t *a = w.lanes(i.source[0]), *b = w.lanes(i.source[1]), *c = w.lanes(i.source[2]);
  uint64_t results[kLanes];
  bool in_range[kLanes];
  for_lanes(mask, [&](int l) {
    const int clamp = int(c[l] & 31), segment = int(c[l] >> 8 & 31), n = int(b[l] & 31);
    const int low = l & segment, high = low | (clamp & ~segment);
    int from = 0;
    switch (i.mode) {
      case kUp:
        from = l - n;
        break;
      case kDown:
        from = l + n;
        break;
      case kButterfly:
        from = l ^ n;
        break;
      default:
        from = low | (n & ~segment);
    }
    in_range[l] = i.mode == kUp ? from >= high : from <= high;
    if (!in_range[l]) from = l;
    if (!(mask >> from & 1))
      fail(w, i, "divergence",
           describe_thread(w, l) + " shuffles from lane " + std::to_string(from) + ", which does not take part");
    results[l] = a[from] & 0xffffffff;
  });
  for_lanes(mask, [&](int l) {
    w.lanes(i.destination[0])[l] = results[l];
    if (i.destination.size() > 1) w.lanes(i.destination[1])[l] = in_range[l];
  });
}

enum Vote { kAll, kAny, kUniform, kBallot };

void vote(Warp& w, const Instruction& i, Mask mask) {
  Mask ballot = 0;
  for_lanes(mask, [&](int l) { ballot |= Mask((w.lanes(i.source[0])[l] & 1) != uint64_t(i.negated)) << l; });
  const uint64_t result = i.mode == kAll       ? ballot == mask
                          : i.mode == kAny     ? ballot != 0
                          : i.mode == kUniform ? ballot == mask || ballot == 0
                                               : ballot;
  for_lanes(mask, [&](int l) { w.lanes(i.destination[0])[l] = result; });
}

void match(Warp& w, const Instruction& i, Mask mask) {  // mode 1: all
  const uint64_t keep = i.width == 8 ? ~uint64_t(0) : 0xffffffff;
  uint64_t values[kLanes];
  for_lanes(mask, [&](int l) { values[l] = w.lanes(i.source[0])[l] & keep; });
  for_lanes(mask, [&](int l) {
    Mask equal = 0;
    for_lanes(mask, [&](int other) { equal |= Mask(values[other] == values[l]) << other; });
    if (i.mode && equal != mask) equal = 0;
    w.lanes(i.destination[0])[l] = equal;
    if (i.destination.size() > 1) w.lanes(i.destination[1])[l] = equal != 0;
  });
}

template <class T>
void reduce(Warp& w, const Instruction& i, Mask mask) {
  T result = value<T>(w.lanes(i.source[0])[std::countr_zero(mask)]);
  for_lanes(mask & (mask - 1), [&](int l) {
    const T x = value<T>(w.lanes(i.source[0])[l]);
    switch (i.mode) {
      case 0:
        result = T(result + x);
        break;
      case 1:
        result = std::min(result, x);
        break;
      case 2:
        result = std::max(result, x);
        break;
      case 3:
        result = T(result & x);
        break;
      case 4:
        result = T(result | x);
        break;
      default:
        result = T(result ^ x);
    }
  });
  for_lanes(mask, [&](int l) { w.lanes(i.destination[0])[l] = slot(result); });
}

void active_mask(Warp& w, const Instruction& i, Mask mask) {
  for_lanes(mask, [&](int l) { w.lanes(i.destination[0])[l] = mask; });
}

void elect(Warp& w, const Instruction& i, Mask mask) {
  const int leader = std::countr_zero(mask);
  for_lanes(mask, [&](int l) {
    w.lanes(i.destination[0])[l] = uint64_t(leader);
    w.lanes(i.destination[1])[l] = l == leader;
  });
}

int find_mode(const Statement& s, std::initializer_list<const char*> names) {
  int mode = 0;
  for (const char* name : names) {
    if (s.has(name)) return mode;
    ++mode;
  }
  return -1;
}

// The pair d|p is two operands; how many destinations there are follows from how many sources must remain.
void bind_members(Decoder& d, const Statement& s, Instruction& i, size_t sources) {
  d.bind(s, i, s.operands.size() - sources);
  i.sync = Sync::Members;
  i.member_mask = i.source.back();
}

}  // namespace

bool decode_warp(Decoder& d, const Statement& s, Instruction& i) {
  i.category = "warp";
  if (s.opcode == "activemask") {
    i.run = active_mask;
    d.bind(s, i, 1);
    return true;
  }
  if (!s.has("sync")) return false;
  if (s.opcode == "shfl") {
    i.mode = find_mode(s, {"up", "down", "bfly", "idx"});
    i.run = shuffle;
    bind_members(d, s, i, 4);
  } else if (s.opcode == "vote") {
    i.mode = find_mode(s, {"all", "any", "uni", "ballot"});
    i.run = vote;
    bind_members(d, s, i, 2);
  } else if (s.opcode == "match") {
    i.mode = s.has("all");
    i.width = d.type(s).bits / 8;
    i.run = match;
    bind_members(d, s, i, 2);
  } else if (s.opcode == "redux" && !d.type(s).is_float()) {
    i.mode = find_mode(s, {"add", "min", "max", "and", "or", "xor"});
    i.run = d.type(s).kind == 's' ? reduce<int32_t> : reduce<uint32_t>;
    bind_members(d, s, i, 2);
  } else if (s.opcode == "elect") {
    i.run = elect;
    bind_members(d, s, i, 1);
  } else {
    return false;
  }
  return i.mode >= 0;
}

}  // namespace ptx
