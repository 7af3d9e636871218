// What only the CUDA host implements: attention over given keys, forward and backward, which the Python side of the
// backend puts together for contexts and full sequences. The order of the fields is that of
// rfkernels/backends/cuda/requests.py.
#pragma once
#include "../requests.h"

namespace rfkernels::requests {

// What queries meet. With num_frames the prefix of a cache (no own_k) or past frames and the open chunk's own keys;
// without it a full sequence under the mask.
struct Keys {
  Tensor k, v;
  OptionalTensor own_k, own_v, num_frames;
  int64_t frame_tokens, capacity;
  WindowMask mask;
  static Keys read(Reader& r) {
    return {r.tensor(),          r.tensor(),  r.optional_tensor(), r.optional_tensor(),
            r.optional_tensor(), r.integer(), r.integer(),         read_mask(r)};
  }
};

struct AttentionForward {
  Tensor q;
  Keys keys;
  Rope rope;
  double scale;
  static AttentionForward read(Reader& r) { return {r.tensor(), Keys::read(r), Rope::read(r), r.number()}; }
};

struct Cotangents {
  Tensor grad_out, grad_lse, out, lse;
  static Cotangents read(Reader& r) { return {r.tensor(), r.tensor(), r.tensor(), r.tensor()}; }
};

// q: rotated; sink_q: rotated as sinks outside the window meet it. The types are those of the gradients.
struct AttentionBackward {
  Cotangents cotangents;
  Tensor q, sink_q;
  Keys keys;
  Rope rope;
  double scale;
  ScalarType q_type, k_type, v_type;
  static AttentionBackward read(Reader& r) {
    return {Cotangents::read(r), r.tensor(), r.tensor(), Keys::read(r), Rope::read(r),
            r.number(),          r.type(),   r.type(),   r.type()};
  }
};

}  // namespace rfkernels::requests
