"""The operators: every schema of the package, their fakes and their gradients. Kernels are elsewhere.

``torch.ops.rfkernels.*`` carry the backend's name and call its functions (``backends/``).
``torch.ops.rfkernels_native.*``
are what compiled code implements, by device: C++ (and CUDA) only adds kernels to the schemas below.
"""

from __future__ import annotations

import torch

from . import backends, reference
from .arguments import CacheTensors, Past, accumulate_dtype
from .geometry import CacheGeometry, WindowMask
from .rope import RopeTables

_CACHE = "Tensor(a!) k, Tensor(b!) v, Tensor(c!)? sink_k, Tensor(d!)? sink_v"
_ROPE = "Tensor? frame_turns, Tensor? spatial, bool half_split"
_GEOMETRY = "int sink_frames, int window_frames, int frame_tokens"
_BEGIN = f"{_CACHE}, Tensor num_frames, int new_frames, Tensor? advancing, Tensor? decay, {_ROPE}, {_GEOMETRY}, " + (
    "bool before_window"
)
_WRITE = f"{_CACHE}, Tensor num_frames, Tensor new_k, Tensor new_v, {_ROPE}, {_GEOMETRY}"
_STREAM = f"Tensor q, Tensor new_k, Tensor new_v, {_CACHE}, Tensor num_frames, {_ROPE}, {_GEOMETRY}, float scale"
_CHUNK = f"Tensor[] past_k, Tensor[] past_v, Tensor num_frames, bool full, ScalarType dtype, {_ROPE}, {_GEOMETRY}, " + (
    "float scale, str backend"
)
_WINDOW = (
    "int sink_tokens, int window_tokens, int chunk_tokens, int first_chunk_tokens, bool own_chunk, "
    f"{_ROPE}, float scale, str backend"
)
_GRADS = "Tensor grad_out, Tensor grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse"
_LOSS = (
    "Tensor x, Tensor fake, Tensor real_cond, Tensor? real_uncond, Tensor? fake_uncond, Tensor weight, Tensor? mask, "
    "float guidance_scale, float fake_guidance_scale, bool need_grad"
)

_NATIVE_SCHEMAS = {
    "begin_chunk": f"({_BEGIN}) -> ()",
    "write": f"({_WRITE}) -> ()",
    "rotate": "(Tensor x, Tensor frames, int first_token, int frame_tokens, Tensor frame_turns, Tensor spatial, "
    "bool half_split, bool inverse, ScalarType dtype) -> Tensor",
    "streaming_attention": f"({_STREAM}) -> (Tensor out, Tensor lse)",
    "redmd_loss": f"({_LOSS}) -> (Tensor loss, Tensor grad)",
    # CUDA only. num_frames: keys are a cache's prefix, or with own_k, own_v a past and the open chunk's own; without
    # num_frames a full sequence under the mask. q comes un-rotated, keys rotated.
    "attention_forward": "(Tensor q, Tensor k, Tensor v, Tensor? own_k, Tensor? own_v, Tensor? num_frames, "
    "int frame_tokens, int capacity, int sink_tokens, int window_tokens, int chunk_tokens, int first_chunk_tokens, "
    f"bool own_chunk, {_ROPE}, float scale) -> (Tensor out, Tensor lse)",
    # q, sink_q (queries as sinks outside their window meet them) and keys come rotated; gradients are turned back.
    "attention_backward": "(Tensor grad_out, Tensor grad_lse, Tensor out, Tensor lse, Tensor q, Tensor sink_q, "
    "Tensor k, Tensor v, Tensor? own_k, Tensor? own_v, Tensor? num_frames, int frame_tokens, int capacity, "
    f"int sink_tokens, int window_tokens, int chunk_tokens, int first_chunk_tokens, bool own_chunk, {_ROPE}, "
    "float scale, ScalarType q_type, ScalarType k_type, ScalarType v_type) -> "
    "(Tensor grad_q, Tensor grad_k, Tensor grad_v)",
}
_SCHEMAS = {
    "begin_chunk": f"({_BEGIN}, str backend) -> ()",
    "write": f"({_WRITE}, str backend) -> ()",
    "streaming_attention": f"({_STREAM}, bool full, bool return_lse, str backend) -> (Tensor out, Tensor lse)",
    "chunk_attention": f"(Tensor q, Tensor k, Tensor v, {_CHUNK}) -> (Tensor out, Tensor lse)",
    "chunk_attention_backward": f"({_GRADS}, {_CHUNK}) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)",
    "sink_window_attention": f"(Tensor q, Tensor k, Tensor v, {_WINDOW}) -> (Tensor out, Tensor lse)",
    "sink_window_attention_backward": f"({_GRADS}, {_WINDOW}) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)",
    "merge_attention": "(Tensor out1, Tensor lse1, Tensor out2, Tensor lse2) -> (Tensor out, Tensor lse)",
    "redmd_loss": f"({_LOSS}, str backend) -> (Tensor loss, Tensor grad)",
}

