"""The operators: every schema of the package, their fakes and their gradients, as a loop over requests.

``torch.ops.rfkernels.*`` take a request's leaves and the backend's name, put the request together again and hand it to
the backend's function of the same name. ``torch.ops.rfkernels_native.*`` take the same leaves without a name: compiled
code, for the CPU and for CUDA, only adds kernels to the schemas below. Without it they are not defined.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .. import native
from . import namespaces
from .requests import (
    BeginChunk,
    ChunkAttention,
    ChunkGradients,
    MergeAttention,
    ReDMD,
    Rotate,
    StreamingAttention,
    WindowAttention,
    WindowGradients,
    Write,
    accumulate_dtype,
)
from .schemas import arguments, flattener, leaves, unflattener

Tensor = torch.Tensor
_ATTENTION = "(Tensor out, Tensor lse)"
_GRADIENTS = "(Tensor grad_q, Tensor grad_k, Tensor grad_v)"
_LOSS = "(Tensor loss, Tensor grad)"


# --- fakes: the results of a request, empty ---------------------------------------------------------------------------


def _nothing(request: tuple[Any, ...]) -> None:
    return None


def _attention(q: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=accumulate_dtype(dtype))
    return q.new_empty(q.shape, dtype=dtype), lse


def _streaming(request: StreamingAttention) -> tuple[Tensor, Tensor]:
    out, lse = _attention(request.q, request.write.cache.k.dtype)
    return out, lse if request.return_lse else lse.new_empty(0)


def _gradients(request: ChunkGradients | WindowGradients) -> tuple[Tensor, ...]:
    forward = request.forward
    return tuple(x.new_empty(x.shape) for x in (forward.q, forward.k, forward.v))


def _loss(request: ReDMD) -> tuple[Tensor, Tensor]:
    x = request.x
    return request.weight.new_empty(()), x.new_empty(x.shape) if request.need_grad else x.new_empty(0)


# --- the operations ---------------------------------------------------------------------------------------------------


class Operation(NamedTuple):
    """An op's request, what its schema returns, and its fake."""

    request: type[tuple[Any, ...]]
    returns: str
    fake: Callable[[Any], Any]


OPERATIONS = {
    "begin_chunk": Operation(BeginChunk, "()", _nothing),
    "write": Operation(Write, "()", _nothing),
    "streaming_attention": Operation(StreamingAttention, _ATTENTION, _streaming),
    "chunk_attention": Operation(ChunkAttention, _ATTENTION, lambda r: _attention(r.q, r.past.k.dtype)),
    "sink_window_attention": Operation(WindowAttention, _ATTENTION, lambda r: _attention(r.q, r.v.dtype)),
    "chunk_attention_backward": Operation(ChunkGradients, _GRADIENTS, _gradients),
    "sink_window_attention_backward": Operation(WindowGradients, _GRADIENTS, _gradients),
    "redmd_loss": Operation(ReDMD, _LOSS, _loss),
}
# What compiled code implements, for the CPU and for CUDA alike. It computes the normaliser whether asked or not.
NATIVE = {name: OPERATIONS[name] for name in ("begin_chunk", "write", "redmd_loss")} | {
    "streaming_attention": Operation(StreamingAttention, _ATTENTION, lambda r: _attention(r.q, r.write.cache.k.dtype)),
    "rotate": Operation(Rotate, "Tensor", lambda r: r.x.new_empty(r.x.shape, dtype=r.dtype)),
}
_DIFFERENTIABLE = {"chunk_attention": ChunkGradients, "sink_window_attention": WindowGradients}

BODIES: dict[str, Callable[..., Any]] = {}  # of the public ops, which a dispatch mode does not look into


def define_native(namespace: str, operations: dict[str, Operation]) -> torch.library.Library:
    """Schemas and fakes for compiled code to implement."""
    library = torch.library.Library(namespace, "DEF")
    for name, operation in operations.items():
        schema = f"{name}({arguments(operation.request)}) -> {operation.returns}"
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"{namespace}::{name}", _fake(operation), lib=library)
    return library


def _fake(operation: Operation) -> Callable[..., Any]:
    build = unflattener(operation.request)
    return lambda *flat: operation.fake(build(flat))


def _body(name: str, operation: Operation) -> Callable[..., Any]:
    """Puts the request together, finds the backend's module by its name, and calls its function.

    An op computes what it says whatever surrounds it: autocast, which stays on inside an op's body, is turned off. What
    is written in place gets a new version, so that autograd notices where it had been saved.
    """
    from .. import backends  # which itself uses requests

    build, find, count = unflattener(operation.request), backends.module, len(leaves(operation.request))
    written = [index for index, leaf in enumerate(leaves(operation.request)) if leaf.written]

    def body(*flat: Any) -> Any:
        result = _perform(getattr(find(flat[count]), name), build(flat), flat[0].device)
        if written:
            torch.autograd.graph.increment_version([flat[i] for i in written if flat[i] is not None])
        return result

    return body


def _perform(run: Callable[[Any], Any], request: Any, device: torch.device) -> Any:
    if not torch._C._is_any_autocast_enabled():
        return run(request)
    with torch.autocast(device.type, enabled=False):
        return run(request)


def _streaming_body(name: str, operation: Operation) -> Callable[..., Any]:
    body, wanted = _body(name, operation), len(leaves(operation.request)) - 1  # return_lse is the last leaf

    def streaming(*flat: Any) -> tuple[Tensor, Tensor]:
        out, lse = body(*flat)
        return out, lse if flat[wanted] else lse.new_empty(0)

    return streaming


