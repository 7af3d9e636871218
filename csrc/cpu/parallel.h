// at::parallel_for through the stable ABI, with the grain given as work per item.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

namespace rfkernels::cpu {

constexpr int64_t kElementsPerTask = 16384;  // below this a thread hand-over costs more than it saves

template <class F>
void parallel_rows(int64_t rows, int64_t elements_per_row, const F& f) {
  if (rows == 0) return;
  const int64_t grain = std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(1, elements_per_row));
  torch::stable::parallel_for(0, rows, grain, f);
}

}  // namespace rfkernels::cpu
