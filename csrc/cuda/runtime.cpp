// Launches by the CUDA runtime, which is linked statically: the library needs neither torch_cuda nor a driver to load.
#include "runtime.h"

#include <cuda_runtime_api.h>

#include <climits>

namespace rfkernels::cuda {
namespace {

using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;
using torch::stable::accelerator::getCurrentStream;

void check(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

}  // namespace

bool on_device(const Tensor& x) { return x.is_cuda(); }

int processors(const Tensor& x) {
  int count = 0;
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, x.get_device_index()), "multiprocessor count");
  return count;
}

void launch(const Kernel& kernel, int64_t blocks, int threads, int shared_bytes, const void* params, size_t,
            const std::vector<Tensor>& tensors, const std::vector<Tensor>&) {
  if (blocks == 0) return;
  STD_TORCH_CHECK(blocks <= INT_MAX, kernel.name, ": too many thread blocks, ", blocks);
  const int device = tensors.front().get_device_index();
  const DeviceGuard guard(device);
  const auto stream = static_cast<cudaStream_t>(getCurrentStream(device).nativeHandle());
  if (shared_bytes > 48 * 1024)  // more than every kernel may have
    check(cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
          kernel.name);
  void* arguments[] = {const_cast<void*>(params)};
  check(cudaLaunchKernel(kernel.function, dim3(unsigned(blocks)), dim3(unsigned(threads)), arguments,
                         size_t(shared_bytes), stream),
        kernel.name);
}

}  // namespace rfkernels::cuda