def _define_public(library: torch.library.Library) -> None:
    for name, operation in OPERATIONS.items():
        # A differentiable op also carries the name of the backend of its backward pass, chosen when it was called.
        names = "str backend, str backward_backend" if name in _DIFFERENTIABLE else "str backend"
        schema = f"{name}({arguments(operation.request, symbolic=True)}, {names}) -> {operation.returns}"
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        BODIES[name] = (_streaming_body if name == "streaming_attention" else _body)(name, operation)
        library.impl(name, BODIES[name], "CompositeExplicitAutograd")
        torch.library.register_fake(f"{namespaces.PUBLIC}::{name}", _fake(operation), lib=library)
    from ..backends import reference

    merge, build = reference.merge_attention, unflattener(MergeAttention)
    schema = f"merge_attention({arguments(MergeAttention)}) -> {_ATTENTION}"
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl("merge_attention", lambda *flat: merge(build(flat)), "CompositeImplicitAutograd")


# --- gradients --------------------------------------------------------------------------------------------------------


def _attention_autograd(library: torch.library.Library, name: str) -> None:
    """An attention op whose leaves begin with q, k, v, and whose backward op takes cotangents before them."""
    backward_op = getattr(namespaces.public, name + "_backward")
    tensors = [leaf.kind == "Tensor" for leaf in leaves(OPERATIONS[name].request)]

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *flat, _, ctx.backend = inputs  # of the backward pass
        ctx.save_for_backward(*output, *(x for x, is_tensor in zip(flat, tensors, strict=True) if is_tensor))
        ctx.numbers = [x for x, is_tensor in zip(flat, tensors, strict=True) if not is_tensor]

    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
        out, lse, *saved = ctx.saved_tensors
        saved_iterator, numbers = iter(saved), iter(ctx.numbers)
        flat = [next(saved_iterator) if is_tensor else next(numbers) for is_tensor in tensors]
        grads = backward_op(grad_out, grad_lse, out, lse, *flat, ctx.backend)
        return *grads, *([None] * (len(flat) - 3 + 2))

    qualified = f"{namespaces.PUBLIC}::{name}"
    torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=library)


def _redmd_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.count = len(inputs)
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no latent of zeros for the second output


def _redmd_backward(ctx: Any, grad_loss: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    (grad,) = ctx.saved_tensors
    # loss.backward() as it mostly is: on the CPU a look at the incoming 1 saves a latent and its two passes. Not for
    # fake tensors, nor on a device, where it would be a synchronisation.
    if not (type(grad_loss) is torch.Tensor and grad_loss.is_cpu and grad_loss.item() == 1.0):
        grad = grad * grad_loss.to(grad.dtype)
    return (grad, *([None] * (ctx.count - 1)))


def _refuse(name: str) -> Callable[..., Any]:
    def backward(ctx: Any, *_: Tensor) -> tuple[Any, ...]:
        raise RuntimeError(f"rfkernels.{name} has no second derivative")

    return backward


def _define_gradients(library: torch.library.Library) -> None:
    for name in _DIFFERENTIABLE:
        _attention_autograd(library, name)
        torch.library.register_autograd(f"{namespaces.PUBLIC}::{name}_backward", _refuse(name), lib=library)
    loss = f"{namespaces.PUBLIC}::redmd_loss"
    torch.library.register_autograd(loss, _redmd_backward, setup_context=_redmd_setup, lib=library)


_native_library = None if native.missing else define_native(namespaces.NATIVE, NATIVE)
_public_library = torch.library.Library(namespaces.PUBLIC, "DEF")
_define_public(_public_library)
_define_gradients(_public_library)


def _call(name: str) -> Callable[..., Any]:
    op, flatten = getattr(namespaces.public, name), flattener(OPERATIONS[name].request)
    return lambda request, *backend: op(*flatten(request), *backend)


begin_chunk: Callable[[BeginChunk, str], None] = _call("begin_chunk")
write: Callable[[Write, str], None] = _call("write")
streaming_attention: Callable[[StreamingAttention, str], tuple[Tensor, Tensor]] = _call("streaming_attention")
chunk_attention: Callable[[ChunkAttention, str, str], tuple[Tensor, Tensor]] = _call("chunk_attention")
sink_window_attention: Callable[[WindowAttention, str, str], tuple[Tensor, Tensor]] = _call("sink_window_attention")
redmd_loss: Callable[[ReDMD, str], tuple[Tensor, Tensor]] = _call("redmd_loss")
merge_attention: Callable[..., tuple[Tensor, Tensor]] = namespaces.public.merge_attention


# --- without the dispatcher -------------------------------------------------------------------------------------------


def unobserved(*tensors: Tensor) -> bool:
    """Whether nobody looks at operators: no tracer, dispatch mode or profiler, and no subclasses of tensors.

    Then a body may run as it is. To take a request apart, pass its leaves through the dispatcher and put it together
    again is about half of what a pass costs the host.
    """
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state()
        or torch.autograd._profiler_enabled()
    ) and all([type(x) is Tensor for x in tensors])


def streaming_body(run: Callable[[Any], tuple[Tensor, Tensor]], request: StreamingAttention) -> tuple[Tensor, Tensor]:
    """What the operator does with a backend's function; lse is anything where it was not asked for."""
    result = _perform(run, request, request.q.device)
    torch.autograd.graph.increment_version([x for x in request.write.cache if x is not None])
    return result
