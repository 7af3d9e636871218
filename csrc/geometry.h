// Which keys a query sees and where a frame lives. The Python twin is rfkernels/geometry.py; tests/test_geometry.py
// holds the two together. Plain integer arithmetic, no torch header: host, CPU and CUDA code share it.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define RF_HOST_DEVICE __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define RF_HOST_DEVICE inline __attribute__((always_inline))
#else
#define RF_HOST_DEVICE inline
#endif

namespace rfkernels {

RF_HOST_DEVICE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A cache of one layer: [sink_frames * frame_tokens | window_frames * frame_tokens] tokens.
struct CacheGeometry {
  int64_t sink_frames;
  int64_t window_frames;
  int64_t frame_tokens;

  // Frames that have left the window of a stream of num_frames frames.
  RF_HOST_DEVICE int64_t evicted_frames(int64_t num_frames) const {
    const int64_t evicted = num_frames - sink_frames - window_frames;
    return evicted > 0 ? evicted : 0;
  }

  // Frames a query of the open chunk sees: always a prefix of the buffer.
  RF_HOST_DEVICE int64_t valid_frames(int64_t num_frames) const {
    const int64_t capacity = sink_frames + window_frames;
    return num_frames < capacity ? num_frames : capacity;
  }

  // Slot of the buffer that holds `frame`. Frames are never negative here, so % is floor-mod.
  RF_HOST_DEVICE int64_t slot(int64_t frame) const {
    return frame < sink_frames ? frame : sink_frames + (frame - sink_frames) % window_frames;
  }

  // Sink slot into which `frame` is fused when it leaves the window (sink_frames > 0).
  RF_HOST_DEVICE int64_t fuse_slot(int64_t frame) const { return frame % sink_frames; }

  // Frame number at which the keys of a sink slot are rotated.
  RF_HOST_DEVICE int64_t sink_position(int64_t sink_slot, int64_t num_frames, bool before_window) const {
    return sink_slot + (before_window ? evicted_frames(num_frames) : 0);
  }
};

// a / b for a >= 0, b > 0. Kernels serve fewer than 2**32 tokens, and a 64-bit division costs a GPU a long subroutine.
RF_HOST_DEVICE int64_t quotient(int64_t a, int64_t b) {
#if defined(__CUDA_ARCH__)
  return b > a ? 0 : uint32_t(a) / uint32_t(b);
#else
  return a / b;
#endif
}

// The visibility rule of full-sequence attention, in tokens. Query i belongs to the chunk [begin(i), end(i)).
struct WindowMask {
  int64_t sink_tokens;
  int64_t window_tokens;
  int64_t chunk_tokens;
  int64_t first_chunk_tokens;  // equal to chunk_tokens unless the first chunk has another length
  bool own_chunk;              // false: a query does not see its own chunk

  RF_HOST_DEVICE int64_t chunk_end(int64_t i) const {
    return i < first_chunk_tokens
               ? first_chunk_tokens
               : first_chunk_tokens + (quotient(i - first_chunk_tokens, chunk_tokens) + 1) * chunk_tokens;
  }

  RF_HOST_DEVICE int64_t chunk_begin(int64_t i) const {
    return i < first_chunk_tokens ? 0 : chunk_end(i) - chunk_tokens;
  }

  RF_HOST_DEVICE bool visible(int64_t i, int64_t j) const {
    const int64_t end = chunk_end(i);
    const int64_t limit = own_chunk ? end : chunk_begin(i);
    return j < limit && (j >= end - window_tokens || j < sink_tokens);
  }
};

}  // namespace rfkernels
