// Runs a launch: blocks one after another in a random order, the warps of a block interleaved at random, the lanes of a
// warp together as far as they have not diverged. Diverged lanes run at the lowest program counter first, which
// brings them back together where the branch ends.
#include <algorithm>
#include <numeric>

#include "machine.h"

namespace ptx {

void recheck_barriers(Block& block);

void Warp::release() {
  seen[size_t(index)] = clock;
  ++clock;
}

Who Warp::who(int lane) const { return {block->index, index, lane, clock, seen.data(), launch->check_lanes}; }

std::string describe_thread(const Warp& warp, int lane) {
  const int *threads = warp.launch->threads, *at = warp.block->coordinates, n = warp.thread(lane);
  const auto triple = [](int x, int y, int z) {
    return "(" + std::to_string(x) + ", " + std::to_string(y) + ", " + std::to_string(z) + ")";
  };
  return "thread " + triple(n % threads[0], n / threads[0] % threads[1], n / threads[0] / threads[1]) + " of block " +
         triple(at[0], at[1], at[2]);
}

void fail(const Warp&, const Instruction& i, const std::string& kind, const std::string& message) {
  throw Error(kind, message, i.statement->line);
}

namespace {

class BlockRun {
 public:
  explicit BlockRun(Launch& launch) : launch_(launch), program_(*launch.program) {
    block_.launch = &launch;
    const int threads = launch.block_threads();
    block_.warps.resize(size_t(threads + kLanes - 1) / kLanes);
    block_.local.assign(size_t(program_.local_bytes) * block_.warps.size() * kLanes, 0xff);
    for (size_t k = 0; k < block_.warps.size(); ++k) {
      Warp& w = block_.warps[k];
      w.block = &block_;
      w.launch = &launch;
      w.index = int(k);
      w.existing = threads - int(k) * kLanes >= kLanes ? kAllLanes : (1u << (threads - int(k) * kLanes)) - 1;
      w.registers.assign(size_t(program_.registers) * kLanes, ~uint64_t(0));  // NaN in every format
      for (const auto& [slot, bits] : program_.constants) std::fill_n(w.lanes(slot), kLanes, bits);
    }
  }

  void run(int index) {
    reset(index);
    std::vector<int> runnable;
    while (true) {
      runnable.clear();
      bool all_done = true;
      for (Warp& w : block_.warps) {
        all_done &= w.done();
        if (!w.done() && can_run(w)) runnable.push_back(w.index);
      }
      if (all_done) return;
      if (runnable.empty()) deadlock();
      Warp& w = block_.warps[size_t(runnable[launch_.random() % runnable.size()])];
      for (uint64_t steps = 1 + launch_.random() % 256; steps > 0 && step(w); --steps) {
      }
    }
  }

 private:
  void reset(int index) {
    block_.index = index;
    block_.coordinates[0] = index % launch_.grid[0];
    block_.coordinates[1] = index / launch_.grid[0] % launch_.grid[1];
    block_.coordinates[2] = index / launch_.grid[0] / launch_.grid[1];
    for (Barrier& barrier : block_.barriers) barrier = Barrier();
    block_.mbarriers.clear();
    block_.free_registers = 0;
    idle_ = 0;
    const int64_t shared = program_.dynamic_base - kSharedBase + launch_.dynamic_shared;
    block_.shared.reset(shared, int(block_.warps.size()));
    for (Warp& w : block_.warps) {
      w.exited = 0;
      w.groups.assign(1, Group{0, w.existing, Group::Ready});
      w.current = 0;
      w.clock = 1;
      w.seen.assign(block_.warps.size(), 0);
      w.proxy_seen.assign(block_.warps.size(), 0);
      w.copies.assign(kLanes, CopyGroups());
      w.wgmma_committed.clear();
      w.wgmma_open = WgmmaGroup();
      w.busy.assign(size_t(program_.registers), 0);
      w.dirty.assign(size_t(program_.registers), 1);  // the first wgmma needs a fence before it
      w.busy_count = 0;
      w.register_count = registers_at_launch();
      for (const auto& [slot, name] : program_.specials)
        for (int l = 0; l < kLanes; ++l) w.lanes(slot)[l] = special(w, name, l);
    }
  }

  // Of a thread, where the entry bounds its threads: what ptxas may use, in the units in which they are given out.
  int registers_at_launch() const {
    const Entry& entry = *program_.entry;
    const int* bound = entry.required_threads[0] ? entry.required_threads : entry.max_threads;
    if (entry.max_registers) return entry.max_registers / 8 * 8;
    if (!bound[0]) return 0;
    const int warps = (bound[0] * bound[1] * bound[2] + kLanes - 1) / kLanes;
    return std::min(65536 / (entry.min_ctas * warps * kLanes), 256) / 8 * 8;
  }

