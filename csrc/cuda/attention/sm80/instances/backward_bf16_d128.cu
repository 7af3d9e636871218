#include "../backward_kernels.h"

RF_ATTENTION_BACKWARD(rf_attention_grad_q_bf16_d128, rf_attention_grad_kv_bf16_d128, rfkernels::cuda::BFloat16, 128)
