// The operations as plain structs: host code fills them in from requests (host/arguments.h), CPU loops (cpu/) and CUDA
// kernels (cuda/) take them. No torch header.
#pragma once
#include <cstdint>

#include "geometry.h"

namespace rfkernels {

enum class DType : int8_t { Float16, BFloat16, Float32, Float64 };

RF_HOST_DEVICE int64_t item_size(DType dtype) { return dtype == DType::Float64 ? 8 : dtype == DType::Float32 ? 4 : 2; }
RF_HOST_DEVICE bool is_half(DType dtype) { return item_size(dtype) == 2; }

// A strided [layers, batch, tokens, heads, D] tensor whose last dimension is contiguous. data == nullptr: absent.
struct TensorView {
  char* data = nullptr;
  DType dtype = DType::Float32;
  bool aligned = true;  // every row begins at a multiple of 16 bytes
  int64_t layers = 1, batch = 1, tokens = 0, heads = 0, head_dim = 0;
  int64_t layer_stride = 0, batch_stride = 0, token_stride = 0, head_stride = 0;  // in bytes

  RF_HOST_DEVICE explicit operator bool() const { return data != nullptr; }
  RF_HOST_DEVICE char* row(int64_t layer, int64_t sample, int64_t token, int64_t head) const {
    return data + layer * layer_stride + sample * batch_stride + token * token_stride + head * head_stride;
  }
};

// Rotary tables (rfkernels/rope.py): frequencies of the frame axis in turns per frame, and cos/sin of the row and
// column pairs for every token of a frame, float32 (float64 for float64 caches).
struct RopeView {
  bool present = false;
  const double* frame_turns = nullptr;
  int64_t frame_pairs = 0;
  const void* spatial = nullptr;  // [frame_tokens, spatial_pairs, 2]
  int64_t spatial_pairs = 0;
  bool half_split = false;

  RF_HOST_DEVICE explicit operator bool() const { return present; }
};

struct Cache {
  TensorView k, v;
  TensorView sink_k, sink_v;  // accumulators; absent where the cache itself holds them
  CacheGeometry geometry;
  RopeView rope;
};

struct BeginChunk {
  Cache cache;
  const int64_t* num_frames;  // [batch], before the new frames
  const bool* advancing;      // [batch] or nullptr: all streams advance
  int64_t new_frames;
  const void* decay;  // [2, heads]: alpha, 1 - alpha in the accumulators' precision; nullptr: a static sink
  bool before_window;
};

struct Write {
  Cache cache;  // one layer
  TensorView new_k, new_v;
  const int64_t* num_frames;  // [batch], the open frames included
};

struct Rotate {
  TensorView x, out;
  const int64_t* frames;  // [batch or 1, tokens / tokens_per_frame_entry]
  int64_t frames_batch_stride, entries;
  int64_t first_token;  // of the rows, within a frame
  int64_t frame_tokens;
  RopeView rope;    // absent, for the CPU only: x is rounded to out's type
  DType precision;  // of the table and the arithmetic: Float32 or Float64
  bool inverse;
};

// Contiguous [batch, elements] inputs of the Re-DMD loss. data == nullptr: absent.
struct LatentView {
  const char* data = nullptr;
  DType dtype = DType::Float32;
};

// weight, loss and the arithmetic are float32 (float64 where x is float64).
struct ReDMDLoss {
  LatentView x, fake, real_cond, real_uncond, fake_uncond;
  const uint8_t* mask;  // [batch, elements] of 0 and 1, or nullptr
  const void* weight;   // [batch]
  int64_t batch, elements;
  double guidance_scale, fake_guidance_scale;
  char* grad;  // [batch, elements] in x's dtype, or nullptr: the loss alone
  void* loss;  // one number
};

}  // namespace rfkernels
