// How the cache kernels divide their work; host and device read the same lines. No torch header.
#pragma once
#include "../../kernels.h"

namespace rfkernels::cuda {

constexpr int kThreads = 256;
constexpr int kBlocksPerSM = 2;     // up to 128 registers a thread: at 80 they spill
constexpr int kColumns = 16;        // of a head that one thread owns
constexpr int kMaxHeadDim = 512;    // so that a block holds a row, and shared memory all its pairs
constexpr int kHeadsPerThread = 4;  // of one token, in write and rotate: they share its phases
constexpr int kMaxPairs = kMaxHeadDim / 2;

// Tokens of one head that a block moves at a time: a thread owns 16 columns of a row.
RF_HOST_DEVICE int64_t rows_per_block(int64_t head_dim) { return kThreads / (head_dim / kColumns); }
RF_HOST_DEVICE int64_t token_blocks(int64_t tokens, int64_t head_dim) {
  return divide_up(tokens, rows_per_block(head_dim));
}
RF_HOST_DEVICE int64_t head_groups(int64_t heads) { return divide_up(heads, kHeadsPerThread); }

// A block index taken apart, the fastest coordinate first.
struct BlockIndex {
  int64_t rest;
  RF_HOST_DEVICE int64_t next(int64_t size) {
    const int64_t here = rest % size;
    rest /= size;
    return here;
  }
};

}  // namespace rfkernels::cuda
