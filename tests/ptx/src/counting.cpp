#include "counting.h"

#include <algorithm>

namespace ptx {

void count_global(Warp& w, const uint64_t* addresses, Mask mask, int bytes, bool store) {
  uint64_t sectors[kLanes * 2];
  int count = 0, lanes = 0;
  for_lanes(mask, [&](int l) {
    sectors[count++] = addresses[l] / 32;
    if ((addresses[l] + bytes - 1) / 32 != addresses[l] / 32) sectors[count++] = addresses[l] / 32 + 1;
    ++lanes;
  });
  std::sort(sectors, sectors + count);
  const uint64_t distinct = uint64_t(std::unique(sectors, sectors + count) - sectors);
  Counters& c = w.launch->counters;
  (store ? c.global_store_bytes : c.global_load_bytes) += uint64_t(lanes) * bytes;
  (store ? c.global_store_sectors : c.global_load_sectors) += distinct;
}

// 32 banks of 4 bytes. A warp's 8-byte accesses are served by halves, its 16-byte accesses by quarters; within one of
// these, lanes that touch the same word share it, and different words of one bank wait for each other.
void count_shared(Warp& w, const Instruction& i, const uint64_t* addresses, Mask mask, int bytes) {
  const int lanes_per_phase = bytes <= 4 ? 32 : bytes <= 8 ? 16 : 8;
  Counters& c = w.launch->counters;
  for (int first = 0; first < kLanes; first += lanes_per_phase) {
    uint64_t words[kLanes];
    int count = 0;
    for (int l = first; l < first + lanes_per_phase; ++l)
      if (mask >> l & 1)
        for (int byte = 0; byte < bytes; byte += 4) words[count++] = (addresses[l] + byte) / 4;
    if (!count) continue;
    std::sort(words, words + count);
    count = int(std::unique(words, words + count) - words);
    int per_bank[32] = {}, most = 0;
    for (int k = 0; k < count; ++k) most = std::max(most, ++per_bank[words[k] % 32]);
    c.shared_wavefronts += uint64_t(most);
    c.shared_ideal_wavefronts += uint64_t((count + 31) / 32);
    c.bank_conflicts[size_t(&i - w.launch->program->code.data())] += uint64_t(most - (count + 31) / 32);
  }
}

void count_access(Warp& w, const Instruction& i, Mask mask, const uint64_t* base, int bytes, bool store) {
  uint64_t addresses[kLanes];
  for_lanes(mask, [&](int l) { addresses[l] = base[l] + uint64_t(i.offset); });
  if (i.space == Space::Global) {
    count_global(w, addresses, mask, bytes, store);
  } else if (i.space == Space::Shared) {
    count_shared(w, i, addresses, mask, bytes);
  } else if (i.space == Space::Generic) {
    Mask global = 0, shared = 0;
    for_lanes(mask, [&](int l) {
      if (addresses[l] >> 60 == 0) global |= 1u << l;
      if (addresses[l] >> 60 == kSharedWindow >> 60) shared |= 1u << l;
    });
    if (global) count_global(w, addresses, global, bytes, store);
    if (shared) count_shared(w, i, addresses, shared, bytes);
  }
}

}  // namespace ptx
