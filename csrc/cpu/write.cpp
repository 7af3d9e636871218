// A pass writes its K and V into the open frames: keys rotated once, at their absolute frame number.
#include <vector>

#include "kernels.h"
#include "parallel.h"
#include "phases.h"

namespace rfkernels::cpu {
namespace {

template <class Acc>
RF_INLINE void write_token(const Write& a, int64_t sample, int64_t source, int64_t target,
                           const TokenPhases<Acc>& phases, Acc* row) {
  const Cache& cache = a.cache;
  const int64_t n = a.new_k.head_dim;
  const bool to_sink = target < cache.geometry.sink_frames * cache.geometry.frame_tokens;
  for (int64_t head = 0; head < a.new_k.heads; ++head) {
    const char* new_k = a.new_k.row(0, sample, source, head);
    const char* new_v = a.new_v.row(0, sample, source, head);
    if (to_sink && cache.sink_k)
      copy_row(new_k, a.new_k.dtype, n, row, cache.sink_k.row(0, sample, target, head), cache.sink_k.dtype);
    if (to_sink && cache.sink_v)
      copy_row(new_v, a.new_v.dtype, n, row, cache.sink_v.row(0, sample, target, head), cache.sink_v.dtype);
    if (cache.rope) {
      rotate_memory(new_k, a.new_k.dtype, phases.cos(), phases.sin(), phases.pairs(), cache.rope.half_split, Acc(1),
                    row, cache.k.row(0, sample, target, head), cache.k.dtype);
    } else {
      copy_row(new_k, a.new_k.dtype, n, row, cache.k.row(0, sample, target, head), cache.k.dtype);
    }
    copy_row(new_v, a.new_v.dtype, n, row, cache.v.row(0, sample, target, head), cache.v.dtype);
  }
}

RF_VECTORIZED void write_token_f32(const Write& a, int64_t sample, int64_t source, int64_t target,
                                   const TokenPhases<float>& phases, float* row) {
  write_token(a, sample, source, target, phases, row);
}
RF_VECTORIZED void write_token_f64(const Write& a, int64_t sample, int64_t source, int64_t target,
                                   const TokenPhases<double>& phases, double* row) {
  write_token(a, sample, source, target, phases, row);
}

template <class Acc, class Token>
void write_all(const Write& a, Token token_kernel) {
  const CacheGeometry& geometry = a.cache.geometry;
  const int64_t tokens = a.new_k.tokens, frames = tokens / geometry.frame_tokens;
  parallel_rows(a.new_k.batch * tokens, 2 * a.new_k.heads * a.new_k.head_dim, [&](int64_t begin, int64_t end) {
    TokenPhases<Acc> phases(a.cache.rope);
    std::vector<Acc> row(size_t(2 * a.new_k.head_dim));
    for (int64_t item = begin; item < end; ++item) {
      const int64_t sample = item / tokens, source = item % tokens;
      const int64_t frame = a.num_frames[sample] - frames + source / geometry.frame_tokens;
      if (frame < 0) continue;  // a stream younger than the chunk has no such frame
      const int64_t token = source % geometry.frame_tokens;
      if (a.cache.rope) {
        phases.set_frame(frame);
        phases.set_token(token);
      }
      token_kernel(a, sample, source, geometry.slot(frame) * geometry.frame_tokens + token, phases, row.data());
    }
  });
}

}  // namespace

void write(const Write& args) {
  if (args.cache.k.dtype == DType::Float64)
    write_all<double>(args, write_token_f64);
  else
    write_all<float>(args, write_token_f32);
}

}  // namespace rfkernels::cpu
