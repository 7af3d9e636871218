#include "../forward.h"

using namespace rfkernels::cuda;

using Config = ForwardConfig<BFloat16, 128, 64>;
RF_ATTENTION_FORWARD(rf_attention_forward_bf16_d128, Config)

// For 100 KB of shared memory per SM (sm_86, sm_89, sm_120).
using SmallConfig = ForwardConfig<BFloat16, 128, 32>;
RF_ATTENTION_FORWARD(rf_attention_forward_bf16_d128_k32, SmallConfig)
