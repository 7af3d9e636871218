// The launch plan of the attention backward for ctypes, and the sizes of the structs that launch.py mirrors.
#include "../../csrc/cuda/attention/backward_params.h"

using namespace rfkernels::cuda;

extern "C" {
void delta_plan(const DeltaParams* params, Launch* launch) { *launch = delta_launch(*params); }
void grad_q_plan(const BackwardParams* params, int head_dim, Launch* launch) {
  *launch = grad_q_launch(params->problem, head_dim);
}
void grad_kv_plan(const BackwardParams* params, int head_dim, Launch* launch) {
  *launch = grad_kv_launch(params->problem, head_dim);
}
int delta_params_bytes() { return sizeof(DeltaParams); }
int backward_params_bytes() { return sizeof(BackwardParams); }
}