_NATIVE = torch.library.Library("rfkernels_native", "DEF")
_PUBLIC = torch.library.Library("rfkernels", "DEF")
for _library, _schemas in ((_NATIVE, _NATIVE_SCHEMAS), (_PUBLIC, _SCHEMAS)):
    for _name, _schema in _schemas.items():
        _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))


def _rope(frame_turns, spatial, half_split) -> RopeTables | None:
    return None if frame_turns is None else RopeTables(frame_turns, spatial, half_split)


# --- kernels: unpack, look up the backend, call -----------------------------------------------------------------------


def _begin_chunk(
    k, v, sink_k, sink_v, num_frames, new_frames, advancing, decay, frame_turns, spatial, half_split, sink_frames,
    window_frames, frame_tokens, before_window, backend,
):  # fmt: skip
    backends.get(backend).begin_chunk(
        CacheTensors(k, v, sink_k, sink_v), num_frames, new_frames, advancing, decay,
        _rope(frame_turns, spatial, half_split), CacheGeometry(sink_frames, window_frames, frame_tokens), before_window,
    )  # fmt: skip


def _write(
    k, v, sink_k, sink_v, num_frames, new_k, new_v, frame_turns, spatial, half_split, sink_frames, window_frames,
    frame_tokens, backend,
):  # fmt: skip
    backends.get(backend).write(
        CacheTensors(k, v, sink_k, sink_v), num_frames, new_k, new_v, _rope(frame_turns, spatial, half_split),
        CacheGeometry(sink_frames, window_frames, frame_tokens),
    )  # fmt: skip


def _streaming_attention(
    q, new_k, new_v, k, v, sink_k, sink_v, num_frames, frame_turns, spatial, half_split, sink_frames, window_frames,
    frame_tokens, scale, full, return_lse, backend,
):  # fmt: skip
    out, lse = backends.get(backend).streaming_attention(
        q, new_k, new_v, CacheTensors(k, v, sink_k, sink_v), num_frames, _rope(frame_turns, spatial, half_split),
        CacheGeometry(sink_frames, window_frames, frame_tokens), scale, full, return_lse,
    )  # fmt: skip
    return out, lse if return_lse else lse.new_empty(0)


def _chunk_arguments(
    past_k, past_v, num_frames, full, dtype, frame_turns, spatial, half_split, sink_frames, window_frames, frame_tokens,
    scale, backend,
):  # fmt: skip
    past = Past(past_k, past_v, num_frames, full, dtype)
    geometry = CacheGeometry(sink_frames, window_frames, frame_tokens)
    return backends.get(backend), (past, _rope(frame_turns, spatial, half_split), geometry, scale)


def _chunk_attention(q, k, v, *rest):
    module, arguments = _chunk_arguments(*rest)
    return module.chunk_attention(q, k, v, *arguments)


def _chunk_attention_backward(grad_out, grad_lse, q, k, v, out, lse, *rest):
    module, arguments = _chunk_arguments(*rest)
    return module.chunk_attention_backward(grad_out, grad_lse, q, k, v, out, lse, *arguments)


def _window_arguments(
    sink_tokens, window_tokens, chunk_tokens, first_chunk_tokens, own_chunk, frame_turns, spatial, half_split, scale,
    backend,
):  # fmt: skip
    mask = WindowMask(sink_tokens, window_tokens, chunk_tokens, first_chunk_tokens, own_chunk)
    return backends.get(backend), (_rope(frame_turns, spatial, half_split), mask, scale)


def _sink_window_attention(q, k, v, *rest):
    module, arguments = _window_arguments(*rest)
    return module.sink_window_attention(q, k, v, *arguments)


def _sink_window_attention_backward(grad_out, grad_lse, q, k, v, out, lse, *rest):
    module, arguments = _window_arguments(*rest)
    return module.sink_window_attention_backward(grad_out, grad_lse, q, k, v, out, lse, *arguments)


def _redmd_loss(*arguments):
    *rest, backend = arguments
    return backends.get(backend).redmd_loss(*rest)


for _name, _function in {
    "begin_chunk": _begin_chunk,
    "write": _write,
    "streaming_attention": _streaming_attention,
    "chunk_attention": _chunk_attention,
    "chunk_attention_backward": _chunk_attention_backward,
    "sink_window_attention": _sink_window_attention,
    "sink_window_attention_backward": _sink_window_attention_backward,
    "redmd_loss": _redmd_loss,
}.items():
    _PUBLIC.impl(_name, _function, "CompositeExplicitAutograd")
_PUBLIC.impl("merge_attention", reference.merge_attention, "CompositeImplicitAutograd")


# --- fakes ------------------------------------------------------------------------------------------------------------


def _attention_fake(q, dtype):
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=accumulate_dtype(dtype))
    return q.new_empty(q.shape, dtype=dtype), lse


def _streaming_attention_fake(q, new_k, new_v, k, *rest):
    out, lse = _attention_fake(q, k.dtype)
    return out, lse if rest[-2] else lse.new_empty(0)


