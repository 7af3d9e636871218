// What an access of a warp costs: 32-byte sectors of global memory, wavefronts of shared memory.
#pragma once
#include "machine.h"

namespace ptx {

// base: the address register of each lane, to which the instruction's offset is added.
void count_access(Warp& w, const Instruction& i, Mask mask, const uint64_t* base, int bytes, bool store);
void count_global(Warp& w, const uint64_t* addresses, Mask mask, int bytes, bool store);
void count_shared(Warp& w, const Instruction& i, const uint64_t* addresses, Mask mask, int bytes);

}  // namespace ptx
