// cos/sin of the rotary angles of one token: frame pairs first, then row and column pairs.
#pragma once
#include <cmath>
#include <vector>

#include "kernels.h"

namespace rfkernels::cpu {

template <class Acc>
class TokenPhases {
 public:
  explicit TokenPhases(const RopeView& rope)
      : rope_(rope), pairs_(rope.frame_pairs + rope.spatial_pairs), values_(size_t(2 * pairs_)) {}

  // Angles are reduced in turns, in double: exact to 1e-10 even at frame 10**6.
  void set_frame(int64_t frame) {
    if (frame == frame_) return;
    frame_ = frame;
    for (int64_t i = 0; i < rope_.frame_pairs; ++i) {
      double turns = double(frame) * rope_.frame_turns[i];
      turns -= std::nearbyint(turns);
      constexpr double kTwoPi = 6.283185307179586476925286766559;
      values_[size_t(i)] = Acc(std::cos(kTwoPi * turns));
      values_[size_t(pairs_ + i)] = Acc(std::sin(kTwoPi * turns));
    }
  }
  void set_token(int64_t token) {
    if (rope_.spatial_pairs == 0) return;
    const Acc* table = static_cast<const Acc*>(rope_.spatial) + token * rope_.spatial_pairs * 2;
    Acc* cos = values_.data() + rope_.frame_pairs;
    for (int64_t i = 0; i < rope_.spatial_pairs; ++i) {
      cos[i] = table[2 * i];
      cos[pairs_ + i] = table[2 * i + 1];
    }
  }
  const Acc* cos() const { return values_.data(); }
  const Acc* sin() const { return values_.data() + pairs_; }
  int64_t pairs() const { return pairs_; }

 private:
  RopeView rope_;
  int64_t pairs_;
  int64_t frame_ = INT64_MIN;
  std::vector<Acc> values_;
};

}  // namespace rfkernels::cpu
