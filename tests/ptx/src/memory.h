// Global and shared memory with the shadow state of the checker.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace ptx {

enum class Space : uint8_t { Generic, Global, Shared, Local, Param, Const };
enum class Access : uint8_t { Read, Write, StrongRead, StrongWrite, Atomic, ReadOnly /* ld.global.nc */ };

inline bool writes(Access a) { return a == Access::Write || a == Access::StrongWrite || a == Access::Atomic; }
inline bool strong(Access a) { return a == Access::StrongRead || a == Access::StrongWrite || a == Access::Atomic; }

// Generic addresses outside of host memory. Addresses within shared memory begin above 0, so that a null pointer is out
// of bounds, and at 1024, as on a Hopper GPU, where wgmma's swizzle depends on the absolute address.
constexpr uint64_t kSharedWindow = uint64_t(1) << 60, kLocalWindow = uint64_t(1) << 61,
                   kParamWindow = uint64_t(3) << 60;
constexpr int64_t kSharedBase = 1024;

struct Who {  // the access to be checked
  int block, warp, lane;
  uint32_t clock;
  const uint32_t* seen;  // of the warp
  bool check_lanes;
};

// State of a byte of a tensor's storage, shared with Python.
enum : uint8_t { kNotAddressable = 0, kWritten = 1, kNeverWritten = 2 };

struct GlobalCell {                     // of one element
  int write_block = 0, read_block = 0;  // plus one; all zero bytes: never accessed
  uint32_t write_clock = 0, read_clock = 0;
  uint32_t read_warps = 0;
  int16_t write_thread = 0;
  bool write_atomic = false, many_read_blocks = false, read_only_loads = false, read_strong = false;
};

struct Region {
  std::string name;
  uint64_t base = 0, bytes = 0;
  uint8_t* state = nullptr;
  int granule = 1;  // bytes of an element
  std::vector<uint8_t> own_state;
  GlobalCell* cells = nullptr;
};

class GlobalMemory {
 public:
  ~GlobalMemory();
  void add(std::string name, uint64_t base, uint64_t bytes, uint8_t* state, int granule);
  // Names of the tensors that lie in a region, for messages.
  void name_range(std::string name, uint64_t begin, uint64_t end);
  std::string tensor_at(uint64_t address) const;

  // Throws what is wrong with the access, without a place.
  void check(const Who& who, uint64_t address, int bytes, Access kind, const void* stored);

 private:
  Region* find(uint64_t address, int bytes);
  void check_read(const Who& who, GlobalCell& cell, Access kind, uint64_t address);
  void check_write(const Who& who, GlobalCell& cell, Access kind, uint64_t address, bool same);

  struct Range {
    std::string name;
    uint64_t begin, end;
  };
  std::vector<Region> regions_;
  std::vector<Range> ranges_;
  size_t last_ = 0;
};

class SharedMemory {
 public:
  void reset(int64_t bytes, int warps);
  int64_t bytes() const { return int64_t(data_.size()); }
  uint8_t* at(int64_t offset) { return data_.data() + offset - kSharedBase; }

  void check(const Who& who, int64_t offset, int bytes, Access kind, const void* stored);
  void bounds(int64_t offset, int bytes) const;
  // A copy in flight: nobody may touch its destination until the issuing thread has waited.
  void begin_copy(const Who& who, int64_t offset, int bytes);
  void end_copy(const Who& who, int64_t offset, int bytes);
  // A read by the tensor cores in flight: nobody may write.
  void begin_tensor_read(const Who& who, int64_t offset, int bytes, const uint32_t* proxy_seen);
  void end_tensor_read(const Who& who, int64_t offset, int bytes);
  void mark_barrier(int64_t offset, bool is_barrier);
  void check_barrier(const Who& who, int64_t offset) const;

 private:
  struct Cell {
    uint32_t write_clock = 0;
    uint16_t write_thread = 0;
    bool written = false, in_flight = false, atomic = false, barrier = false;
    uint16_t tensor_reads = 0;
  };
  void check_read(const Who& who, size_t byte, bool is_strong);
  void check_write(const Who& who, size_t byte, bool is_strong, bool same);
  void note_read(const Who& who, size_t byte);

  std::vector<uint8_t> data_;
  std::vector<Cell> cells_;
  std::vector<uint32_t> reads_;  // [byte][warp]: clock << 8 | lane, kManyLanes for more than one
  int warps_ = 0;
};

}  // namespace ptx
