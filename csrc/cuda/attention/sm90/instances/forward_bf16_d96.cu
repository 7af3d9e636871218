#include "../forward.h"

using namespace rfkernels::cuda;

using Config = HopperConfig<BFloat16, 96, 128>;
RF_ATTENTION_FORWARD_HOPPER(rf_attention_forward_hopper_bf16_d96, Config)
