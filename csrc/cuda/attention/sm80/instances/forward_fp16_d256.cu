#include "../forward.h"

using namespace rfkernels::cuda;

using Config = ForwardConfig<Half, 256, 32>;
RF_ATTENTION_FORWARD(rf_attention_forward_fp16_d256, Config)
