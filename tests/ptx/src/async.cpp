// cp.async and mbarrier. A copy happens at issue, but its destination stays in flight until the thread has waited.
#include <algorithm>

#include "counting.h"
#include "decode.h"

namespace ptx {
namespace {

// source: destination address, source address, size [, source size or ignore predicate]; flag: that is a predicate.
void copy(Warp& w, const Instruction& i, Mask mask) {
  const uint64_t *to = w.lanes(i.source[0]), *from = w.lanes(i.source[1]);
  const int bytes = i.width;
  uint64_t destinations[kLanes], sources[kLanes];
  Mask reads = 0;
  for_lanes(mask, [&](int l) {
    destinations[l] = to[l] + uint64_t(i.offset);
    sources[l] = from[l] + uint64_t(i.second_offset);
    int used = bytes;
    if (i.source.size() > 2) {
      const uint32_t option = uint32_t(w.lanes(i.source[2])[l]);
      used = i.flag ? (option & 1 ? 0 : bytes) : int(std::min(option, uint32_t(bytes)));
    }
    uint8_t data[16] = {};
    if (used > 0) {
      // The hardware needs the full alignment even where it reads less.
      if (sources[l] % uint64_t(bytes)) fail(w, i, "misaligned", "misaligned source of cp.async");
      Instruction load = i;
      load.space = Space::Global;
      for (int at = 0; at < used;) {  // the checker wants power-of-two pieces
        int piece = bytes;
        while (piece > used - at || at % piece) piece /= 2;
        std::memcpy(data + at, access(w, load, l, sources[l] + at, piece, Access::Read), size_t(piece));
        at += piece;
      }
      reads |= 1u << l;
    }
    w.block->shared.begin_copy(w.who(l), int64_t(destinations[l]), bytes);
    std::memcpy(w.block->shared.at(int64_t(destinations[l])), data, size_t(bytes));
    w.copies[size_t(l)].open.push_back({int64_t(destinations[l]), bytes});
  });
  if (reads) count_global(w, sources, reads, bytes, false);
  if (mask) count_shared(w, i, destinations, mask, bytes);
}

void land(Warp& w, int lane, const std::vector<AsyncCopy>& copies) {
  for (const AsyncCopy& c : copies) w.block->shared.end_copy(w.who(lane), c.offset, c.bytes);
}

void commit(Warp& w, const Instruction&, Mask mask) {
  for_lanes(mask, [&](int l) {
    CopyGroups& groups = w.copies[size_t(l)];
    groups.committed.push_back(std::move(groups.open));
    groups.open.clear();
  });
}

void wait(Warp& w, const Instruction& i, Mask mask) {  // flag: all, uncommitted ones too
  for_lanes(mask, [&](int l) {
    CopyGroups& groups = w.copies[size_t(l)];
    const size_t keep = i.flag ? 0 : w.lanes(i.source[0])[l];
    while (groups.committed.size() > keep) {
      land(w, l, groups.committed.front());
      groups.committed.erase(groups.committed.begin());
    }
    if (i.flag) {
      land(w, l, groups.open);
      groups.open.clear();
    }
  });
}

MBarrier& find_barrier(Warp& w, const Instruction& i, int lane, int64_t address) {
  w.block->shared.check_barrier(w.who(lane), address);
  return w.block->mbarriers[address];
}

int64_t barrier_address(Warp& w, const Instruction& i, int lane) {
  const uint64_t address = w.lanes(i.source[0])[lane] + uint64_t(i.offset);
  return int64_t(address & ~kSharedWindow);
}

void initialise(Warp& w, const Instruction& i, Mask mask) {
  for_lanes(mask, [&](int l) {
    const int64_t address = barrier_address(w, i, l);
    Instruction store = i;
    store.space = Space::Shared;
    if (w.block->mbarriers.count(address)) w.block->shared.mark_barrier(address, false);
    uint64_t bits = w.lanes(i.source[1])[l];
    std::memcpy(access(w, store, l, uint64_t(address), 8, Access::Write, &bits), &bits, 8);
    w.block->shared.mark_barrier(address, true);
    MBarrier barrier;
    barrier.expected = barrier.pending = int64_t(bits & 0xffffffff);
    for (Clock* clock : {&barrier.joined, &barrier.completed, &barrier.proxy_joined, &barrier.proxy_completed})
      clock->assign(w.block->warps.size(), 0);
    w.block->mbarriers[address] = barrier;
  });
}

void invalidate(Warp& w, const Instruction& i, Mask mask) {
  for_lanes(mask, [&](int l) {
    const int64_t address = barrier_address(w, i, l);
    find_barrier(w, i, l, address);
    w.block->shared.mark_barrier(address, false);
    w.block->mbarriers.erase(address);
  });
}

void arrive_once(Warp& w, const Instruction& i, MBarrier& barrier, int64_t count) {
  join(barrier.joined, w.seen);
  join(barrier.proxy_joined, w.proxy_seen);
  barrier.pending -= count;
  if (barrier.pending < 0) fail(w, i, "mbarrier", "more arrivals at an mbarrier than it expects");
  if (barrier.pending == 0) {
    barrier.completed = barrier.joined;
    barrier.proxy_completed = barrier.proxy_joined;
    barrier.pending = barrier.expected;
    ++barrier.phase;
  }
}

// mode 1: cp.async.mbarrier.arrive, which stands for the completion of this thread's earlier copies; flag: .noinc.
void arrive(Warp& w, const Instruction& i, Mask mask) {
  if (!mask) return;
  if (i.mode) {
    for_lanes(mask, [&](int l) {
      CopyGroups& groups = w.copies[size_t(l)];
      for (const auto& group : groups.committed) land(w, l, group);
      land(w, l, groups.open);
      groups = CopyGroups();
    });
  }
  w.release();
  for_lanes(mask, [&](int l) {
    MBarrier& barrier = find_barrier(w, i, l, barrier_address(w, i, l));
    const uint64_t phase = barrier.phase;
    if (i.mode && !i.flag) ++barrier.pending;
    arrive_once(w, i, barrier, i.source.size() > 1 ? int64_t(w.lanes(i.source[1])[l]) : 1);
    if (!i.destination.empty()) w.lanes(i.destination[0])[l] = phase;
  });
}

void test(Warp& w, const Instruction& i, Mask mask) {  // flag: by parity
  for_lanes(mask, [&](int l) {
    MBarrier& barrier = find_barrier(w, i, l, barrier_address(w, i, l));
    const uint64_t waited = w.lanes(i.source[1])[l];
    const bool done = i.flag ? (barrier.phase & 1) != (waited & 1) : barrier.phase != waited;
    w.lanes(i.destination[0])[l] = done;
    if (!done) return;
    join(w.seen, barrier.completed);
    join(w.proxy_seen, barrier.proxy_completed);
  });
}

bool decode_mbarrier(Decoder& d, const Statement& s, Instruction& i) {
  const std::string& what = s.modifiers.at(0);
  if (s.has("shared::cluster") || s.has("expect_tx") || s.has("noComplete")) return false;
  i.category = "barrier";
  if (what == "init") i.run = initialise;
  if (what == "inval") i.run = invalidate;
  if (what == "arrive") i.run = arrive;
  if (what == "test_wait" || what == "try_wait") i.run = test;
  i.flag = s.has("parity");
  i.polls = i.run == test;
  if (i.run) d.bind(s, i, i.run == arrive || i.run == test ? 1 : 0);
  return i.run != nullptr;
}

}  // namespace

bool decode_async(Decoder& d, const Statement& s, Instruction& i) {
  if (s.opcode == "mbarrier") return decode_mbarrier(d, s, i);
  if (s.opcode != "cp" || s.modifiers.size() < 2 || s.modifiers[0] != "async") return false;
  i.category = "async";
  const std::string& what = s.modifiers[1];
  if (what == "commit_group") i.run = commit;
  if (what == "wait_group" || what == "wait_all") {
    i.flag = what == "wait_all";
    i.run = wait;
  }
  if (what == "mbarrier") {
    i.mode = 1;
    i.flag = s.has("noinc");
    i.run = arrive;
  }
  if (i.run) {
    d.bind(s, i, 0);
    return true;
  }
  if ((what != "ca" && what != "cg") || s.operands.size() < 3) return false;
  i.run = copy;
  d.bind_address(s.operands[0], i);
  d.bind_address(s.operands[1], i, true);
  i.width = int(s.operands[2].bits);
  if (i.width != 16 && (what == "cg" || (i.width != 4 && i.width != 8))) d.unsupported(s, "size of the copy");
  const size_t options = s.operands.size() - (s.has("L2::cache_hint") ? 1 : 0);
  if (options > 3) {
    i.source.push_back(d.slot(s.operands[3]));
    i.flag = d.register_bits(s.operands[3]) == 1;
  }
  return true;
}

}  // namespace ptx
