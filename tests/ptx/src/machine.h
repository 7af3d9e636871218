// The state of a launch: decoded instructions, warps with their registers and clocks, thread blocks.
#pragma once
#include <bit>
#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

#include "error.h"
#include "memory.h"
#include "numeric.h"
#include "syntax.h"

namespace ptx {

using Mask = uint32_t;  // one bit per lane
constexpr int kLanes = 32;
constexpr Mask kAllLanes = ~Mask(0);

struct Warp;
struct Instruction;
using Handler = void (*)(Warp&, const Instruction&, Mask);

enum class Sync : uint8_t {
  None,
  Members,  // the lanes named by a mask operand must arrive together (shfl.sync)
  Live,     // every lane of the warp that has not exited (bar.sync)
  Full,     // all 32 lanes (mma.sync)
};

struct Instruction {
  Handler run = nullptr;
  std::vector<int> destination, source;  // register slots; immediates live in slots too
  int guard = -1;
  bool guard_negated = false;
  Sync sync = Sync::None;
  int member_mask = -1;                   // register slot
  int64_t offset = 0, second_offset = 0;  // of addresses
  int target = -1;                        // of a branch
  Space space = Space::Generic;
  int width = 0;  // bytes of one element in memory
  int mode = 0, submode = 0;
  Rounding rounding = Rounding::Nearest;
  bool flush_subnormals = false, saturate = false, flag = false, negated = false;
  bool is_wgmma = false;
  bool polls = false;     // changes nothing but whether its warp goes on: a warp that spins runs it again and again
  int register_goal = 0;  // of setmaxnreg
  Access access = Access::Read;
  const Statement* statement = nullptr;
  const char* category = "other";  // of the counters
};

struct Program {
  const Entry* entry = nullptr;
  std::vector<Instruction> code;
  int registers = 0;                                  // slots, constants included
  std::vector<std::pair<int, uint64_t>> constants;    // slot, value
  std::vector<std::pair<int, std::string>> specials;  // slot, name
  int64_t shared_bytes = 0;                           // static, from kSharedBase
  int64_t dynamic_base = 0;                           // where dynamic shared memory begins
  int64_t local_bytes = 0;
  int carry = -1;  // slot of the carry flag of add.cc
  bool uses_wgmma = false;
  std::vector<std::pair<std::string, int64_t>> shared_names;  // ascending offsets
};

struct Counters {
  std::vector<uint64_t> executed, lanes;  // per instruction: warps, threads
  uint64_t global_load_bytes = 0, global_store_bytes = 0, global_load_sectors = 0, global_store_sectors = 0;
  uint64_t shared_wavefronts = 0, shared_ideal_wavefronts = 0;
  std::vector<uint64_t> bank_conflicts;  // per instruction
  uint64_t tensor_operations = 0;        // multiply-adds times two
};

using Clock = std::vector<uint32_t>;  // one entry per warp of the block
inline void join(Clock& into, const Clock& other) {
  for (size_t i = 0; i < into.size(); ++i) into[i] = std::max(into[i], other[i]);
}

struct Group {  // lanes at one program counter
  int pc = 0;
  Mask mask = 0;
  enum State : uint8_t { Ready, Parked, Waiting } state = Ready;
};

struct AsyncCopy {  // destination of a cp.async
  int64_t offset;
  int bytes;
};

struct CopyGroups {  // of one thread: those committed, oldest first, and the open one
  std::vector<std::vector<AsyncCopy>> committed;
  std::vector<AsyncCopy> open;
};

struct WgmmaGroup {
  std::vector<int> accumulators;  // register slots
  std::vector<int64_t> units;     // 16-byte units of shared memory that are read
};

struct Block;
struct Launch;

struct Warp {
  Block* block = nullptr;
  Launch* launch = nullptr;
  int index = 0;
  Mask existing = 0, exited = 0;
  std::vector<Group> groups;
  size_t current = 0;               // the group that executes
  std::vector<uint64_t> registers;  // [slot][lane]
  uint64_t steps_with_many_groups = 0;

  uint32_t clock = 1;  // tags of this warp's accesses; grows at every release
  Clock seen;          // seen[v]: accesses of warp v tagged at most this are ordered before what this warp does now
  Clock proxy_seen;    // the same for generic-proxy writes made visible to the async proxy

  std::vector<CopyGroups> copies;  // per lane
  std::vector<WgmmaGroup> wgmma_committed;
  WgmmaGroup wgmma_open;
  std::vector<uint8_t> busy, dirty;  // registers in flight; accessed since the last wgmma.fence
  int busy_count = 0;
  int register_count = 0;  // of a thread: what the warp was launched with, or setmaxnreg's last; 0: not known

  uint64_t* lanes(int slot) { return registers.data() + size_t(slot) * kLanes; }
  int thread(int lane) const { return index * kLanes + lane; }
  Mask live() const { return existing & ~exited; }
  bool done() const { return live() == 0; }
  Group& group() { return groups[current]; }
  Who who(int lane) const;
  void release();  // what this warp did so far gets tags below those of what follows
};

struct Barrier {
  int arrived = 0, expected = 0;
  Clock joined, proxy_joined;
  std::vector<int> waiting;
  int64_t count = 0;
  bool all = true, any = false;
  const Instruction* instruction = nullptr;
};

struct MBarrier {
  int64_t expected = 0, pending = 0;
  uint64_t phase = 0;
  Clock joined, completed, proxy_joined, proxy_completed;
};

struct Block {
  Launch* launch = nullptr;
  int index = 0, coordinates[3] = {0, 0, 0};
  std::vector<Warp> warps;
  Barrier barriers[16];
  std::unordered_map<int64_t, MBarrier> mbarriers;
  int64_t free_registers = 0;  // released by setmaxnreg.dec
  SharedMemory shared;
  std::vector<uint8_t> local;
};

struct Launch {
  const Module* module = nullptr;
  const Program* program = nullptr;
  GlobalMemory* global = nullptr;
  int grid[3], threads[3];
  int64_t dynamic_shared = 0;
  std::vector<uint8_t> parameters;
  uint64_t seed = 0, step_limit = 0;
  bool check_lanes = true;  // hazards between lanes of one warp too
  bool serialised_accumulators = false;
  Counters counters;
  std::mt19937_64 random;
  int block_threads() const { return threads[0] * threads[1] * threads[2]; }
};

void run_launch(Launch& launch);

// Where a lane's operand of a memory instruction lies; all checks done, sectors and conflicts not counted.
uint8_t* access(Warp& warp, const Instruction& i, int lane, uint64_t address, int bytes, Access kind,
                const void* stored = nullptr);

[[noreturn]] void fail(const Warp& warp, const Instruction& i, const std::string& kind, const std::string& message);
std::string describe_thread(const Warp& warp, int lane);

template <class F>
inline void for_lanes(Mask mask, F body) {
  if (mask == kAllLanes) {
    for (int lane = 0; lane < kLanes; ++lane) body(lane);
  } else {
    for (; mask; mask &= mask - 1) body(std::countr_zero(mask));
  }
}

}  // namespace ptx
