// The CPU kernels as torch operators: functions of one request.
#include <algorithm>
#include <array>
#include <limits>
#include <tuple>
#include <utility>
#include <vector>

#include "../cpu/kernels.h"
#include "arguments.h"
#include "shim.h"

namespace rfkernels {
namespace {

void begin_chunk(const requests::BeginChunk& request) { cpu::begin_chunk(arguments_of(request)); }

void write(const requests::Write& request) { cpu::write(arguments_of(request)); }

Tensor rotate(const requests::Rotate& request) {
  const Tensor out = torch::stable::new_empty(request.x, request.x.sizes(), request.dtype);
  cpu::rotate(arguments_of(request, out));
  return out;
}

std::tuple<Tensor, Tensor> redmd_loss(const requests::ReDMD& request) {
  const Tensor& x = request.x;
  ReDMDLoss args = arguments_of(request);
  Tensor grad = request.need_grad ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  args.grad = request.need_grad ? static_cast<char*>(grad.mutable_data_ptr()) : nullptr;
  Tensor loss = torch::stable::new_empty(request.weight, {});
  args.loss = loss.mutable_data_ptr();
  cpu::redmd_loss(args);
  return {loss, grad};
}

// --- a streaming pass ------------------------------------------------------------------------------------------------

Tensor swap(const Tensor& x, int64_t a, int64_t b) { return torch::stable::transpose(x, a, b); }

Tensor part(Tensor x, int64_t dim, int64_t begin, int64_t end) {
  return begin == 0 && end == x.size(dim) ? x : torch::stable::narrow(x, dim, begin, end - begin);
}

// torch's flash attention for CPUs, q [B, H, N, D] over k, v [B, H, M, D] of any strides; out gets q's layout.
std::pair<Tensor, Tensor> flash(const Tensor& q, const Tensor& k, const Tensor& v, double scale) {
  using torch::stable::detail::from;
  std::array<StableIValue, 7> stack{
      from(q), from(k), from(v), from(0.0), from(false), from(OptionalTensor()), from(std::optional<double>(scale))};
  call_operator("aten::_scaled_dot_product_flash_attention_for_cpu", stack);
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

Tensor as_strided(const Tensor& x, std::vector<int64_t> sizes, std::vector<int64_t> strides) {
  using torch::stable::detail::from;
  std::array<StableIValue, 4> stack{from(x), from(sizes), from(strides), from(std::optional<int64_t>())};
  call_operator("aten::as_strided", stack);
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Streams of one age: which samples, the rows of the chunk that they do not have, the tokens of the cache that they
// see.
struct Streams {
  int64_t begin, end, missing, tokens;
};

std::vector<Streams> same_age(const int64_t* ages, int64_t batch, int64_t open, const CacheGeometry& geometry) {
  const bool one = std::all_of(ages, ages + batch, [&](int64_t age) { return age == ages[0]; });
  std::vector<Streams> found;
  for (int64_t begin = 0, step = one ? batch : 1; begin < batch; begin += step)
    found.push_back({begin, begin + step, std::max<int64_t>(0, open - ages[begin]) * geometry.frame_tokens,
                     geometry.valid_frames(ages[begin]) * geometry.frame_tokens});
  return found;
}

// The chunk's queries at their frame numbers, in the dtype of the cache. by_head: heads lie one after another.
Tensor rotated(const requests::StreamingAttention& request, const int64_t* ages, bool by_head) {
  const Tensor& q = request.q;
  const int64_t batch = q.size(0), tokens = q.size(1), heads = q.size(2), head_dim = q.size(3);
  const int64_t frame_tokens = request.write.geometry.frame_tokens, open = tokens / frame_tokens;
  const ScalarType dtype = request.write.cache.k.scalar_type();
  const Tensor out = by_head ? swap(torch::stable::new_empty(q, {batch, heads, tokens, head_dim}, dtype), 1, 2)
                             : torch::stable::new_empty(q, q.sizes(), dtype);
  std::vector<int64_t> frames;
  for (int64_t sample = 0; sample < batch; ++sample)
    for (int64_t f = 0; f < open; ++f) frames.push_back(ages[sample] - open + f);
  Rotate args = rotate_view(q, out, request.write.rope, frame_tokens);
  args.frames = frames.data();
  args.frames_batch_stride = args.entries = open;
  cpu::rotate(args);
  return out;
}

// Grouped heads of one sample: KV heads stand in for the batch, and the queries of a group share its keys through a
// stride of zero. out [N, H_q, D] and lse [H_q, N] are written.
void attend_grouped(const Tensor& q, const Tensor& k, const Tensor& v, double scale, Tensor out, Tensor lse) {
  const int64_t rows = q.size(0), kv_heads = k.size(1), group = q.size(1) / kv_heads, head_dim = q.size(2);
  const auto by_group = [&](const Tensor& x) {  // [N, H_q, D] -> [H_kv, G, N, D]
    return as_strided(x, {kv_heads, group, rows, head_dim},
                      {x.stride(1) * group, x.stride(1), x.stride(0), x.stride(2)});
  };
  const auto shared = [&](const Tensor& x) {  // [M, H_kv, D] -> [H_kv, G, M, D]
    return as_strided(x, {kv_heads, group, x.size(0), head_dim}, {x.stride(1), 0, x.stride(0), x.stride(2)});
  };
  const auto [of_groups, normalisers] = flash(by_group(q), shared(k), shared(v), scale);
  Tensor target = by_group(out);
  torch::stable::copy_(target, of_groups);
  target = as_strided(lse, {kv_heads, group, rows}, {lse.stride(0) * group, lse.stride(0), lse.stride(1)});
  torch::stable::copy_(target, normalisers);
}

// Writes the chunk's K and V, then attends over the valid prefix of the layer: one call where a Python path would make
// a dozen, which counts on small frames. Rows of missing frames get zeros and -inf.
std::tuple<Tensor, Tensor> streaming_attention(const requests::StreamingAttention& request) {
  const auto& [q, write_request, scale, full, return_lse] = request;
  const Tensor &k = write_request.cache.k, &v = write_request.cache.v;
  const Write args = arguments_of(write_request);
  const TensorView vq = view(q, k);
  STD_TORCH_CHECK(vq.layers == 1 && vq.batch == args.new_k.batch && vq.tokens == args.new_k.tokens &&
                      vq.head_dim == args.new_k.head_dim && args.new_k.heads > 0 && vq.heads % args.new_k.heads == 0,
                  "q must be [batch, tokens, heads, head_dim] of the new k, with a multiple of its heads");
  cpu::write(args);
  const CacheGeometry& geometry = write_request.geometry;
  const std::vector<Streams> groups = same_age(args.num_frames, vq.batch, vq.tokens / geometry.frame_tokens, geometry);
  const bool grouped = vq.heads != args.new_k.heads;
  if (groups.size() == 1 && groups[0].missing == 0 && !grouped && vq.tokens > 0) {
    // torch's kernel is a few percent faster on half types where queries, too, lie head by head: worth a copy of the
    // result.
    const Tensor queries = swap(rotated(request, args.num_frames, is_half(args.cache.k.dtype)), 1, 2);
    const auto prefix = [&](const Tensor& x) { return swap(part(x, 1, 0, groups[0].tokens), 1, 2); };
    auto [out, lse] = flash(queries, prefix(k), prefix(v), scale);
    out = swap(out, 1, 2);
    return {torch::stable::contiguous(out), torch::stable::contiguous(lse)};
  }
  const Tensor queries = rotated(request, args.num_frames, false);
  Tensor out = torch::stable::new_zeros(queries, queries.sizes());
  Tensor lse = torch::stable::new_empty(queries, {vq.batch, vq.heads, vq.tokens},
                                        args.cache.k.dtype == DType::Float64 ? ScalarType::Double : ScalarType::Float);
  torch::stable::fill_(lse, -std::numeric_limits<double>::infinity());
  for (const auto& [begin, end, missing, tokens] : groups) {
    if (missing >= vq.tokens) continue;
    const auto rows_of = [&, begin = begin, end = end, missing = missing](const Tensor& x, int64_t dim) {
      return part(part(x, 0, begin, end), dim, missing, vq.tokens);
    };
    const auto prefix = [&, begin = begin, end = end, tokens = tokens](const Tensor& x) {
      return part(part(x, 0, begin, end), 1, 0, tokens);
    };
    const Tensor q_rows = rows_of(queries, 1), keys = prefix(k), values = prefix(v);
    Tensor out_rows = rows_of(out, 1), lse_rows = rows_of(lse, 2);
    if (!grouped) {
      const auto [found, normalisers] = flash(swap(q_rows, 1, 2), swap(keys, 1, 2), swap(values, 1, 2), scale);
      torch::stable::copy_(out_rows, swap(found, 1, 2));
      torch::stable::copy_(lse_rows, normalisers);
      continue;
    }
    for (int64_t i = 0; i < end - begin; ++i) {
      const auto sample = [&](const Tensor& x) { return torch::stable::select(x, 0, i); };
      attend_grouped(sample(q_rows), sample(keys), sample(values), scale, sample(out_rows), sample(lse_rows));
    }
  }
  return {out, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rfkernels_native, CPU, m) {
  m.impl("begin_chunk", boxed<begin_chunk>);
  m.impl("write", boxed<write>);
  m.impl("rotate", boxed<rotate>);
  m.impl("streaming_attention", boxed<streaming_attention>);
  m.impl("redmd_loss", boxed<redmd_loss>);
}

}  // namespace rfkernels
