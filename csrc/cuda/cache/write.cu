// A pass writes its K and V into the open frames: keys rotated once, at their absolute frame number. One launch.
#include "rotation.h"

namespace rfkernels::cuda {

// A block owns some tokens of one frame for a few heads of one sample. It reads num_frames and does not advance it.
extern "C" __global__ void __launch_bounds__(kThreads, kBlocksPerSM) rf_write(const __grid_constant__ Write args) {
  __shared__ float2 shared_phases[kMaxPairs];
  const Cache& cache = args.cache;
  const CacheGeometry geometry = cache.geometry;
  const int64_t head_dim = cache.k.head_dim, frames = args.new_k.tokens / geometry.frame_tokens;
  const Columns columns(head_dim);
  BlockIndex block{blockIdx.x};
  const int64_t token =
      block.next(token_blocks(geometry.frame_tokens, head_dim)) * rows_per_block(head_dim) + columns.row;
  const int64_t first_head = block.next(head_groups(cache.k.heads)) * kHeadsPerThread;
  const int64_t open = block.next(frames), sample = block.rest;

  const int64_t frame = args.num_frames[sample] - frames + open;
  if (frame < 0) return;  // a stream younger than the chunk has no such frame
  if (cache.rope) share_frame_phases(shared_phases, frame, cache.rope);
  if (columns.row >= rows_per_block(head_dim) || token >= geometry.frame_tokens) return;
  Phases phases;
  if (cache.rope) phases.find(cache.rope, columns, token, [&](int pair) { return shared_phases[pair]; });

  const int64_t source = open * geometry.frame_tokens + token;
  const int64_t target = geometry.slot(frame) * geometry.frame_tokens + token;
  const bool to_sink = frame < geometry.sink_frames;
  const bool saturate_k = args.new_k.dtype != DType::Float16, saturate_v = args.new_v.dtype != DType::Float16;
  const int64_t heads = min(cache.k.heads, first_head + kHeadsPerThread);
  for (int64_t head = first_head; head < heads; ++head) {
    Row x;
    x.load(args.new_k, args.new_k.row(0, sample, source, head), columns);
    if (to_sink && cache.sink_k) x.store(cache.sink_k, cache.sink_k.row(0, sample, target, head), columns, saturate_k);
    if (cache.rope) phases.turn(x, cache.rope.half_split, 1.0f);
    x.store(cache.k, cache.k.row(0, sample, target, head), columns, cache.rope || saturate_k);
    x.load(args.new_v, args.new_v.row(0, sample, source, head), columns);
    if (to_sink && cache.sink_v) x.store(cache.sink_v, cache.sink_v.row(0, sample, target, head), columns, saturate_v);
    x.store(cache.v, cache.v.row(0, sample, target, head), columns, saturate_v);
  }
}

}  // namespace rfkernels::cuda
