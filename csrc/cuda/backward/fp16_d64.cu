#include "../attention_backward_kernel.h"

RF_ATTENTION_BACKWARD(fp16_d64, rfkernels::cuda::Half, 64)
