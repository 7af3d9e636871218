#include "../forward.h"

using namespace rfkernels::cuda;

using Config = ForwardConfig<BFloat16, 64, 64>;
RF_ATTENTION_FORWARD(rf_attention_forward_bf16_d64, Config)
