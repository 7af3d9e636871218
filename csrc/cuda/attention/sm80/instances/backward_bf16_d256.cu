#include "../backward_kernels.h"

RF_ATTENTION_BACKWARD(rf_attention_grad_q_bf16_d256, rf_attention_grad_kv_bf16_d256, rfkernels::cuda::BFloat16, 256)
