#include "../forward.h"

using namespace rfkernels::cuda;

using Config = HopperConfig<Half, 80, 128>;
RF_ATTENTION_FORWARD_HOPPER(rf_attention_forward_hopper_fp16_d80, Config)
