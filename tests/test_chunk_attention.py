"""Training through the cache: gradients, contexts that outlive overwriting, checkpointing, memory."""

import budget
import pytest
import torch
from torch.utils.checkpoint import checkpoint

import rfkernels as rf
from rfkernels.backends import reference
from rfkernels.contract.requests import open_frames


def make(
    device, dtype=torch.float64, layers=1, batch=1, sink=2, window=3, tokens=(2, 2), heads=2, alpha=0.9, **changes
):
    options = dict(rope=rf.Rope3D(8, *tokens), dtype=dtype, device=device) | changes
    return rf.EMASinkCache(
        num_layers=layers, batch_size=batch, num_kv_heads=heads, head_dim=8, frame_tokens=tokens[0] * tokens[1],
        sink_frames=sink, window_frames=window, alpha=alpha, **options,
    )  # fmt: skip


def qkv(cache, frames, group=1, seed=None, grad=False):
    random = torch.Generator().manual_seed(seed if seed is not None else 0)
    tokens = frames * cache.frame_tokens
    shapes = [(cache.batch_size, tokens, cache.num_kv_heads * g, 8) for g in (group, 1, 1)]
    made = [torch.randn(s, generator=random, dtype=torch.float64).to(cache.device, cache.dtype) for s in shapes]
    return [x.requires_grad_(grad) for x in made]


def fill(cache, chunks, frames=2):
    for index in range(chunks):
        cache.begin_chunk(frames)
        for layer in cache:
            layer.write(*qkv(cache, frames, seed=1000 + index)[1:])


@pytest.mark.parametrize("chunks", [0, 1, 5], ids=["first", "warm-up", "evicting"])
@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_equals_streaming_attention(chunks, group, dtype, device, backend):
    cache = make(device, dtype, batch=2)
    fill(cache, chunks)
    cache.begin_chunk(2)
    q, k, v = qkv(cache, 2, group)
    context = cache[0].context()
    pure = rf.chunk_attention(q, k, v, context, return_lse=True)
    streamed = rf.streaming_attention(q, k, v, cache[0], return_lse=True)
    exact, plain = exact_and_plain(q, k, v, context)
    for got in (pure, streamed):
        for a, b, c in zip(got, exact, plain, strict=True):
            if dtype == torch.float64:
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
            else:
                budget.check(a.to(dtype), b, c, least=1.0)


