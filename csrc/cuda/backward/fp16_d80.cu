#include "../attention_backward_kernel.h"

RF_ATTENTION_BACKWARD(fp16_d80, rfkernels::cuda::Half, 80)
