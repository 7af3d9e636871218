// For ctypes: the slot arithmetic and the plan of csrc, which tests compare with their Python twins.
#include "../csrc/geometry.h"
#include "../csrc/plan.h"

using rfkernels::CacheGeometry;
using rfkernels::WindowMask;

extern "C" {
int64_t evicted_frames(const CacheGeometry* g, int64_t num_frames) { return g->evicted_frames(num_frames); }
int64_t valid_frames(const CacheGeometry* g, int64_t num_frames) { return g->valid_frames(num_frames); }
int64_t slot(const CacheGeometry* g, int64_t frame) { return g->slot(frame); }
int64_t fuse_slot(const CacheGeometry* g, int64_t frame) { return g->fuse_slot(frame); }
int64_t sink_position(const CacheGeometry* g, int64_t sink_slot, int64_t num_frames, bool before_window) {
  return g->sink_position(sink_slot, num_frames, before_window);
}

int64_t chunk_begin(const WindowMask* m, int64_t i) { return m->chunk_begin(i); }
int64_t chunk_end(const WindowMask* m, int64_t i) { return m->chunk_end(i); }
bool visible(const WindowMask* m, int64_t i, int64_t j) { return m->visible(i, j); }

void plan_tiles(int64_t row_tiles, int64_t keys, int64_t tile_keys, int64_t processors, int64_t per_processor,
                int64_t (&plan)[2]) {
  const auto [whole, shares] = rfkernels::plan_tiles(row_tiles, keys, tile_keys, processors, per_processor);
  plan[0] = whole, plan[1] = shares;
}
}
