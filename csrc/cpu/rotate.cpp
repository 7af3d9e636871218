// Rotates rows at given frame numbers: queries before attention, gradients after it. Without a rope they are rounded
// only.
#include <vector>

#include "kernels.h"
#include "parallel.h"
#include "phases.h"

namespace rfkernels::cpu {
namespace {

template <class Acc>
RF_INLINE void rotate_token(const Rotate& a, int64_t sample, int64_t token, const TokenPhases<Acc>& phases, Acc* row) {
  for (int64_t head = 0; head < a.x.heads; ++head) {
    const char* source = a.x.row(0, sample, token, head);
    char* target = a.out.row(0, sample, token, head);
    if (a.rope)
      rotate_memory(source, a.x.dtype, phases.cos(), phases.sin(), phases.pairs(), a.rope.half_split,
                    Acc(a.inverse ? -1 : 1), row, target, a.out.dtype);
    else
      copy_row(source, a.x.dtype, a.x.head_dim, row, target, a.out.dtype);
  }
}

RF_VECTORIZED void rotate_token_f32(const Rotate& a, int64_t sample, int64_t token, const TokenPhases<float>& phases,
                                    float* row) {
  rotate_token(a, sample, token, phases, row);
}
RF_VECTORIZED void rotate_token_f64(const Rotate& a, int64_t sample, int64_t token, const TokenPhases<double>& phases,
                                    double* row) {
  rotate_token(a, sample, token, phases, row);
}

template <class Acc, class Token>
void rotate_all(const Rotate& a, Token token_kernel) {
  const int64_t tokens = a.x.tokens, tokens_per_entry = tokens / a.entries;
  parallel_rows(a.x.batch * tokens, a.x.heads * a.x.head_dim, [&](int64_t begin, int64_t end) {
    TokenPhases<Acc> phases(a.rope);
    std::vector<Acc> row(size_t(2 * a.x.head_dim));
    for (int64_t item = begin; item < end; ++item) {
      const int64_t sample = item / tokens, token = item % tokens;
      phases.set_frame(a.frames[sample * a.frames_batch_stride + token / tokens_per_entry]);
      phases.set_token((a.first_token + token) % a.frame_tokens);
      token_kernel(a, sample, token, phases, row.data());
    }
  });
}

}  // namespace

void rotate(const Rotate& args) {
  if (args.x.tokens == 0) return;
  if (args.precision == DType::Float64)
    rotate_all<double>(args, rotate_token_f64);
  else
    rotate_all<float>(args, rotate_token_f32);
}

}  // namespace rfkernels::cpu