  uint32_t special(const Warp& w, const std::string& name, int lane) const {
    const int* t = launch_.threads;
    const int n = w.thread(lane), axis = name.back() - 'x';
    const int thread[3] = {n % t[0], n / t[0] % t[1], n / t[0] / t[1]};
    if (name.rfind("%tid.", 0) == 0) return uint32_t(thread[axis]);
    if (name.rfind("%ntid.", 0) == 0) return uint32_t(t[axis]);
    if (name.rfind("%ctaid.", 0) == 0) return uint32_t(block_.coordinates[axis]);
    if (name.rfind("%nctaid.", 0) == 0) return uint32_t(launch_.grid[axis]);
    if (name == "%laneid") return uint32_t(lane);
    if (name == "%warpid") return uint32_t(w.index);
    if (name == "%nwarpid") return uint32_t(block_.warps.size());
    if (name == "%lanemask_eq") return 1u << lane;
    if (name == "%lanemask_lt") return (1u << lane) - 1;
    if (name == "%lanemask_le") return (2u << lane) - 1;
    if (name == "%lanemask_gt") return ~((2u << lane) - 1);
    if (name == "%lanemask_ge") return ~((1u << lane) - 1);
    if (name == "%dynamic_smem_size") return uint32_t(launch_.dynamic_shared);
    if (name == "%total_smem_size") return uint32_t(block_.shared.bytes());
    if (name == "%cluster_nctarank") return 1;
    return 0;  // %cluster_ctarank and %cluster_ctaid: clusters of one block
  }

  static bool can_run(const Warp& w) {
    for (const Group& group : w.groups)
      if (group.state != Group::Waiting) return true;
    return false;
  }

  [[noreturn]] void deadlock() {
    for (const Barrier& barrier : block_.barriers)
      if (barrier.arrived) {
        int waiting = int(barrier.waiting.size());
        throw Error("barrier",
                    "deadlock: " + std::to_string(barrier.arrived) + " threads arrived at a barrier for " +
                        (barrier.expected ? std::to_string(barrier.expected) : "all") + ", " + std::to_string(waiting) +
                        " warps wait for ever",
                    barrier.instruction->statement->line);
      }
    throw Error("barrier", "deadlock");
  }

  // Chooses the lanes that execute next; false where none can.
  void choose_group(Warp& w) {
    auto& groups = w.groups;
    groups.erase(std::remove_if(groups.begin(), groups.end(), [](const Group& g) { return !g.mask; }), groups.end());
    for (size_t a = 0; a < groups.size(); ++a)
      for (size_t b = groups.size() - 1; b > a; --b)
        if (groups[a].pc == groups[b].pc && groups[a].state != Group::Waiting && groups[b].state != Group::Waiting) {
          groups[a].mask |= groups[b].mask;
          groups[a].state = Group::Ready;  // one that was parked looks again whether all it waits for are here
          groups.erase(groups.begin() + long(b));
        }
    size_t best = groups.size();
    for (size_t k = 0; k < groups.size(); ++k)
      if (groups[k].state == Group::Ready && (best == groups.size() || groups[k].pc < groups[best].pc)) best = k;
    if (best == groups.size()) diverged(w);
    // Lanes that spin must not starve the lanes they wait for: now and then the highest counter has its turn.
    if (groups.size() > 1 && ++w.steps_with_many_groups % 4096 >= 4096 - 64) {
      for (size_t k = 0; k < groups.size(); ++k)
        if (groups[k].state == Group::Ready && groups[k].pc > groups[best].pc) best = k;
    }
    w.current = best;
  }

  [[noreturn]] void diverged(Warp& w) {
    const Group& first = w.groups[0];
    const Instruction& i = program_.code[size_t(first.pc)];
    launch_.random();
    std::string others;
    for (size_t k = 1; k < w.groups.size(); ++k)
      others += (k > 1 ? ", " : "; other lanes wait at PTX line ") +
                std::to_string(program_.code[size_t(w.groups[k].pc)].statement->line);
    throw located(Error("divergence", "'" + i.statement->full_name + "' of warp " + std::to_string(w.index) +
                                          " is reached by lanes " + hex(first.mask) + " only" + others +
                                          (w.exited ? "; lanes " + hex(w.exited) + " have exited" : "")),
                  i);
  }

  static std::string hex(Mask mask) {
    char text[16];
    std::snprintf(text, sizeof text, "0x%08x", mask);
    return text;
  }

  // Lanes of one group at a .sync instruction: those whose companions are all there. The others are parked.
  bool companions_present(Warp& w, const Instruction& i, Mask lanes) {
    if (i.sync == Sync::Live) return !(w.live() & ~lanes);
    if (i.sync == Sync::Full) return lanes == kAllLanes;
    for (Mask left = lanes; left;) {
      const int lane = std::countr_zero(left);
      const Mask members = Mask(w.lanes(i.member_mask)[lane]);
      if (!(members >> lane & 1))
        fail(w, i, "divergence",
             describe_thread(w, lane) + " executes '" + i.statement->full_name + "' but is not in its member mask " +
                 hex(members));
      if (members & w.existing & ~lanes) return false;
      left &= ~members;
    }
    return true;
  }

