// Attention backward on CUDA: three launches (see cuda/attention_backward_params.h); queries and keys come rotated.
#include <tuple>

#include "../../cuda/attention/backward_params.h"
#include "arguments.h"

// A kernel is a line here.
#define RF_BACKWARD_KERNELS(X)                                                           \
  X(rf_attention_grad_q_fp16_d64, rf_attention_grad_kv_fp16_d64, DType::Float16, 64)     \
  X(rf_attention_grad_q_fp16_d80, rf_attention_grad_kv_fp16_d80, DType::Float16, 80)     \
  X(rf_attention_grad_q_fp16_d96, rf_attention_grad_kv_fp16_d96, DType::Float16, 96)     \
  X(rf_attention_grad_q_fp16_d128, rf_attention_grad_kv_fp16_d128, DType::Float16, 128)  \
  X(rf_attention_grad_q_fp16_d256, rf_attention_grad_kv_fp16_d256, DType::Float16, 256)  \
  X(rf_attention_grad_q_bf16_d64, rf_attention_grad_kv_bf16_d64, DType::BFloat16, 64)    \
  X(rf_attention_grad_q_bf16_d80, rf_attention_grad_kv_bf16_d80, DType::BFloat16, 80)    \
  X(rf_attention_grad_q_bf16_d96, rf_attention_grad_kv_bf16_d96, DType::BFloat16, 96)    \
  X(rf_attention_grad_q_bf16_d128, rf_attention_grad_kv_bf16_d128, DType::BFloat16, 128) \
  X(rf_attention_grad_q_bf16_d256, rf_attention_grad_kv_bf16_d256, DType::BFloat16, 256)
#define RF_DECLARE_BOTH(grad_q, grad_kv, dtype, head_dim) RF_DECLARE_KERNEL(grad_q) RF_DECLARE_KERNEL(grad_kv)
RF_BACKWARD_KERNELS(RF_DECLARE_BOTH)
RF_DECLARE_KERNEL(rf_attention_delta_fp16)
RF_DECLARE_KERNEL(rf_attention_delta_bf16)

