// Opening a chunk: the frames that leave the window are fused into the sink, and the sink moves up to the window. One
// launch for all layers: it reads ring slots and writes sink slots only, so nothing that it reads is written by another
// thread; each entry is read once and written once.
#include "rotation.h"

namespace rfkernels::cuda {
namespace {

// One step of the moving average. A half accumulator reproduces the published arithmetic, each product and the sum
// rounded; the float form leaves a constant where it is.
__device__ __forceinline__ float fold(float sink, float evicted, float alpha, float weight, DType accumulator) {
  if (!is_half(accumulator)) return sink + weight * (evicted - sink);
  const float kept = round_to(alpha * sink, accumulator);
  const float added = round_to(weight * round_to(evicted, accumulator), accumulator);
  return round_to(kept + added, accumulator);
}

__device__ __forceinline__ void fold(Row& sink, const Row& evicted, float alpha, float weight, DType accumulator) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    sink.a[i] = fold(sink.a[i], evicted.a[i], alpha, weight, accumulator);
    sink.b[i] = fold(sink.b[i], evicted.b[i], alpha, weight, accumulator);
  }
}

}  // namespace

// A block owns some tokens of one head, sink slot, sample and layer. It reads num_frames and does not advance it.
extern "C" __global__ void __launch_bounds__(kThreads, kBlocksPerSM)
    rf_begin_chunk(const __grid_constant__ BeginChunk args) {
  __shared__ float2 shared_phases[kMaxPairs];
  const Cache& cache = args.cache;
  const CacheGeometry geometry = cache.geometry;
  const int64_t head_dim = cache.k.head_dim, heads = cache.k.heads;
  const Columns columns(head_dim);
  BlockIndex block{blockIdx.x};
  const int64_t token =
      block.next(token_blocks(geometry.frame_tokens, head_dim)) * rows_per_block(head_dim) + columns.row;
  const int64_t slot = block.next(geometry.sink_frames), head = block.next(heads);
  const int64_t sample = block.next(cache.k.batch), layer = block.rest;

  if (args.advancing != nullptr && !args.advancing[sample]) return;
  const int64_t num_frames = args.num_frames[sample] + args.new_frames;
  const int64_t before = geometry.evicted_frames(args.num_frames[sample]), after = geometry.evicted_frames(num_frames);
  if (after == before) return;
  // Frames S + before .. S + after - 1 leave; this slot receives the first that is congruent to it, then every S-th.
  const int64_t sinks = geometry.sink_frames, stop = sinks + after;
  const int64_t start = sinks + before + (slot + sinks - geometry.fuse_slot(sinks + before)) % sinks;
  const float* decay = static_cast<const float*>(args.decay);
  const float alpha = decay == nullptr ? 1.0f : decay[head], weight = decay == nullptr ? 0.0f : decay[heads + head];
  const bool fuse = start < stop && weight != 0.0f;
  const bool image = cache.rope && cache.sink_k && (args.before_window || fuse);  // of the keys, at a new frame number
  if (!fuse && !image) return;

  const bool here = columns.row < rows_per_block(head_dim) && token < geometry.frame_tokens;
  const int64_t target = slot * geometry.frame_tokens + token;
  const TensorView& sum_k = cache.sink_k ? cache.sink_k : cache.k;
  const TensorView& sum_v = cache.sink_v ? cache.sink_v : cache.v;
  const auto ring = [&](int64_t frame) { return geometry.slot(frame) * geometry.frame_tokens + token; };
  const auto shared = [&](int pair) { return shared_phases[pair]; };
  Row sink, evicted;
  Phases phases;
  if (here) sink.load(sum_k, sum_k.row(layer, sample, target, head), columns);
  for (int64_t frame = start; fuse && frame < stop; frame += sinks) {
    if (cache.rope) share_frame_phases(shared_phases, frame, cache.rope);
    if (!here) continue;
    evicted.load(cache.k, cache.k.row(layer, sample, ring(frame), head), columns);
    if (cache.rope) {
      phases.find(cache.rope, columns, token, shared);
      phases.turn(evicted, cache.rope.half_split, -1.0f);
    }
    fold(sink, evicted, alpha, weight, sum_k.dtype);
  }
  if (here && fuse) sink.store(sum_k, sum_k.row(layer, sample, target, head), columns);
  if (image) {
    share_frame_phases(shared_phases, geometry.sink_position(slot, num_frames, args.before_window), cache.rope);
    if (here) {
      phases.find(cache.rope, columns, token, shared);
      phases.turn(sink, cache.rope.half_split, 1.0f);
    }
  }
  if (here && cache.sink_k) sink.store(cache.k, cache.k.row(layer, sample, target, head), columns);
  if (!here || !fuse) return;

  sink.load(sum_v, sum_v.row(layer, sample, target, head), columns);
  for (int64_t frame = start; frame < stop; frame += sinks) {
    evicted.load(cache.v, cache.v.row(layer, sample, ring(frame), head), columns);
    fold(sink, evicted, alpha, weight, sum_v.dtype);
  }
  sink.store(sum_v, sum_v.row(layer, sample, target, head), columns);
  if (cache.sink_v) sink.store(cache.v, cache.v.row(layer, sample, target, head), columns);
}

}  // namespace rfkernels::cuda
