// Hazards of shared memory. An access by warp v tagged with clock t is ordered before what warp w does now iff
// t <= seen_w[v]; barriers join these clocks. Within a warp the same rule holds between lanes: seen_w[w] is what lies
// before the warp's last barrier.
#include <cstring>

#include "error.h"
#include "memory.h"

namespace ptx {
namespace {

constexpr uint32_t kManyLanes = 0xff;

std::string place(size_t byte) { return " at shared address " + std::to_string(int64_t(byte) + kSharedBase); }
std::string thread_name(int thread) { return "thread " + std::to_string(thread); }

}  // namespace

void SharedMemory::reset(int64_t bytes, int warps) {
  warps_ = warps;
  data_.assign(size_t(bytes), 0xff);  // NaN in every float format
  cells_.assign(size_t(bytes), Cell());
  reads_.assign(size_t(bytes) * warps, 0);
}

void SharedMemory::bounds(int64_t offset, int bytes) const {
  if (offset >= kSharedBase && offset + bytes <= kSharedBase + this->bytes() && offset % bytes == 0) return;
  const std::string what = std::to_string(bytes) + " bytes at " + std::to_string(offset) + " of shared memory [" +
                           std::to_string(kSharedBase) + ", " + std::to_string(kSharedBase + this->bytes()) + ")";
  if (offset < kSharedBase || offset + bytes > kSharedBase + this->bytes())
    throw Error("out-of-bounds", "shared access out of bounds: " + what);
  throw Error("misaligned", "misaligned shared access: " + what);
}

void SharedMemory::check(const Who& who, int64_t offset, int bytes, Access kind, const void* stored) {
  bounds(offset, bytes);
  const size_t begin = size_t(offset - kSharedBase);
  if (writes(kind)) {
    const bool same = stored && std::memcmp(stored, data_.data() + begin, size_t(bytes)) == 0;
    for (size_t byte = begin; byte < begin + bytes; ++byte) {
      if (kind == Access::Atomic && !cells_[byte].written)
        throw Error("uninitialised", "atomic on shared memory never written" + place(byte));
      check_write(who, byte, strong(kind), same);
    }
  } else {
    for (size_t byte = begin; byte < begin + bytes; ++byte) check_read(who, byte, strong(kind));
  }
}

void SharedMemory::note_read(const Who& who, size_t byte) {
  uint32_t& read = reads_[byte * warps_ + who.warp];
  const bool another_lane = read >> 8 == who.clock && (read & 0xff) != uint32_t(who.lane);
  read = who.clock << 8 | (another_lane ? kManyLanes : uint32_t(who.lane));
}

void SharedMemory::check_read(const Who& who, size_t byte, bool is_strong) {
  const Cell& cell = cells_[byte];
  const int thread = who.warp * 32 + who.lane;
  if (cell.in_flight)
    throw Error("in-flight", thread_name(thread) + " reads the destination of a copy in flight, issued by " +
                                 thread_name(cell.write_thread) + place(byte));
  if (!cell.written) throw Error("uninitialised", "read of shared memory never written" + place(byte));
  if (cell.barrier) throw Error("mbarrier", "plain access to an mbarrier" + place(byte));
  if (cell.write_thread != thread && cell.write_clock > who.seen[cell.write_thread / 32] &&
      !(cell.atomic && is_strong) && (who.check_lanes || cell.write_thread / 32 != who.warp))
    throw Error("shared-hazard", thread_name(thread) + " reads what " + thread_name(cell.write_thread) +
                                     " wrote, no barrier between," + place(byte));
  note_read(who, byte);
}

void SharedMemory::check_write(const Who& who, size_t byte, bool is_strong, bool same) {
  Cell& cell = cells_[byte];
  const int thread = who.warp * 32 + who.lane;
  if (cell.in_flight)
    throw Error("in-flight", thread_name(thread) + " writes to the destination of a copy in flight, issued by " +
                                 thread_name(cell.write_thread) + place(byte));
  if (cell.tensor_reads)
    throw Error("in-flight", thread_name(thread) + " writes to an operand of a wgmma in flight" + place(byte));
  if (cell.barrier) throw Error("mbarrier", "plain access to an mbarrier" + place(byte));
  // Lanes and warps that write one and the same value harm nobody; Triton's replicated layouts do it.
  if (cell.written && !same && cell.write_thread != thread && cell.write_clock > who.seen[cell.write_thread / 32] &&
      !(cell.atomic && is_strong) && (who.check_lanes || cell.write_thread / 32 != who.warp))
    throw Error("shared-hazard", thread_name(cell.write_thread) + " and " + thread_name(thread) +
                                     " both write, no barrier between," + place(byte));
  const uint32_t* reads = &reads_[byte * warps_];
  for (int warp = 0; warp < warps_; ++warp) {
    if (reads[warp] >> 8 <= who.seen[warp] || same) continue;
    if (warp == who.warp && (!who.check_lanes || (reads[warp] & 0xff) == uint32_t(who.lane))) continue;
    throw Error("shared-hazard", thread_name(thread) + " overwrites what warp " + std::to_string(warp) +
                                     " reads, no barrier between," + place(byte));
  }
  cell.written = true;
  cell.atomic = is_strong;
  cell.write_clock = who.clock;
  cell.write_thread = uint16_t(thread);
}

void SharedMemory::begin_copy(const Who& who, int64_t offset, int bytes) {
  bounds(offset, bytes);
  const size_t begin = size_t(offset - kSharedBase);
  for (size_t byte = begin; byte < begin + bytes; ++byte) {
    check_write(who, byte, false, false);
    cells_[byte].in_flight = true;
  }
}

void SharedMemory::end_copy(const Who& who, int64_t offset, int bytes) {
  const size_t begin = size_t(offset - kSharedBase);
  for (size_t byte = begin; byte < begin + bytes; ++byte) {
    cells_[byte].in_flight = false;
    cells_[byte].write_clock = who.clock;  // from now on, and only for the thread that has waited
  }
}

void SharedMemory::begin_tensor_read(const Who& who, int64_t offset, int bytes, const uint32_t* proxy_seen) {
  bounds(offset, bytes);
  const size_t begin = size_t(offset - kSharedBase);
  for (size_t byte = begin; byte < begin + bytes; ++byte) {
    Cell& cell = cells_[byte];
    check_read(who, byte, false);
    if (cell.write_clock > proxy_seen[cell.write_thread / 32])
      throw Error("proxy-fence", "wgmma reads what " + thread_name(cell.write_thread) +
                                     " wrote, no fence.proxy.async between," + place(byte));
    ++cell.tensor_reads;
  }
}

void SharedMemory::end_tensor_read(const Who& who, int64_t offset, int bytes) {
  const size_t begin = size_t(offset - kSharedBase);
  for (size_t byte = begin; byte < begin + bytes; ++byte) {
    --cells_[byte].tensor_reads;
    note_read(who, byte);
  }
}

void SharedMemory::mark_barrier(int64_t offset, bool is_barrier) {
  for (size_t byte = size_t(offset - kSharedBase); byte < size_t(offset - kSharedBase) + 8; ++byte)
    cells_[byte].barrier = is_barrier;
}

void SharedMemory::check_barrier(const Who& who, int64_t offset) const {
  bounds(offset, 8);
  const Cell& cell = cells_[size_t(offset - kSharedBase)];
  if (!cell.barrier)
    throw Error("mbarrier", "mbarrier used before mbarrier.init" + place(size_t(offset - kSharedBase)));
  if (cell.write_clock > who.seen[cell.write_thread / 32] && cell.write_thread != who.warp * 32 + who.lane)
    throw Error("shared-hazard", "mbarrier used with no barrier after its init by " + thread_name(cell.write_thread));
}

}  // namespace ptx
