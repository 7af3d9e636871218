#include "../backward_kernels.h"

RF_ATTENTION_BACKWARD(rf_attention_grad_q_fp16_d80, rf_attention_grad_kv_fp16_d80, rfkernels::cuda::Half, 80)