namespace rfkernels::cuda {
namespace {

struct BackwardKernels {
  Kernel grad_q, grad_kv;
  DType dtype;
  int head_dim;
};

#define RF_ROW(grad_q, grad_kv, dtype, head_dim) {RF_KERNEL(grad_q), RF_KERNEL(grad_kv), dtype, head_dim},
const BackwardKernels kBackward[] = {RF_BACKWARD_KERNELS(RF_ROW)};

const BackwardKernels& backward_kernels(DType dtype, int64_t head_dim) {
  for (const BackwardKernels& row : kBackward)
    if (row.dtype == dtype && row.head_dim == head_dim && available(row.grad_q)) return row;
  STD_TORCH_CHECK(false, "no CUDA attention kernel was compiled in for this dtype and head_dim ", head_dim);
}

// gridDim.x is below 2**31.
void launch(const Kernel& kernel, const Launch& plan, const auto& params, const std::vector<Tensor>& tensors,
            const std::vector<Tensor>& results) {
  STD_TORCH_CHECK(plan.blocks < (int64_t(1) << 31), "too many thread blocks");
  launch(kernel, {plan.blocks}, plan.threads, plan.shared_bytes, params, tensors, results);
}

void check_gradients(const requests::AttentionBackward& from, const TensorView& q, const TensorView& k) {
  const auto& [grad_out, grad_lse, out, lse] = from.cotangents;
  const auto like_q = [&](const Tensor& tensor) {
    const TensorView x = view(tensor, from.keys.k);
    return x.dtype == k.dtype && x.batch == q.batch && x.tokens == q.tokens && x.heads == q.heads &&
           x.head_dim == q.head_dim;
  };
  const auto normalisers = [&](const Tensor& x) {
    check_same_device(x, from.keys.k);
    return x.scalar_type() == ScalarType::Float && x.dim() == 3 && x.size(0) == q.batch && x.size(1) == q.heads &&
           x.size(2) == q.tokens;
  };
  STD_TORCH_CHECK(!from.keys.num_frames || from.keys.own_k, "a cache's prefix has no gradients: give own_k and own_v");
  STD_TORCH_CHECK(is_half(k.dtype) && like_q(from.q) && like_q(from.sink_q) && like_q(grad_out) && like_q(out),
                  "q, sink_q, out and grad_out must have one shape and the half type of v");
  STD_TORCH_CHECK(normalisers(lse) && lse.is_contiguous() && normalisers(grad_lse),
                  "lse and grad_lse must be float32 [batch, heads, queries]");
}

// Two numbers a query row, for the kernels that follow: the only memory beside the outputs.
Tensor make_row_terms(const requests::Cotangents& from, const TensorView& q, const Tensor& k) {
  const auto& [grad_out, grad_lse, out, lse] = from;
  const Tensor row_terms = torch::stable::new_empty(lse, {q.batch, q.heads, q.tokens, 2});
  const DeltaParams delta{rows(view(out, k)),
                          rows(view(grad_out, k)),
                          lse.const_data_ptr<float>(),
                          grad_lse.const_data_ptr<float>(),
                          grad_lse.stride(0),
                          grad_lse.stride(1),
                          grad_lse.stride(2),
                          row_terms.mutable_data_ptr<float>(),
                          int32_t(q.batch),
                          int32_t(q.tokens),
                          int32_t(q.heads),
                          int32_t(q.head_dim)};
  launch(dtype_of(k) == DType::Float16 ? RF_KERNEL(rf_attention_delta_fp16) : RF_KERNEL(rf_attention_delta_bf16),
         delta_launch(delta), delta, {out, grad_out, lse, grad_lse}, {row_terms});
  return row_terms;
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(const requests::AttentionBackward& request,
                                                      const std::vector<Tensor>& given) {
  const auto& [cotangents, q, sink_q, keys, rope, scale, q_type, k_type, v_type] = request;
  const Tensor &k = keys.k, &own = keys.own_k ? *keys.own_k : keys.k;
  BackwardParams params{};
  params.problem = attention_problem(q, keys, rope, scale);
  const AttentionProblem& p = params.problem;
  const TensorView vq = view(q, k), vk = view(k, k);
  check_gradients(request, vq, vk);
  const BackwardKernels& kernels = backward_kernels(vk.dtype, vk.head_dim);

  if (vq.batch * vq.heads * vq.tokens == 0 || own.numel() == 0)
    return {torch::stable::new_zeros(q, q.sizes(), q_type), torch::stable::new_zeros(k, own.sizes(), k_type),
            torch::stable::new_zeros(k, own.sizes(), v_type)};
  const Tensor grad_q = torch::stable::new_empty(q, q.sizes(), q_type);
  const Tensor grad_k = torch::stable::new_empty(k, own.sizes(), k_type);
  const Tensor grad_v = torch::stable::new_empty(k, own.sizes(), v_type);
  const Tensor row_terms = make_row_terms(cotangents, vq, k);
  params.sink_q = rows(view(sink_q, k)), params.grad_out = rows(view(cotangents.grad_out, k));
  params.row_terms = row_terms.const_data_ptr<float>();
  params.grad_q = grad_q.mutable_data_ptr(), params.grad_q_type = element_type(dtype_of(grad_q));
  params.grad_k = grad_k.mutable_data_ptr(), params.grad_k_type = element_type(dtype_of(grad_k));
  params.grad_v = grad_v.mutable_data_ptr(), params.grad_v_type = element_type(dtype_of(grad_v));
  std::vector<Tensor> tensors = given;
  tensors.push_back(row_terms);
  launch(kernels.grad_q, grad_q_launch(p, int(vk.head_dim)), params, tensors, {grad_q});
  launch(kernels.grad_kv, grad_kv_launch(p, int(vk.head_dim)), params, tensors, {grad_k, grad_v});
  return {grad_q, grad_k, grad_v};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(RF_CUDA_NAMESPACE, RF_DISPATCH_KEY, m) {
  m.impl("attention_backward", boxed<attention_backward>);
}

}  // namespace rfkernels::cuda
