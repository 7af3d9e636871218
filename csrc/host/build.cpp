// What this library was made by and for, as lines of "name=value". rfkernels/native.py reads it with ctypes, so that
// nothing in the package is compiled for one version of Python.
#ifdef _WIN32
#define RF_EXPORT __declspec(dllexport)
#else
#define RF_EXPORT __attribute__((visibility("default")))
#endif

// torch_version: built against; it runs on every torch from torch_target on. cuda: "" for a CPU-only build, and then
// cuda_reason says why. cuda_architectures: "8.0, 9.0+PTX". cuda_head_dims: of the attention kernels, "64, 128".
// clang-format off
extern "C" RF_EXPORT const char* rfkernels_build() {
  return "torch_version=" RF_TORCH_VERSION "\n"
         "torch_target=" RF_TORCH_TARGET "\n"
         "compiler=" RF_COMPILER "\n"
         "cuda=" RF_CUDA_VERSION "\n"
         "cuda_architectures=" RF_CUDA_ARCHITECTURES "\n"
         "cuda_head_dims=" RF_CUDA_HEAD_DIMS "\n"
         "cuda_reason=" RF_CUDA_REASON;
}
// clang-format on