def _grads_fake(grad_out, grad_lse, q, k, v, out, lse, *rest):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _attention_backward_fake(grad_out, grad_lse, out, lse, q, sink_q, k, v, own_k, *rest):
    keys = k if own_k is None else own_k
    return tuple(x.new_empty(x.shape, dtype=dtype) for x, dtype in zip((q, keys, keys), rest[-3:], strict=True))


def _redmd_loss_fake(
    x, fake, real_cond, real_uncond, fake_uncond, weight, mask, guidance, fake_guidance, need_grad, *_
):
    return weight.new_empty(()), x.new_empty(x.shape) if need_grad else x.new_empty(0)


for _name, _fake in {
    "rfkernels::begin_chunk": lambda *_: None,
    "rfkernels::write": lambda *_: None,
    "rfkernels::streaming_attention": _streaming_attention_fake,
    "rfkernels::chunk_attention": lambda q, k, v, *rest: _attention_fake(q, rest[4]),
    "rfkernels::chunk_attention_backward": _grads_fake,
    "rfkernels::sink_window_attention": lambda q, k, v, *_: _attention_fake(q, v.dtype),
    "rfkernels::sink_window_attention_backward": _grads_fake,
    "rfkernels::redmd_loss": _redmd_loss_fake,
    "rfkernels_native::begin_chunk": lambda *_: None,
    "rfkernels_native::write": lambda *_: None,
    "rfkernels_native::rotate": lambda x, *rest: x.new_empty(x.shape, dtype=rest[-1]),
    "rfkernels_native::streaming_attention": lambda q, new_k, new_v, k, *rest: _attention_fake(q, k.dtype),
    "rfkernels_native::redmd_loss": _redmd_loss_fake,
    "rfkernels_native::attention_forward": lambda q, k, *_: _attention_fake(q, k.dtype),
    "rfkernels_native::attention_backward": _attention_backward_fake,
}.items():
    torch.library.register_fake(_name, _fake)


# --- gradients --------------------------------------------------------------------------------------------------------


def _attention_autograd(name: str) -> None:
    """An attention op of (q, k, v, *rest) whose backward op is called ``name + "_backward"``."""
    backward_op = getattr(torch.ops.rfkernels, name + "_backward")

    def setup_context(ctx, inputs, output):
        (q, k, v, *rest), (out, lse) = inputs, output
        # Tensors among the rest (rotary tables, the frozen past) are saved too, lists of them flattened.
        flat, ctx.spec = torch.utils._pytree.tree_flatten(rest)
        ctx.is_tensor = [isinstance(x, torch.Tensor) for x in flat]
        ctx.constants = [None if is_tensor else x for x, is_tensor in zip(flat, ctx.is_tensor, strict=True)]
        tensors = [x for x, is_tensor in zip(flat, ctx.is_tensor, strict=True) if is_tensor]
        ctx.save_for_backward(q, k, v, out, lse, *tensors)
        ctx.nones = [[None] * len(x) if isinstance(x, list) else None for x in rest]

    def backward(ctx, grad_out, grad_lse):
        q, k, v, out, lse, *tensors = ctx.saved_tensors
        tensors = iter(tensors)
        flat = [next(tensors) if t else x for x, t in zip(ctx.constants, ctx.is_tensor, strict=True)]
        rest = torch.utils._pytree.tree_unflatten(flat, ctx.spec)
        return *backward_op(grad_out, grad_lse, q, k, v, out, lse, *rest), *ctx.nones

    torch.library.register_autograd(f"rfkernels::{name}", backward, setup_context=setup_context, lib=_PUBLIC)


_attention_autograd("chunk_attention")
_attention_autograd("sink_window_attention")


def _redmd_setup(ctx, inputs, output):
    ctx.count = len(inputs)
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no latent of zeros for the second output


def _redmd_backward(ctx, grad_loss, _):
    (grad,) = ctx.saved_tensors
    # loss.backward() as it mostly is: on the CPU a look at the incoming 1 saves a latent and its two passes. Not for
    # fake tensors, nor on a device, where it would be a synchronisation.
    if not (type(grad_loss) is torch.Tensor and grad_loss.is_cpu and grad_loss.item() == 1.0):
        grad = grad * grad_loss.to(grad.dtype)
    return (grad, *([None] * (ctx.count - 1)))


torch.library.register_autograd("rfkernels::redmd_loss", _redmd_backward, setup_context=_redmd_setup, lib=_PUBLIC)


def _refuse(message: str):
    def backward(ctx, *_):
        raise RuntimeError(message)

    return backward


for _name, _message in {
    "chunk_attention_backward": "rfkernels.chunk_attention has no second derivative",
    "sink_window_attention_backward": "rfkernels.sink_window_attention has no second derivative",
}.items():
    torch.library.register_autograd(f"rfkernels::{_name}", _refuse(_message), lib=_PUBLIC)