def exact_and_plain(q, k, v, context):
    """(out, lse) of streams of one age in float64, and as plain PyTorch computes them in the dtype given."""
    past, rope = context.past, rf.Rope3D(8, 2, 2).tables(q.device, torch.float64)
    frames = open_frames(past.num_frames, context.frames)
    valid = (min(context.geometry.capacity, int(past.num_frames[0])) - context.frames) * context.geometry.frame_tokens

    def attend(dtype):
        q_, k_ = (reference.rotate(x.double(), frames, rope).to(dtype) for x in (q, k))
        keys, values = (
            torch.cat([past.k[:, :valid].to(dtype), k_], 1),
            torch.cat([past.v[:, :valid].to(dtype), v.to(dtype)], 1),
        )
        keys, values = (x.repeat_interleave(q.shape[2] // k.shape[2], 2).transpose(1, 2) for x in (keys, values))
        scores = (q_.transpose(1, 2) @ keys.mT) * 8**-0.5
        return (scores.softmax(-1) @ values).transpose(1, 2), scores.logsumexp(-1)

    return attend(torch.float64), attend(q.dtype)


@pytest.mark.parametrize("chunks, samples", [(0, None), (1, None), (4, None), (4, [1]), (0, [1])])
@pytest.mark.parametrize("sink, absolute", [(2, False), (2, True), (0, False)])
@pytest.mark.parametrize("group", [1, 2])
def test_gradcheck(chunks, samples, sink, absolute, group, device, backend):
    """In float64 on (out, lse); streams of different ages, frames that a stream does not have, and S = 0 included."""
    cache = make(device, batch=2, sink=sink, tokens=(1, 2), sink_positions="absolute" if absolute else "before_window")
    fill(cache, chunks)
    cache.begin_chunk(2, samples=samples)
    context = cache[0].context()

    def finite(*inputs):
        out, lse = rf.chunk_attention(*inputs, context, return_lse=True)
        return out, torch.where(lse.isfinite(), lse, 0.0)

    assert torch.autograd.gradcheck(finite, qkv(cache, 2, group, grad=True), fast_mode=True)


def rollout(cache, weights, chunks, use_checkpoint=False, streaming=False):
    """A two-layer model rolled out over ``chunks``: a pass with gradient, then a clean pass that writes."""
    outs = []

    def model(x, contexts):
        for weight, context in zip(weights, contexts, strict=True):
            q, k, v = (x @ weight).unflatten(-1, (3, 2, 8)).unbind(2)
            if isinstance(context, rf.Context):
                x = x + rf.chunk_attention(q, k, v, context).flatten(2)
            else:
                x = x + rf.streaming_attention(q, k, v, context).flatten(2)
        return x

    for index in range(chunks):
        cache.begin_chunk(2)
        noise = torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(index), dtype=torch.float64)
        noise = noise.to(cache.device, cache.dtype)
        contexts = list(cache) if streaming else [layer.context() for layer in cache]
        clean = checkpoint(model, noise, contexts, use_reentrant=False) if use_checkpoint else model(noise, contexts)
        outs.append(clean)
        with torch.no_grad():
            model(clean, list(cache))
    return outs


def weights_for(cache, layers=2):
    random = torch.Generator().manual_seed(5)
    made = [torch.randn(16, 48, generator=random, dtype=torch.float64) * 0.2 for _ in range(layers)]
    return [w.to(cache.device, cache.dtype).requires_grad_() for w in made]


def test_gradients_of_a_rollout_survive_overwriting(device, backend):
    """Seven chunks, evictions included: against the same rollout on float64 tensors that nothing overwrites."""
    cache = make(device, layers=2)
    weights = weights_for(cache)
    loss = sum(out.square().sum() for out in rollout(cache, weights, 7))
    grads = torch.autograd.grad(loss, weights)

    # Independently: every chunk alone, backward before the next one can overwrite anything.
    other, total = make(device, layers=2), [torch.zeros_like(w) for w in weights]
    fresh = [w.detach().clone().requires_grad_() for w in weights]
    for index in range(7):
        other.reset()
        with torch.no_grad():
            rollout(other, fresh, index)
        other.begin_chunk(2)
        noise = torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(index), dtype=torch.float64).to(device)
        x = noise
        for weight, layer in zip(fresh, other, strict=True):
            q, k, v = (x @ weight).unflatten(-1, (3, 2, 8)).unbind(2)
            x = x + rf.chunk_attention(q, k, v, layer.context()).flatten(2)
        for sum_, grad in zip(total, torch.autograd.grad(x.square().sum(), fresh), strict=True):
            sum_ += grad
    for a, b in zip(grads, total, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_checkpointed_rollout_is_the_plain_one_bit_for_bit(dtype, device, backend):
    results = []
    for use_checkpoint in (False, True):
        cache = make(device, dtype, layers=2)
        weights = weights_for(cache)
        outs = rollout(cache, weights, 7, use_checkpoint)
        grads = torch.autograd.grad(sum(out.float().square().sum() for out in outs), weights)
        results.append([*outs, *grads, cache.k, cache.v, cache.sink_k, cache.sink_v, cache.num_frames])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_streaming_attention_with_gradients_is_chunk_attention_and_a_write(device, backend):
    with_grad, without = make(device, layers=2), make(device, layers=2)
    outs = rollout(with_grad, weights_for(with_grad), 5, streaming=True)
    with torch.no_grad():
        expected = rollout(without, weights_for(without), 5, streaming=True)
    for a, b in zip(outs, expected, strict=True):
        assert a.requires_grad
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(with_grad.k, without.k)


def test_a_context_outlives_everything(device, backend):
    cache = make(device, batch=2)
    fill(cache, 4)
    cache.begin_chunk(2)
    context, inputs = cache[0].context(), qkv(cache, 2)
    before = rf.chunk_attention(*inputs, context)
    assert cache[0].context() is context
    cache[0].write(*qkv(cache, 2, seed=9)[1:])
    fill(cache, 5)
    cache.begin_chunk(3, reopen=3)
    cache.reset([0])
    cache.reset()
    assert torch.equal(before, rf.chunk_attention(*inputs, context))


def test_a_reopened_frame_is_not_served_from_an_old_copy(device, backend):
    """Frames are copied once and shared: unless they are opened again and change."""
    cache = make(device)
    fill(cache, 4)
    cache.begin_chunk(1)
    cache[0].context()
    cache.begin_chunk(3, reopen=3)
    cache[0].write(*qkv(cache, 3, seed=77)[1:])
    cache.begin_chunk(1)
    inputs = qkv(cache, 1)
    pure = rf.chunk_attention(*inputs, cache[0].context())
    torch.testing.assert_close(pure, rf.streaming_attention(*inputs, cache[0]), rtol=1e-12, atol=1e-12)


def test_saved_memory_is_bounded(device, backend):
    """Of a chunk's passes each keeps q, k, v, out and lse; the past of the chunk is kept once for all of them."""
    cache = make(device, torch.float32, sink=3, window=6, tokens=(4, 4))
    storages: dict[int, int] = {}

    def pack(x):
        storage = x.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        keep.append(x)
        return x

    keep, outs, chunks, passes = [], [], 10, 4
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        for index in range(chunks):
            cache.begin_chunk(1)
            for _ in range(passes):
                q, k, v = qkv(cache, 1, seed=index, grad=True)
                outs.append(rf.chunk_attention(q, k, v, cache[0].context()))
            cache[0].write(k, v)
    frame = 16 * 2 * 8 * 4
    lse, num_frames = 16 * 2 * 4, 8
    past = 2 * (3 + 6 - 1) * frame
    tables = sum(t.untyped_storage().nbytes() for t in cache._rope_tables[:2])
    assert sum(storages.values()) <= chunks * (passes * (4 * frame + lse) + past + num_frames) + tables
    del outs


def test_a_context_is_made_once_a_chunk(device):
    cache = make(device, layers=2)
    for _ in range(3):
        cache.begin_chunk(1)
        contexts = [layer.context() for layer in cache]
        assert all(layer.context() is context for layer, context in zip(cache, contexts, strict=True))
        assert contexts[0].past.num_frames is contexts[1].past.num_frames
        kept = contexts[0].past.k.clone()
        cache[0].write(*qkv(cache, 1)[1:])
        cache.begin_chunk(1)
        cache[0].write(*qkv(cache, 1)[1:])
        assert torch.equal(contexts[0].past.k, kept) and cache[0].context() is not contexts[0]


def test_inference_copies_nothing(device):
    cache = make(device)
    fill(cache, 6)
    assert cache._contexts == {}


def test_double_backward_is_refused(device, backend):
    cache = make(device)
    cache.begin_chunk(1)
    inputs = qkv(cache, 1, grad=True)
    out = rf.chunk_attention(*inputs, cache[0].context())
    (grad,) = torch.autograd.grad(out.sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()
