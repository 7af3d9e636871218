// Branches, exits, barriers and fences.
#include "decode.h"

namespace ptx {
namespace {

void branch(Warp& w, const Instruction& i, Mask mask) {
  Group& group = w.group();
  const Mask stay = group.mask & ~mask;
  if (!mask) return;
  if (!stay) {
    group.pc = i.target;
    return;
  }
  group.mask = stay;
  w.groups.push_back({i.target, mask, Group::Ready});
}

void exit_lanes(Warp& w, const Instruction&, Mask mask) {
  w.exited |= mask;
  w.group().mask &= ~mask;
}

void trap(Warp& w, const Instruction& i, Mask mask) {
  if (mask) fail(w, i, "trap", "trap executed by " + describe_thread(w, std::countr_zero(mask)));
}

void nothing(Warp&, const Instruction&, Mask) {}

// Live warps of the block, in threads: barriers count whole warps, and exited warps do not hold them.
int live_threads(const Block& block) {
  int count = 0;
  for (const Warp& warp : block.warps) count += warp.done() ? 0 : kLanes;
  return count;
}

}  // namespace

void complete_barrier(Block& block, Barrier& barrier) {
  for (const int index : barrier.waiting) {
    Warp& warp = block.warps[size_t(index)];
    join(warp.seen, barrier.joined);
    join(warp.proxy_seen, barrier.proxy_joined);
    Group& group = warp.groups[0];
    const Instruction& i = warp.launch->program->code[size_t(group.pc) - 1];
    if (!i.destination.empty()) {
      const uint64_t result = i.mode == 1 ? uint64_t(barrier.count) : i.mode == 2 ? barrier.all : barrier.any;
      for_lanes(group.mask, [&](int l) { warp.lanes(i.destination[0])[l] = result; });
    }
    group.state = Group::Ready;
  }
  barrier = Barrier();
}

// Called when a warp has exited: it no longer holds barriers that wait for the whole block.
void recheck_barriers(Block& block) {
  for (Barrier& barrier : block.barriers)
    if (barrier.arrived && barrier.expected == 0 && barrier.arrived >= live_threads(block))
      complete_barrier(block, barrier);
}

namespace {

// flag: arrive, do not wait; mode: reduction (1 popc, 2 and, 3 or); submode: a thread count is given.
void block_barrier(Warp& w, const Instruction& i, Mask mask) {
  const int lane = std::countr_zero(mask);
  Block& block = *w.block;
  const uint64_t number = w.lanes(i.source[0])[lane];
  if (number > 15) fail(w, i, "barrier", "barrier number " + std::to_string(number) + " is above 15");
  Barrier& barrier = block.barriers[number];
  const int expected = i.submode ? int(w.lanes(i.source[1])[lane]) : 0;
  if (i.submode && (expected <= 0 || expected % kLanes))
    fail(w, i, "barrier",
         "a barrier's thread count must be a multiple of the warp size, not " + std::to_string(expected));
  if (barrier.arrived && barrier.expected != expected)
    fail(w, i, "barrier", "barrier " + std::to_string(number) + " used with two thread counts at once");
  if (!barrier.arrived) {
    barrier.expected = expected;
    barrier.joined.assign(block.warps.size(), 0);
    barrier.proxy_joined.assign(block.warps.size(), 0);
    barrier.instruction = &i;
  }
  if (i.mode) {
    const uint64_t* p = w.lanes(i.source.back());
    for_lanes(mask, [&](int l) {
      const bool bit = (p[l] & 1) != uint64_t(i.negated);
      barrier.count += bit;
      barrier.all &= bit;
      barrier.any |= bit;
    });
  }
  w.release();
  join(barrier.joined, w.seen);
  join(barrier.proxy_joined, w.proxy_seen);
  barrier.arrived += kLanes;
  if (!i.flag) {
    barrier.waiting.push_back(w.index);
    w.group().state = Group::Waiting;
  }
  if (expected && barrier.arrived > expected) fail(w, i, "barrier", "more threads than expected arrived at a barrier");
  if (barrier.arrived >= (expected ? expected : live_threads(block))) complete_barrier(block, barrier);
}

// A warp takes registers only from what others of its block have released: the launch gives all there are.
void set_registers(Warp& w, const Instruction& i, Mask) {
  if (i.register_goal < 24 || i.register_goal > 256 || i.register_goal % 8)
    fail(w, i, "setmaxnreg",
         "registers must be a multiple of 8 from 24 to 256, not " + std::to_string(i.register_goal));
  if (!w.register_count)
    fail(w, i, "setmaxnreg", "needs an entry that says how many threads it is launched with (.maxntid)");
  const int more = i.register_goal - w.register_count;
  if (i.flag ? more < 0 : more > 0)
    fail(w, i, "setmaxnreg",
         i.statement->full_name + " to " + std::to_string(i.register_goal) + " registers from " +
             std::to_string(w.register_count));
  w.block->free_registers -= int64_t(more) * kLanes;
  w.register_count = i.register_goal;
}

void warp_barrier(Warp& w, const Instruction&, Mask) { w.release(); }

void proxy_fence(Warp& w, const Instruction&, Mask) {
  join(w.proxy_seen, w.seen);
  w.proxy_seen[size_t(w.index)] = w.clock;
  // Later writes get a higher clock, but other lanes still need a barrier before they may see earlier ones.
  const uint32_t own = w.seen[size_t(w.index)];
  w.release();
  w.seen[size_t(w.index)] = own;
}

bool decode_barrier(Decoder& d, const Statement& s, Instruction& i) {
  i.category = "barrier";
  if (s.has("warp")) {  // bar.warp.sync mask
    i.sync = Sync::Members;
    d.bind(s, i, 0);
    i.member_mask = i.source.at(0);
    i.run = warp_barrier;
    return true;
  }
  if (s.has("cluster")) return false;
  i.sync = Sync::Live;
  i.flag = s.has("arrive");
  i.mode = s.has("popc") ? 1 : s.has("and") ? 2 : s.has("or") ? 3 : 0;
  if (!i.flag && !s.has("sync") && !s.has("red")) return false;
  d.bind(s, i, i.mode ? 1 : 0);
  i.submode = i.source.size() > (i.mode ? 2u : 1u);
  i.run = block_barrier;
  return true;
}

}  // namespace

bool decode_control(Decoder& d, const Statement& s, Instruction& i) {
  const std::string& op = s.opcode;
  i.category = "control";
  if (op == "bra") {
    i.target = s.operands.at(0).index;
    i.run = branch;
    return s.operands[0].kind == Operand::Label;
  }
  if (op == "ret" || op == "exit") {
    i.run = exit_lanes;
    return true;
  }
  if (op == "trap" || op == "brkpt") {
    i.run = trap;
    return true;
  }
  if (op == "bar" || op == "barrier") return decode_barrier(d, s, i);
  i.category = "fence";
  if (op == "fence" && s.has("proxy") &&
      (s.has("async") || s.has("async::generic") || s.has("async.shared::cta") ||
       s.full_name.rfind("fence.proxy.async", 0) == 0)) {
    i.run = proxy_fence;
    return true;
  }
  if ((op == "membar" || op == "fence") && !s.has("proxy")) {
    i.run = nothing;  // memory is sequentially consistent here; races are found by clocks, which fences do not join
    return true;
  }
  if (op == "setmaxnreg") {
    i.category = "hint";
    i.sync = Sync::Full;
    i.register_goal = int(s.operands.at(0).bits);
    i.flag = s.has("inc");
    i.run = set_registers;
    return i.flag || s.has("dec");
  }
  if (op == "nanosleep" || op == "griddepcontrol" || op == "pmevent") {
    i.category = "hint";
    i.run = nothing;
    return true;
  }
  return false;
}

}  // namespace ptx
