// Entries of the attention backward, one pair per head size and type.
#pragma once
#include "grad_kv.h"
#include "grad_q.h"

#define RF_ATTENTION_BACKWARD(grad_q_name, grad_kv_name, T, head_dim)                                            \
  extern "C" __global__ void __launch_bounds__(rfkernels::cuda::BackwardConfig<T, head_dim, false>::kThreads, 1) \
      grad_q_name(const __grid_constant__ rfkernels::cuda::BackwardParams params) {                              \
    rfkernels::cuda::attention_grad_q<rfkernels::cuda::BackwardConfig<T, head_dim, false>>(params);              \
  }                                                                                                              \
  extern "C" __global__ void __launch_bounds__(rfkernels::cuda::BackwardConfig<T, head_dim, true>::kThreads, 1)  \
      grad_kv_name(const __grid_constant__ rfkernels::cuda::BackwardParams params) {                             \
    rfkernels::cuda::attention_grad_kv<rfkernels::cuda::BackwardConfig<T, head_dim, true>>(params);              \
  }
