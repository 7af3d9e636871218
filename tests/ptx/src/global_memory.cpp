// Bounds, initialisation and races of global memory. A race: two accesses to one element, at least one writes, not both
// atomic (or both strong), and no barrier orders them. Nothing orders two thread blocks of a launch.
#include <sys/mman.h>

#include <cstring>

#include "error.h"
#include "memory.h"

namespace ptx {
namespace {

std::string thread_name(int thread) { return "thread " + std::to_string(thread); }

}  // namespace

GlobalMemory::~GlobalMemory() {
  for (Region& region : regions_)
    if (region.cells) munmap(region.cells, region.bytes / region.granule * sizeof(GlobalCell) + sizeof(GlobalCell));
}

void GlobalMemory::add(std::string name, uint64_t base, uint64_t bytes, uint8_t* state, int granule) {
  Region region;
  region.name = std::move(name);
  region.base = base;
  region.bytes = bytes;
  region.granule = granule;
  if (!state) {
    region.own_state.assign(bytes, kWritten);
    state = region.own_state.data();
  }
  region.state = state;
  // Zero pages cost nothing until they are touched, so a cell must be "never accessed" when all its bytes are zero:
  // blocks are stored plus one.
  const size_t size = bytes / granule * sizeof(GlobalCell) + sizeof(GlobalCell);
  void* cells = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (cells == MAP_FAILED) throw Error("launch", "no memory for the shadow of " + region.name);
  region.cells = static_cast<GlobalCell*>(cells);
  regions_.push_back(std::move(region));
}

void GlobalMemory::name_range(std::string name, uint64_t begin, uint64_t end) {
  ranges_.push_back({std::move(name), begin, end});
}

std::string GlobalMemory::tensor_at(uint64_t address) const {
  const Range* nearest = nullptr;
  uint64_t distance = 1 << 20;
  for (const Range& range : ranges_) {
    if (address >= range.begin && address < range.end) return range.name;
    const uint64_t gap = address < range.begin ? range.begin - address : address - range.end;
    if (gap < distance) {
      distance = gap;
      nearest = &range;
    }
  }
  return nearest ? nearest->name : "";
}

Region* GlobalMemory::find(uint64_t address, int bytes) {
  const auto holds = [&](const Region& r) { return address >= r.base && address + bytes <= r.base + r.bytes; };
  if (last_ < regions_.size() && holds(regions_[last_])) return &regions_[last_];
  for (size_t i = 0; i < regions_.size(); ++i)
    if (holds(regions_[i])) return &regions_[last_ = i];
  return nullptr;
}

void GlobalMemory::check(const Who& who, uint64_t address, int bytes, Access kind, const void* stored) {
  const auto describe = [&] {
    std::string text = std::to_string(bytes) + " bytes at ";
    const std::string tensor = tensor_at(address);
    for (const Range& range : ranges_)
      if (range.name == tensor)
        return text + "byte " + std::to_string(int64_t(address - range.begin)) + " of '" + tensor + "' (" +
               std::to_string(range.end - range.begin) + " bytes)";
    return text + "global address " + std::to_string(address) + ", near no tensor";
  };
  if (address % uint64_t(bytes)) throw Error("misaligned", "misaligned global access: " + describe());
  Region* region = find(address, bytes);
  if (!region) throw Error("out-of-bounds", "global access out of bounds: " + describe());
  const uint64_t offset = address - region->base;
  uint8_t* state = region->state + offset;
  for (int i = 0; i < bytes; ++i) {
    if (state[i] == kNotAddressable) throw Error("out-of-bounds", "global access out of bounds: " + describe());
    if (state[i] == kNeverWritten && kind != Access::Write && kind != Access::StrongWrite)
      throw Error("uninitialised", "read of global memory never written: " + describe());
  }
  const uint64_t first = offset / region->granule, last = (offset + bytes - 1) / region->granule;
  if (writes(kind)) {
    const bool same = stored && std::memcmp(stored, reinterpret_cast<const void*>(address), size_t(bytes)) == 0;
    for (uint64_t i = first; i <= last; ++i) check_write(who, region->cells[i], kind, address, same);
    std::memset(state, kWritten, size_t(bytes));
  } else {
    for (uint64_t i = first; i <= last; ++i) check_read(who, region->cells[i], kind, address);
  }
}

void GlobalMemory::check_read(const Who& who, GlobalCell& cell, Access kind, uint64_t address) {
  const int block = who.block + 1, thread = who.warp * 32 + who.lane;
  if (cell.write_block > 0) {
    if (kind == Access::ReadOnly)
      throw Error("read-only", "ld.global.nc of '" + tensor_at(address) + "', which this launch writes");
    const bool both_strong = cell.write_atomic && strong(kind);
    if (cell.write_block != block) {
      if (!both_strong)
        throw Error("global-race", "block " + std::to_string(who.block) + " reads an element of '" +
                                       tensor_at(address) + "' that block " + std::to_string(cell.write_block - 1) +
                                       " writes");
    } else if (cell.write_thread != thread && !both_strong && cell.write_clock > who.seen[cell.write_thread / 32] &&
               (who.check_lanes || cell.write_thread / 32 != who.warp)) {
      throw Error("global-race", thread_name(thread) + " reads an element of '" + tensor_at(address) + "' that " +
                                     thread_name(cell.write_thread) + " of the same block wrote, no barrier between");
    }
  }
  cell.read_only_loads |= kind == Access::ReadOnly;
  cell.read_strong = strong(kind);
  if (cell.read_block != 0 && cell.read_block != block) cell.many_read_blocks = true;
  // One clock for all readers since the last barrier; readers ordered before this one need not be remembered.
  bool ordered = cell.read_block != block;
  if (!ordered) {
    ordered = true;
    for (uint32_t warps = cell.read_warps; warps; warps &= warps - 1)
      if (cell.read_clock > who.seen[__builtin_ctz(warps)]) ordered = false;
  }
  cell.read_block = block;
  cell.read_clock = ordered ? who.clock : std::min(cell.read_clock, who.clock);
  cell.read_warps = (ordered ? 0 : cell.read_warps) | (1u << who.warp);
}

void GlobalMemory::check_write(const Who& who, GlobalCell& cell, Access kind, uint64_t address, bool same) {
  const int block = who.block + 1, thread = who.warp * 32 + who.lane;
  const auto race = [&](const std::string& text) {
    return Error("global-race", text + " an element of '" + tensor_at(address) + "'");
  };
  if (cell.read_only_loads)
    throw Error("read-only", "write to '" + tensor_at(address) + "', which this launch reads with ld.global.nc");
  const bool both_strong_writes = cell.write_block > 0 && cell.write_atomic && strong(kind);
  if (cell.write_block > 0 && !both_strong_writes) {
    if (cell.write_block != block)
      throw race("blocks " + std::to_string(cell.write_block - 1) + " and " + std::to_string(who.block) +
                 " both write");
    if (cell.write_thread != thread && !same && cell.write_clock > who.seen[cell.write_thread / 32] &&
        (who.check_lanes || cell.write_thread / 32 != who.warp))
      throw race(thread_name(cell.write_thread) + " and " + thread_name(thread) +
                 " of one block, no barrier between, both write");
  }
  if (cell.read_block > 0 && !(cell.read_strong && strong(kind))) {
    if (cell.many_read_blocks || cell.read_block != block)
      throw race("block " + std::to_string(who.block) + " writes, and another block reads,");
    for (uint32_t warps = cell.read_warps; warps; warps &= warps - 1) {
      const int reader = __builtin_ctz(warps);
      if (reader != who.warp && cell.read_clock > who.seen[reader])
        throw race(thread_name(thread) + " writes, and warp " + std::to_string(reader) + " reads, no barrier between,");
    }
  }
  cell.write_block = block;
  cell.write_clock = who.clock;
  cell.write_thread = int16_t(thread);
  cell.write_atomic = strong(kind);
}

}  // namespace ptx
