// The Re-DMD loss in two passes over memory: the first finds each sample's normaliser, the second forms the
// gradient, its square and, on the way, what autograd will want. Sums go block by block in a fixed order, so the
// result does not depend on the number of threads.
#include <limits>
#include <numeric>
#include <vector>

#include "kernels.h"
#include "parallel.h"

namespace rfkernels::cpu {
namespace {

constexpr int64_t kBlock = 1024;  // elements: the rows of a block stay in the L1 cache between its short loops
constexpr int64_t kLanes = 16;    // independent partial sums, so that the loop vectorizes

// Up to five rows of one block, converted to Acc only where they are not Acc already.
template <class Acc>
struct Block {
  Acc buffer[5][kBlock];
  Acc out[kBlock];

  RF_INLINE const Acc* load(int which, const LatentView& view, int64_t start, int64_t n) {
    return read_row(view.data + start * item_size(view.dtype), view.dtype, n, buffer[which]);
  }
};

template <class Acc, class Value>
RF_INLINE double sum_block(int64_t n, Value value) {
  Acc lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += value(i + lane);
  for (; i < n; ++i) lanes[0] += value(i);
  return std::accumulate(lanes, lanes + kLanes, 0.0);
}

// cond + scale * (cond - uncond); without guidance `uncond` is `cond`.
template <class Acc>
RF_INLINE Acc guided(const Acc* cond, const Acc* uncond, Acc scale, int64_t i) {
  return cond[i] + scale * (cond[i] - uncond[i]);
}

template <class Acc>
RF_INLINE double distance_block(const ReDMDLoss& a, int64_t start, int64_t n, Block<Acc>& block) {
  const Acc scale = Acc(a.guidance_scale);
  const Acc* x = block.load(0, a.x, start, n);
  const Acc* cond = block.load(1, a.real_cond, start, n);
  const Acc* uncond = a.real_uncond.data == nullptr ? cond : block.load(2, a.real_uncond, start, n);
  return sum_block<Acc>(n, [=](int64_t i) { return std::abs(x[i] - guided(cond, uncond, scale, i)); });
}

// Returns the sum of grad**2 inside the mask; writes factor * grad.
template <class Acc>
RF_INLINE double gradient_block(const ReDMDLoss& a, int64_t start, int64_t n, Acc norm, Acc factor, Block<Acc>& block) {
  const Acc scale = Acc(a.guidance_scale), fake_scale = Acc(a.fake_guidance_scale), inverse = Acc(1) / norm;
  const Acc* fake = block.load(0, a.fake, start, n);
  const Acc* cond = block.load(1, a.real_cond, start, n);
  const Acc* uncond = a.real_uncond.data == nullptr ? cond : block.load(2, a.real_uncond, start, n);
  const Acc* fake_uncond = a.fake_uncond.data == nullptr ? fake : block.load(3, a.fake_uncond, start, n);
  char* target = a.grad == nullptr ? nullptr : a.grad + start * item_size(a.x.dtype);
  const bool direct = target != nullptr && a.x.dtype == accumulator_dtype<Acc>();
  Acc* __restrict__ grad = direct ? reinterpret_cast<Acc*>(target) : block.out;
  for (int64_t i = 0; i < n; ++i) {
    const Acc g = (guided(fake, fake_uncond, fake_scale, i) - guided(cond, uncond, scale, i)) * inverse;
    grad[i] = std::abs(g) <= std::numeric_limits<Acc>::max() ? g : Acc(0);
  }
  if (a.mask != nullptr)
    for (int64_t i = 0; i < n; ++i) grad[i] *= Acc(a.mask[start + i]);
  const double sum = sum_block<Acc>(n, [=](int64_t i) { return grad[i] * grad[i]; });
  if (target != nullptr) {
    for (int64_t i = 0; i < n; ++i) grad[i] *= factor;
    if (!direct) store_row(grad, a.x.dtype, n, target);
  }
  return sum;
}

RF_INLINE int64_t count_block(const uint8_t* mask, int64_t n) {
  int32_t count = 0;  // n is at most kBlock: the narrow sum vectorizes
  for (int64_t i = 0; i < n; ++i) count += mask[i];
  return count;
}

// Overloads, because a clone per instruction set needs a plain function.
RF_VECTORIZED double distance(const ReDMDLoss& a, int64_t start, int64_t n, Block<float>& block) {
  return distance_block(a, start, n, block);
}
RF_VECTORIZED double distance(const ReDMDLoss& a, int64_t start, int64_t n, Block<double>& block) {
  return distance_block(a, start, n, block);
}
RF_VECTORIZED double gradient(const ReDMDLoss& a, int64_t start, int64_t n, float norm, float factor,
                              Block<float>& block) {
  return gradient_block(a, start, n, norm, factor, block);
}
RF_VECTORIZED double gradient(const ReDMDLoss& a, int64_t start, int64_t n, double norm, double factor,
                              Block<double>& block) {
  return gradient_block(a, start, n, norm, factor, block);
}
RF_VECTORIZED int64_t count_true(const uint8_t* mask, int64_t n) { return count_block(mask, n); }

template <class Acc>
void run(const ReDMDLoss& a) {
  const int64_t per_sample = (a.elements + kBlock - 1) / kBlock, blocks = a.batch * per_sample;
  std::vector<double> sums(size_t(blocks), 0.0);
  std::vector<int64_t> counts(size_t(blocks), 0);
  const auto for_blocks = [&](auto&& body) {
    parallel_rows(blocks, kBlock, [&](int64_t begin, int64_t end) {
      Block<Acc> block;
      for (int64_t b = begin; b < end; ++b) {
        const int64_t offset = b % per_sample * kBlock;
        body(b, b / per_sample * a.elements + offset, std::min(kBlock, a.elements - offset), block);
      }
    });
  };
  for_blocks([&](int64_t b, int64_t start, int64_t n, Block<Acc>& block) {
    sums[size_t(b)] = distance(a, start, n, block);
    counts[size_t(b)] = a.mask == nullptr ? n : count_true(a.mask + start, n);
  });
  const Acc selected = Acc(std::max<int64_t>(1, std::accumulate(counts.begin(), counts.end(), int64_t(0))));
  std::vector<Acc> norms(size_t(a.batch));
  for (int64_t sample = 0; sample < a.batch; ++sample) {
    const auto first = sums.begin() + sample * per_sample;
    norms[size_t(sample)] = Acc(std::accumulate(first, first + per_sample, 0.0) / double(a.elements));
  }
  const Acc* weight = static_cast<const Acc*>(a.weight);
  for_blocks([&](int64_t b, int64_t start, int64_t n, Block<Acc>& block) {
    const int64_t sample = b / per_sample;
    sums[size_t(b)] = gradient(a, start, n, norms[size_t(sample)], weight[sample] / selected, block);
  });
  double loss = 0.0;
  for (int64_t sample = 0; sample < a.batch; ++sample) {
    const auto first = sums.begin() + sample * per_sample;
    loss += 0.5 * double(weight[sample]) * std::accumulate(first, first + per_sample, 0.0) / double(selected);
  }
  *static_cast<Acc*>(a.loss) = Acc(loss);
}

}  // namespace

void redmd_loss(const ReDMDLoss& args) {
  if (args.x.dtype == DType::Float64)
    run<double>(args);
  else
    run<float>(args);
}

}  // namespace rfkernels::cpu
