"""The operations in one table, and those on whole sequences and latents."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

import rfkernels as rf
from rfkernels.contract.geometry import WindowMask
from rfkernels.losses import redmd_loss

from . import competitors, usual
from .cases import Case, Latent, Sequence, Stream
from .contenders import Bench, Contender, Options, forward_backward, ours_of, out_only, peers_of
from .streaming import attention, begin_chunk, chunk, chunk_attention, streaming_pass, write


def sequence_attention(case: Sequence, options: Options, train: bool = False) -> Bench:
    """sink_window_attention of a whole sequence; with train, forward and backward."""
    random, skipped = torch.Generator(options.device).manual_seed(options.seed), {}
    sizes = [(1, case.tokens, heads, case.head_dim) for heads in (case.heads, case.kv_heads, case.kv_heads)]
    q, k, v, grad_out = (
        torch.randn(size, generator=random, device=options.device).to(case.dtype) for size in (*sizes, sizes[0])
    )
    inputs = [x.requires_grad_(train) for x in (q, k, v)]
    rope = None if case.rope is None else rf.Rope3D(case.head_dim, *case.rope)
    mask = WindowMask(case.sink, case.window, case.chunk, case.chunk)

    def contender(function, inputs=inputs, grad_out=grad_out):
        return forward_backward(function, inputs, grad_out) if train else (partial(function, *inputs), out_only)

    def attend(q, k, v):
        return rf.sink_window_attention(
            q, k, v, sink_tokens=case.sink, window_tokens=case.window, chunk_tokens=case.chunk, rope=rope
        )

    contenders = ours_of(options, case.dtype, case.head_dim, skipped, lambda: contender(attend))

    def masked(q, k, v):
        return competitors.ready_sdpa(q, k, v, mask.visible)()

    wide = [x.detach().double().requires_grad_(train) for x in inputs]
    if rope is None:
        if train:
            contenders["SDPA, mask"] = Contender(*contender(masked))
        else:
            contenders |= peers_of(options, *inputs, mask.visible, skipped)
        call, read = contender(masked, wide, grad_out.double())
        exact = read(call())
        call, read = contender(masked)
        plain = read(call())
    else:
        # Sinks stand before each chunk's window, which one mask cannot say: the definition in float64 decides.
        with rf.use_backend("reference"):
            call, read = contender(attend, wide, grad_out.double())
            exact = read(call())
            call, read = contender(attend)
            plain = read(call())
    return Bench(case.training() if train else case.forward(), contenders, exact, plain, skipped)


def redmd(case: Latent, options: Options) -> Bench:
    """The Re-DMD loss and its gradient."""
    random, skipped = torch.Generator(options.device).manual_seed(options.seed), {}
    x, fake, cond, uncond = (
        torch.randn(case.shape, generator=random, device=options.device).to(case.dtype) for _ in range(4)
    )
    mask = None
    if case.masked:
        mask = torch.rand(case.shape, generator=random, device=options.device) > 0.3
    weight, guidance = torch.tensor([1.7], device=options.device), 3.0

    def differentiate(loss, latents):
        x, *rest = latents
        x.requires_grad_()

        def call():
            with torch.enable_grad():
                value = loss(x, *rest)
                return value.detach(), *torch.autograd.grad(value, x)

        return call, lambda result: {"loss": result[0], "grad": result[1]}

    latents = (x, fake, cond, uncond)

    def ours(x, fake, cond, uncond):
        return redmd_loss(x, fake, cond, uncond, weight, guidance_scale=guidance, mask=mask)

    contenders = ours_of(options, case.dtype, None, skipped, lambda: differentiate(ours, latents))
    for name, function in (("published", usual.published_loss), ("plain", usual.plain_loss)):
        loss = partial(function, weight=weight[0], guidance=guidance, mask=mask)
        contenders[name] = Contender(*differentiate(loss, latents))
    wide = tuple(latent.detach().double() for latent in latents)
    call, read = differentiate(
        partial(usual.published_loss, weight=weight[0].double(), guidance=guidance, mask=mask), wide
    )
    exact = read(call())
    plain = contenders["plain"].read(contenders["plain"].call())
    return Bench(case.redmd(), contenders, exact, plain, skipped)


Build = Callable[[Case, Options], Bench]

OPERATIONS: dict[str, tuple[type, Build]] = {
    "begin_chunk": (Stream, begin_chunk),
    "write": (Stream, write),
    "attention": (Stream, attention),
    "pass": (Stream, streaming_pass),
    "chunk": (Stream, chunk),
    "chunk_attention": (Stream, chunk_attention),
    "chunk_attention_training": (Stream, partial(chunk_attention, train=True)),
    "sequence": (Sequence, sequence_attention),
    "sequence_training": (Sequence, partial(sequence_attention, train=True)),
    "redmd": (Latent, redmd),
}
