// As much of the CUDA runtime as a launch may use, writing down each call. There is nothing in here that waits, copies
// or allocates: a runtime.cpp that did would not compile.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <cstddef>

using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess, cudaErrorFailed };
enum cudaDeviceAttr {
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

struct dim3 {
  unsigned x, y = 1, z = 1;
};

namespace fake {
inline std::string failing;  // the name of the call that reports an error

inline cudaError_t answer(const char* call) { return failing == call ? cudaErrorFailed : cudaSuccess; }
}  // namespace fake

inline const char* cudaGetErrorString(cudaError_t) { return "the error's text"; }

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int device) {
  *value = which == cudaDevAttrMultiProcessorCount      ? 100 + device
           : which == cudaDevAttrComputeCapabilityMajor ? 8
           : which == cudaDevAttrComputeCapabilityMinor ? device
                                                        : 1 << 16;
  return fake::answer("cudaDeviceGetAttribute");
}

inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int bytes) {
  fake::note("may have ", bytes, " bytes");
  return fake::answer("cudaFuncSetAttribute");
}

inline cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared_bytes,
                                    cudaStream_t stream) {
  fake::note("launch ", reinterpret_cast<intptr_t>(function), " of ", grid.x, "x", grid.y, "x", grid.z, " blocks of ",
             block.x, ", ", shared_bytes, " bytes, parameter ", *static_cast<int*>(arguments[0]), ", on stream ",
             reinterpret_cast<intptr_t>(stream));
  return fake::answer("cudaLaunchKernel");
}
