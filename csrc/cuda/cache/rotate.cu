// Rotates rows at given frame numbers: keys and queries before attention, gradients after it.
#include "rotation.h"

namespace rfkernels::cuda {

// A block owns some tokens of one sample for a few heads.
extern "C" __global__ void __launch_bounds__(kThreads, kBlocksPerSM) rf_rotate(const __grid_constant__ Rotate args) {
  const int64_t head_dim = args.x.head_dim;
  const Columns columns(head_dim);
  BlockIndex block{blockIdx.x};
  const int64_t token = block.next(token_blocks(args.x.tokens, head_dim)) * rows_per_block(head_dim) + columns.row;
  const int64_t first_head = block.next(head_groups(args.x.heads)) * kHeadsPerThread, sample = block.rest;
  if (columns.row >= rows_per_block(head_dim) || token >= args.x.tokens) return;

  const int64_t entry = token / (args.x.tokens / args.entries);
  const int64_t frame = args.frames[sample * args.frames_batch_stride + entry];
  Phases phases;
  phases.find(args.rope, columns, (args.first_token + token) % args.frame_tokens,
              [&](int pair) { return frame_phase(frame, args.rope.frame_turns[pair]); });
  const int64_t heads = min(args.x.heads, first_head + kHeadsPerThread);
  for (int64_t head = first_head; head < heads; ++head) {
    Row x;
    x.load(args.x, args.x.row(0, sample, token, head), columns);
    phases.turn(x, args.rope.half_split, args.inverse ? -1.0f : 1.0f);
    x.store(args.out, args.out.row(0, sample, token, head), columns);
  }
}

}  // namespace rfkernels::cuda
