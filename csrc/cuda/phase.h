// The rotary phase of a pair at a frame.
#pragma once
#include <cstdint>

namespace rfkernels::cuda {

// cos (x) and sin (y). Reduced in turns in double, exact at any frame; the rest is float: double sincos would need a
// stack frame.
__device__ __forceinline__ float2 frame_phase(int64_t frame, double turns_per_frame) {
  double turns = double(frame) * turns_per_frame;
  turns -= rint(turns);
  float2 phase;
  sincospif(2.0f * float(turns), &phase.y, &phase.x);
  return phase;
}

}  // namespace rfkernels::cuda
