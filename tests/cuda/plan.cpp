// For ctypes: the launch plan of the attention backward, the sizes of the structs that launch.py mirrors, and the
// ranges that tiles sweep.
#include "../../csrc/cuda/attention/backward_params.h"
#include "../../csrc/cuda/attention/ranges.h"

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

void tile_keys(const AttentionProblem* p, int sample, int part, int first_row, int last_row, Sweep* sweep) {
  *sweep = swept_keys(*p, StreamRows(*p, sample), part, first_row, last_row);
}
void row_keys(const AttentionProblem* p, int part, int row, Range* range) { *range = keys_of_row(*p, part, row, 0, 0); }
void tile_queries(const AttentionProblem* p, int sample, int outside, int first_key, int last_key, Sweep* sweep) {
  *sweep = swept_queries(*p, StreamRows(*p, sample), outside != 0, first_key, last_key);
}
}
