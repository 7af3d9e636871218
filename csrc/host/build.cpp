// What this library was made by and for, as lines of "name=value". rfkernels/native.py reads it with ctypes, so that
// nothing in the package is compiled for one version of Python.
#ifdef _WIN32
#define RF_EXPORT __declspec(dllexport)
#else
#define RF_EXPORT __attribute__((visibility("default")))
#endif

extern "C" RF_EXPORT const char* rfkernels_build() {
  return "torch_version=" RF_TORCH_VERSION  // built against; runs on every torch from torch_target on
         "\ntorch_target=" RF_TORCH_TARGET  //
         "\ncompiler=" RF_COMPILER
         "\ncuda=" RF_CUDA_VERSION                      // "" for a CPU-only build
         "\ncuda_architectures=" RF_CUDA_ARCHITECTURES  // "8.0, 9.0+PTX"
         "\ncuda_head_dims=" RF_CUDA_HEAD_DIMS          // of the attention kernels, "64, 128"
         "\ncuda_reason=" RF_CUDA_REASON;               // why there is no CUDA code, "" where there is
}
