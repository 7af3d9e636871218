// What the host files of the CUDA operators share.
#pragma once
#include "../../cuda/cache/tiles.h"
#include "../arguments.h"
#include "runtime.h"

#ifndef RF_DISPATCH_KEY  // the tests register the same operators once more, for the CPU
#define RF_NATIVE_NAMESPACE rfkernels_native
#define RF_CUDA_NAMESPACE rfkernels_cuda
#define RF_DISPATCH_KEY CUDA
#endif

namespace rfkernels::cuda {

inline void check_served(const Tensor& x, int64_t head_dim) {
  STD_TORCH_CHECK(on_device(x), "the CUDA kernels were given a tensor of another device");
  STD_TORCH_CHECK(dtype_of(x) != DType::Float64, "the CUDA kernels serve float16, bfloat16 and float32");
  STD_TORCH_CHECK(head_dim > 0 && head_dim % kColumns == 0 && head_dim <= kMaxHeadDim,
                  "the CUDA kernels serve a head_dim that is a multiple of ", kColumns, " up to ", kMaxHeadDim,
                  ", got ", head_dim);
}

// One launch; cache_and_loss.cpp. tensors: those of the request.
void write(const requests::Write& request, const std::vector<Tensor>& tensors);

}  // namespace rfkernels::cuda
