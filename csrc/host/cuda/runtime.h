// All that the host code asks of a device. runtime.cpp answers for CUDA; the tests have an answer that runs on the CPU.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

namespace rfkernels::cuda {

// Thread blocks of a launch.
struct Grid {
  int64_t x;
  int64_t y = 1;
};

struct Kernel {
  const char* name;      // of the extern "C" entry
  const void* function;  // its address
};

#ifdef RF_KERNELS_BY_NAME  // the kernels are not linked in
#define RF_KERNEL(entry) \
  ::rfkernels::cuda::Kernel { #entry, nullptr }
#define RF_DECLARE_KERNEL(entry)
#else
#define RF_KERNEL(entry) \
  ::rfkernels::cuda::Kernel { #entry, reinterpret_cast<const void*>(&::entry) }
#define RF_DECLARE_KERNEL(entry) extern "C" __attribute__((weak)) void entry();  // null where it was not compiled in
#endif

// Whether the kernels run where x lies.
bool on_device(const torch::stable::Tensor& x);

// Whether a kernel was compiled in.
bool available(const Kernel& kernel);

// Bytes of shared memory of one multiprocessor of x's device, and how many of those there are.
int shared_memory(const torch::stable::Tensor& x);
int processors(const torch::stable::Tensor& x);

// Of x's device: 90 for 9.0.
int capability(const torch::stable::Tensor& x);

// One launch on the current stream of the tensors' device; throws where the runtime reports an error. `params` is the
// kernel's one argument, a plain struct. tensors: what it points to; results: tensors that this launch fills entirely
// and does not read.
void launch(const Kernel& kernel, Grid grid, int threads, int shared_bytes, const void* params, size_t params_bytes,
            const std::vector<torch::stable::Tensor>& tensors, const std::vector<torch::stable::Tensor>& results = {});

template <class Params>
void launch(const Kernel& kernel, Grid grid, int threads, int shared_bytes, const Params& params,
            const std::vector<torch::stable::Tensor>& tensors, const std::vector<torch::stable::Tensor>& results = {}) {
  launch(kernel, grid, threads, shared_bytes, &params, sizeof params, tensors, results);
}

}  // namespace rfkernels::cuda