  // One instruction of one warp. False: the warp cannot go on for now.
  bool step(Warp& w) {
    if (w.groups.size() != 1 || w.groups[0].state != Group::Ready) {
      choose_group(w);
    } else {
      w.current = 0;
    }
    Group& group = w.group();
    if (size_t(group.pc) >= program_.code.size()) {  // past the last instruction: an implicit exit
      w.exited |= group.mask;
      group.mask = 0;
      return leave(w);
    }
    const Instruction& i = program_.code[size_t(group.pc)];
    launch_at_ = &i;
    Mask lanes = group.mask;
    if (i.guard >= 0) {
      const uint64_t* p = w.lanes(i.guard);
      for_lanes(group.mask, [&](int l) {
        if ((p[l] & 1) == uint64_t(i.guard_negated)) lanes &= ~(1u << l);
      });
    }
    if (i.sync != Sync::None && lanes && !companions_present(w, i, lanes)) {
      const Group skipping{group.pc + 1, group.mask & ~lanes, Group::Ready};
      group.mask = lanes;
      group.state = Group::Parked;
      if (skipping.mask) w.groups.push_back(skipping);
      return true;
    }
    if (i.register_goal > w.register_count && i.flag && w.register_count &&
        int64_t(i.register_goal - w.register_count) * kLanes > block_.free_registers) {
      spin();
      return false;  // until another warp has released as many
    }
    if (w.busy_count) check_registers(w, i);
    const size_t at = size_t(group.pc);
    ++group.pc;
    ++launch_.counters.executed[at];
    launch_.counters.lanes[at] += uint64_t(std::popcount(lanes));
    if (++steps_ > launch_.step_limit)
      throw located(Error("step-limit", "the launch ran more instructions than its limit: an endless loop?"), i);
    if (i.polls) {
      spin();
    } else if (i.target < 0) {
      idle_ = 0;
    }
    if (lanes) {
      if (i.sync == Sync::Members) {
        run_members(w, i, lanes);
      } else {
        i.run(w, i, lanes);
      }
    }
    if (program_.uses_wgmma && !i.is_wgmma) {  // reads too: wgmma.fence orders every access
      for (const int slot : i.source) w.dirty[size_t(slot)] = 1;
      for (const int slot : i.destination) w.dirty[size_t(slot)] = 1;
    }
    if (!w.group().mask) return leave(w);
    return w.groups[0].state != Group::Waiting;
  }

  // Warps that spin on an mbarrier or wait for registers do nothing else, not even for one another.
  void spin() {
    if (++idle_ > 200'000)
      throw Error("mbarrier", "deadlock: every warp that is left waits for an mbarrier or for registers");
  }

  // Different halves of a warp may use different member masks at one instruction.
  static void run_members(Warp& w, const Instruction& i, Mask lanes) {
    while (lanes) {
      const Mask members = Mask(w.lanes(i.member_mask)[std::countr_zero(lanes)]) & lanes;
      i.run(w, i, members);
      lanes &= ~members;
    }
  }

  void check_registers(Warp& w, const Instruction& i) const {
    if (i.is_wgmma) return;
    for (const int slot : i.source)
      if (w.busy[size_t(slot)] == 2) fail(w, i, "in-flight", "read of a register that a wgmma in flight writes");
    for (const int slot : i.destination)
      if (w.busy[size_t(slot)]) fail(w, i, "in-flight", "write to a register that a wgmma in flight uses");
  }

  bool leave(Warp& w) {
    if (w.done()) {
      recheck_barriers(block_);
      return false;
    }
    return true;
  }

 public:
  Error located(Error error, const Instruction& i) const {
    if (!error.line) error.line = i.statement->line;
    const auto file = launch_.module->files.find(i.statement->file);
    if (error.source.empty() && file != launch_.module->files.end())
      error.source = file->second + ":" + std::to_string(i.statement->source_line);
    return error;
  }
  const Instruction* launch_at_ = nullptr;

 private:
  Launch& launch_;
  const Program& program_;
  Block block_;
  uint64_t steps_ = 0, idle_ = 0;
};

}  // namespace

void run_launch(Launch& launch) {
  launch.random.seed(launch.seed);
  const size_t size = launch.program->code.size();
  launch.counters = Counters();
  launch.counters.executed.assign(size, 0);
  launch.counters.lanes.assign(size, 0);
  launch.counters.bank_conflicts.assign(size, 0);
  std::vector<int> order(size_t(launch.grid[0]) * launch.grid[1] * launch.grid[2]);
  std::iota(order.begin(), order.end(), 0);
  for (size_t k = order.size(); k > 1; --k) std::swap(order[k - 1], order[launch.random() % k]);
  BlockRun run(launch);
  try {
    for (const int block : order) run.run(block);
  } catch (const Error& error) {
    throw run.launch_at_ ? run.located(error, *run.launch_at_) : error;
  }
}

}  // namespace ptx
