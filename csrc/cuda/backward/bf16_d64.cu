#include "../attention_backward_kernel.h"

RF_ATTENTION_BACKWARD(bf16_d64, rfkernels::cuda::BFloat16, 64)
