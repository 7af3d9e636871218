#include "../forward.h"

using namespace rfkernels::cuda;

using Config = HopperConfig<BFloat16, 80, 128>;
RF_ATTENTION_FORWARD_HOPPER(rf_attention_forward_hopper_bf16_d80, Config)
