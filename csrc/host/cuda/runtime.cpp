// Launches by the CUDA runtime, which is linked statically: the library needs neither torch_cuda nor a driver to load.
#include "runtime.h"

#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <climits>

namespace rfkernels::cuda {
namespace {

using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

void check(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

// torch's current stream. Its C shim is looked up where torch with CUDA is loaded: the library is not linked to it, and
// the stable headers lead from a stream to its handle from 2.13 on only.
cudaStream_t current_stream(int device) {
  using Find = int32_t (*)(int32_t device, void** stream);
  static const Find find = [] {
    void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    STD_TORCH_CHECK(torch_cuda != nullptr, "libtorch_cuda.so is not loaded: this torch has no CUDA");
    void* found = dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream");
    STD_TORCH_CHECK(found != nullptr, "libtorch_cuda.so has no aoti_torch_get_current_cuda_stream");
    return reinterpret_cast<Find>(found);
  }();
  void* stream = nullptr;
  STD_TORCH_CHECK(find(device, &stream) == 0, "torch does not tell its current stream on device ", device);
  return static_cast<cudaStream_t>(stream);
}

int attribute(const Tensor& x, cudaDeviceAttr which, const char* what) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, x.get_device_index()), what);
  return value;
}

}  // namespace

bool on_device(const Tensor& x) { return x.is_cuda(); }

bool available(const Kernel& kernel) { return kernel.function != nullptr; }

int shared_memory(const Tensor& x) {
  return attribute(x, cudaDevAttrMaxSharedMemoryPerMultiprocessor, "shared memory of a multiprocessor");
}

int processors(const Tensor& x) { return attribute(x, cudaDevAttrMultiProcessorCount, "multiprocessor count"); }

int capability(const Tensor& x) {
  return 10 * attribute(x, cudaDevAttrComputeCapabilityMajor, "compute capability") +
         attribute(x, cudaDevAttrComputeCapabilityMinor, "compute capability");
}

void launch(const Kernel& kernel, Grid grid, int threads, int shared_bytes, const void* params, size_t,
            const std::vector<Tensor>& tensors, const std::vector<Tensor>&) {
  if (grid.x == 0 || grid.y == 0) return;
  STD_TORCH_CHECK(grid.x <= INT_MAX && grid.y <= 65535, kernel.name, ": too many thread blocks, ", grid.x, " x ",
                  grid.y);
  const int device = tensors.front().get_device_index();
  const DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);
  if (shared_bytes > 48 * 1024)  // more than every kernel may have
    check(cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
          kernel.name);
  void* arguments[] = {const_cast<void*>(params)};
  check(cudaLaunchKernel(kernel.function, dim3(unsigned(grid.x), unsigned(grid.y)), dim3(unsigned(threads)), arguments,
                         size_t(shared_bytes), stream),
        kernel.name);
}

}  // namespace rfkernels::cuda
