// csrc/host/cuda/runtime.h on the CPU: a launch is a call of the op rfkernels_emulated::launch, which emulated.py
// implements.
#include "host/cuda/runtime.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <array>
#include <cstring>
#include <string>

#include "host/shim.h"

namespace rfkernels::cuda {

using torch::stable::Tensor;

bool on_device(const Tensor& x) { return x.is_cpu(); }

bool available(const Kernel&) { return true; }

static int g_processors = 8;             // few, so that small tests both split and do not
static int g_shared_memory = 164 << 10;  // of an A100

extern "C" __attribute__((visibility("default"))) void rf_emulated_device(int processors, int shared_memory) {
  g_processors = processors;
  g_shared_memory = shared_memory;
}

int shared_memory(const Tensor&) { return g_shared_memory; }

int processors(const Tensor&) { return g_processors; }

static int g_capability = 80;

extern "C" __attribute__((visibility("default"))) void rf_emulated_capability(int number) { g_capability = number; }

int capability(const Tensor&) { return g_capability; }

void launch(const Kernel& kernel, Grid grid, int threads, int shared_bytes, const void* params, size_t params_bytes,
            const std::vector<Tensor>& tensors, const std::vector<Tensor>& results) {
  if (grid.x == 0 || grid.y == 0) return;
  using torch::stable::detail::from;
  Tensor bytes =
      torch::stable::new_empty(tensors.front(), {int64_t(params_bytes)}, torch::headeronly::ScalarType::Byte);
  std::memcpy(bytes.mutable_data_ptr(), params, params_bytes);
  std::array<StableIValue, 7> stack{from(std::string(kernel.name)),
                                    from(std::vector<int64_t>{grid.x, grid.y}),
                                    from(int64_t(threads)),
                                    from(int64_t(shared_bytes)),
                                    from(bytes),
                                    from(tensors),
                                    from(results)};
  call_operator("rfkernels_emulated::launch", stack);
}

}  // namespace rfkernels::cuda
