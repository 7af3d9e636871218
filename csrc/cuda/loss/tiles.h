// How the Re-DMD kernels divide a sample, and their arguments; host and device read the same lines. No torch header.
#pragma once
#include "../../kernels.h"

namespace rfkernels::cuda {

constexpr int kLossThreads = 256, kLossVector = 8;
constexpr int64_t kLossTile = kLossThreads * kLossVector;  // elements a block handles at a time
constexpr int64_t kMaxParts = 256;  // blocks of one sample: each block of the second pass adds up their sums

struct ReDMD {
  ReDMDLoss loss;
  bool aligned;         // every vector of 8 elements begins at a multiple of 16 bytes (the mask's: 8)
  int64_t parts, span;  // blocks of a sample, elements of a block
  double* norms;        // [batch, parts] sums of |x - real|
  double* squares;      // [batch, parts] weighted sums of grad**2
  int32_t* counts;      // [batch, parts] elements inside the mask
};

}  // namespace rfkernels::cuda
