// Opening a chunk: the frames that leave the window are fused into the sink, and the sink moves up to the window.
// A work item owns one (layer, sample, sink slot, token): it reads ring slots and writes sink slots only, so nothing
// it reads is written by another item, and each entry is read once and written once.
#include <vector>

#include "kernels.h"
#include "parallel.h"
#include "phases.h"

namespace rfkernels::cpu {
namespace {

// What happens to one sink slot of one stream.
struct SlotPlan {
  int64_t sample, slot;
  std::vector<int64_t> evicted;  // frames to fuse, oldest first
  int64_t position;              // frame number of the slot's new image
};

template <class Acc>
struct Scratch {
  std::vector<TokenPhases<Acc>> evicted;  // phases of each evicted frame
  TokenPhases<Acc> image;
  std::vector<Acc> sink, row, turned;

  Scratch(const RopeView& rope, size_t frames, int64_t head_dim)
      : evicted(frames, TokenPhases<Acc>(rope)),
        image(rope),
        sink(size_t(head_dim)),
        row(size_t(head_dim)),
        turned(size_t(2 * head_dim)) {}
};

template <class Acc>
RF_INLINE void fold(Acc* sink, Acc* evicted, Acc alpha, Acc one_minus_alpha, DType accumulator, int64_t n) {
  if (is_half(accumulator)) {  // the published arithmetic: each product and the sum rounded
    round_row(evicted, accumulator, n);
    for (int64_t i = 0; i < n; ++i) sink[i] *= alpha;
    for (int64_t i = 0; i < n; ++i) evicted[i] *= one_minus_alpha;
    round_row(sink, accumulator, n);
    round_row(evicted, accumulator, n);
    for (int64_t i = 0; i < n; ++i) sink[i] += evicted[i];
    round_row(sink, accumulator, n);
  } else {  // this form leaves a constant where it is
    for (int64_t i = 0; i < n; ++i) sink[i] += one_minus_alpha * (evicted[i] - sink[i]);
  }
}

template <class Acc>
RF_INLINE void fuse_token(const BeginChunk& a, const SlotPlan& plan, int64_t layer, int64_t token, Scratch<Acc>& s) {
  const Cache& cache = a.cache;
  const CacheGeometry& geometry = cache.geometry;
  const int64_t n = cache.k.head_dim, heads = cache.k.heads, target = plan.slot * geometry.frame_tokens + token;
  const TensorView& sum_k = cache.sink_k ? cache.sink_k : cache.k;
  const TensorView& sum_v = cache.sink_v ? cache.sink_v : cache.v;
  const Acc* alpha = static_cast<const Acc*>(a.decay);
  for (int64_t head = 0; head < heads; ++head) {
    const bool fuse = !plan.evicted.empty() && a.decay != nullptr && alpha[heads + head] != Acc(0);
    Acc* sink = s.sink.data();
    if (fuse || cache.rope) load_row(sum_k.row(layer, plan.sample, target, head), sum_k.dtype, n, sink);
    if (fuse) {
      for (size_t e = 0; e < plan.evicted.size(); ++e) {
        const int64_t source = geometry.slot(plan.evicted[e]) * geometry.frame_tokens + token;
        const char* evicted = cache.k.row(layer, plan.sample, source, head);
        if (cache.rope)
          rotate_memory(evicted, cache.k.dtype, s.evicted[e].cos(), s.evicted[e].sin(), n / 2, cache.rope.half_split,
                        Acc(-1), s.turned.data(), reinterpret_cast<char*>(s.row.data()), accumulator_dtype<Acc>());
        else
          load_row(evicted, cache.k.dtype, n, s.row.data());
        fold(sink, s.row.data(), alpha[head], alpha[heads + head], sum_k.dtype, n);
      }
      store_row(sink, sum_k.dtype, n, sum_k.row(layer, plan.sample, target, head));
    }
    if (cache.rope) {
      rotate_row(sink, s.image.cos(), s.image.sin(), n / 2, cache.rope.half_split, Acc(1), s.turned.data());
      store_row(s.turned.data(), cache.k.dtype, n, cache.k.row(layer, plan.sample, target, head));
    } else if (fuse && cache.sink_k) {
      store_row(sink, cache.k.dtype, n, cache.k.row(layer, plan.sample, target, head));
    }
    if (!fuse) continue;
    load_row(sum_v.row(layer, plan.sample, target, head), sum_v.dtype, n, sink);
    for (int64_t frame : plan.evicted) {
      const int64_t source = geometry.slot(frame) * geometry.frame_tokens + token;
      load_row(cache.v.row(layer, plan.sample, source, head), cache.v.dtype, n, s.row.data());
      fold(sink, s.row.data(), alpha[head], alpha[heads + head], sum_v.dtype, n);
    }
    store_row(sink, sum_v.dtype, n, sum_v.row(layer, plan.sample, target, head));
    if (cache.sink_v) store_row(sink, cache.v.dtype, n, cache.v.row(layer, plan.sample, target, head));
  }
}

RF_VECTORIZED void fuse_token_f32(const BeginChunk& a, const SlotPlan& plan, int64_t layer, int64_t token,
                                  Scratch<float>& s) {
  fuse_token(a, plan, layer, token, s);
}
RF_VECTORIZED void fuse_token_f64(const BeginChunk& a, const SlotPlan& plan, int64_t layer, int64_t token,
                                  Scratch<double>& s) {
  fuse_token(a, plan, layer, token, s);
}

std::vector<SlotPlan> plan_slots(const BeginChunk& a) {
  const CacheGeometry& geometry = a.cache.geometry;
  std::vector<SlotPlan> plans;
  for (int64_t sample = 0; sample < a.cache.k.batch; ++sample) {
    if (a.advancing != nullptr && !a.advancing[sample]) continue;
    const int64_t before = geometry.evicted_frames(a.num_frames[sample]);
    const int64_t num_frames = a.num_frames[sample] + a.new_frames;
    const int64_t after = geometry.evicted_frames(num_frames);
    if (after == before) continue;
    const bool moves = a.cache.rope && a.before_window;
    for (int64_t slot = 0; slot < geometry.sink_frames; ++slot) {
      SlotPlan plan{sample, slot, {}, geometry.sink_position(slot, num_frames, a.before_window)};
      for (int64_t e = before; e < after && a.decay != nullptr; ++e)
        if (geometry.fuse_slot(geometry.sink_frames + e) == slot) plan.evicted.push_back(geometry.sink_frames + e);
      if (moves || !plan.evicted.empty()) plans.push_back(std::move(plan));
    }
  }
  return plans;
}

template <class Acc, class Token>
void begin_all(const BeginChunk& a, Token token_kernel) {
  const std::vector<SlotPlan> plans = plan_slots(a);
  const Cache& cache = a.cache;
  const int64_t tokens = cache.geometry.frame_tokens, per_layer = int64_t(plans.size()) * tokens;
  parallel_rows(cache.k.layers * per_layer, 4 * cache.k.heads * cache.k.head_dim, [&](int64_t begin, int64_t end) {
    Scratch<Acc> scratch(cache.rope, size_t(a.new_frames), cache.k.head_dim);
    for (int64_t item = begin; item < end; ++item) {
      const SlotPlan& plan = plans[size_t(item % per_layer / tokens)];
      const int64_t layer = item / per_layer, token = item % tokens;
      if (cache.rope) {
        for (size_t e = 0; e < plan.evicted.size(); ++e) {
          scratch.evicted[e].set_frame(plan.evicted[e]);
          scratch.evicted[e].set_token(token);
        }
        scratch.image.set_frame(plan.position);
        scratch.image.set_token(token);
      }
      token_kernel(a, plan, layer, token, scratch);
    }
  });
}

}  // namespace

void begin_chunk(const BeginChunk& args) {
  if (args.cache.k.dtype == DType::Float64)
    begin_all<double>(args, fuse_token_f64);
  else
    begin_all<float>(args, fuse_token_f32);
}

}  // namespace rfkernels::cpu
