#include "../forward.h"

using namespace rfkernels::cuda;

using Config = ForwardConfig<Half, 96, 64>;
RF_ATTENTION_FORWARD(rf_attention_forward_fp16_d96, Config)
