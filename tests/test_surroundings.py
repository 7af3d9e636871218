"""What surrounds a call in users' programs: autocast, inference and forward mode, checkpointing, pickle, compilers."""

from __future__ import annotations

import copy
import pickle
import sys
import warnings

import pytest
import torch
import torch._dynamo.testing
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import rfkernels as rf

TORCH_BACKENDS = ("reference", "sdpa")


def make(device="cpu", dtype=torch.float64, **changes) -> rf.EMASinkCache:
    options = dict(
        num_layers=1, batch_size=1, num_kv_heads=2, head_dim=16, frame_tokens=4, sink_frames=2, window_frames=4,
        alpha=0.9, rope=rf.Rope3D(16, 2, 2), dtype=dtype, device=device,
    )  # fmt: skip
    return rf.EMASinkCache(**options | changes)


def qkv(tokens=8, dtype=torch.float64, seed=0, head_dim=16) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, tokens, 2, head_dim, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3)]


def stream(cache: rf.EMASinkCache, seeds, layer=0) -> list[torch.Tensor]:
    outs = []
    for seed in seeds:
        cache.begin_chunk(2)
        for layer in cache:
            outs.append(rf.streaming_attention(*qkv(seed=seed, dtype=cache.dtype), layer))
    return outs


# --- autocast ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TORCH_BACKENDS)
def test_autocast_changes_no_result(name):
    """Outputs, normalisers, cache and gradients, of every op."""
    results = []
    for enabled in (False, True):
        cache = make(dtype=torch.float32)
        stream(cache, range(4))
        x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))
        with rf.use_backend(name), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            cache.begin_chunk(2)
            q, k, v = (t.requires_grad_() for t in qkv(dtype=torch.float32))
            chunk = rf.chunk_attention(q, k, v, cache[0].context(), return_lse=True)
            with torch.no_grad():
                streamed = rf.streaming_attention(q, k, v, cache[0], return_lse=True)
            window = rf.sink_window_attention(q, k, v, sink_tokens=1, window_tokens=3, return_lse=True)
            merged = rf.merge_attention(*chunk, *window)
            leaf = x.clone().requires_grad_()
            loss = rf.losses.redmd_loss(leaf, x + 1, x - 1, None, torch.ones(2))
        grads = torch.autograd.grad(chunk[0].square().sum() + chunk[1].sum() + window[0].sum(), (q, k, v))
        grads += torch.autograd.grad(loss, leaf)
        results.append([*chunk, *streamed, *window, *merged, loss, *grads, cache.k, cache.sink_k])
    for plain, cast in zip(*results, strict=True):
        assert plain.dtype == cast.dtype and torch.equal(plain, cast)


# --- forward mode and torch.func --------------------------------------------------------------------------------------


def functions(cache):
    context = cache[0].context()
    return {
        "window": lambda q, k, v: rf.sink_window_attention(q, k, v, sink_tokens=2, window_tokens=4, chunk_tokens=2),
        "window_rope": lambda q, k, v: rf.sink_window_attention(
            q, k, v, sink_tokens=4, window_tokens=4, chunk_tokens=4, rope=rf.Rope3D(16, 2, 2)
        ),
        "lse": lambda q, k, v: rf.sink_window_attention(q, k, v, sink_tokens=0, window_tokens=4, return_lse=True)[1],
        "chunk": lambda q, k, v: rf.chunk_attention(q, k, v, context),
        "dense": lambda q, k, v: rf.dense_attention(q, k[:, :3], v[:, :3]),
    }


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("name", ["window", "window_rope", "lse", "chunk", "dense"])
def test_forward_mode_is_right(name, backend):
    cache = make()
    stream(cache, range(4))
    cache.begin_chunk(2)
    function, inputs, tangents = functions(cache)[name], tuple(qkv(seed=3)), tuple(qkv(seed=4))
    with rf.use_backend(backend or "auto"):
        _, tangent = torch.func.jvp(function, inputs, tangents)
        step = 1e-6
        ahead, behind = (
            function(*(x + sign * step * t for x, t in zip(inputs, tangents, strict=True))) for sign in (1, -1)
        )
        torch.testing.assert_close(tangent, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-7)
        with forward_ad.dual_level():
            out = function(*(forward_ad.make_dual(x, t) for x, t in zip(inputs, tangents, strict=True)))
            torch.testing.assert_close(forward_ad.unpack_dual(out).tangent, tangent)


@pytest.mark.parametrize("name", ["window", "chunk"])
def test_torch_func_grad(name):
    cache = make()
    stream(cache, range(4))
    cache.begin_chunk(2)
    function, inputs = functions(cache)[name], qkv(seed=3)
    got = torch.func.grad(lambda *x: function(*x).sin().sum(), argnums=(0, 1, 2))(*inputs)
    leaves = [x.requires_grad_() for x in inputs]
    expected = torch.autograd.grad(function(*leaves).sin().sum(), leaves)
    torch.testing.assert_close(got, expected)


def test_forward_mode_of_the_loss_is_its_gradient():
    x, fake, real, tangent = torch.randn(4, 2, 3, 4, dtype=torch.float64)
    function = lambda x: rf.losses.redmd_loss(x, fake, real, None, torch.ones(2, dtype=torch.float64))  # noqa: E731
    value, derivative = torch.func.jvp(function, (x,), (tangent,))
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(function(leaf), leaf)
    torch.testing.assert_close(value, function(x))
    torch.testing.assert_close(derivative, (grad * tangent).sum())


def test_streaming_with_a_tangent_writes_and_has_one():
    cache, other = make(), make()
    for c in (cache, other):
        stream(c, range(3))
        c.begin_chunk(2)
    q, k, v = qkv(seed=5)
    with forward_ad.dual_level():
        out = rf.streaming_attention(forward_ad.make_dual(q, torch.ones_like(q)), k, v, cache[0])
        assert forward_ad.unpack_dual(out).tangent.abs().max() > 0
    torch.testing.assert_close(rf.streaming_attention(q, k, v, other[0]), forward_ad.unpack_dual(out).primal)
    torch.testing.assert_close(cache.k, other.k)
    with pytest.raises(RuntimeError, match="use chunk_attention"):
        torch.func.jvp(lambda q: rf.streaming_attention(q, k, v, cache[0]), (q,), (q,))


# --- recomputation ----------------------------------------------------------------------------------------------------


# (Without reentrancy torch stops recomputing where all it needs is there, here before the write.)
@pytest.mark.parametrize(
    "reentrant, what", [(False, "streaming_attention"), (True, "streaming_attention"), (True, "write")]
)
def test_a_recomputed_pass_must_not_write(reentrant, what):
    cache, linear = make(), torch.nn.Linear(32, 96).double()

    def block(x):
        q, k, v = linear(x).unflatten(-1, (3, 2, 16)).unbind(2)
        if what == "write":
            cache[0].write(k, v)
            return q.flatten(2)
        return rf.streaming_attention(q, k, v, cache[0]).flatten(2)

    loss = 0
    for _ in range(2):
        cache.begin_chunk(2)
        x = torch.randn(1, 8, 32, dtype=torch.float64, requires_grad=True)
        loss = loss + checkpoint(block, x, use_reentrant=reentrant).square().sum()
    before = cache.k.clone()
    with pytest.raises(RuntimeError, match=r"within a backward pass.*context\(\) and chunk_attention"):
        loss.backward()
    assert torch.equal(cache.k, before)


def test_what_autograd_saved_and_an_op_overwrites_is_noticed():
    """Compiled and Triton kernels write behind autograd's back; the op gives what it wrote a new version."""
    cache = make()
    cache.begin_chunk(2)
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    loss = (cache[0].k * weight).sum()
    cache[0].write(*qkv()[1:])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# --- inference mode ---------------------------------------------------------------------------------------------------


def test_what_is_made_in_inference_mode_can_be_trained_with():
    rope = rf.Rope3D(16, 2, 2)
    with torch.inference_mode():
        cache = make(rope=rope)
        stream(cache, range(3))
        cache.begin_chunk(2)
        context = cache[0].context()
    kept = (cache.k, cache.num_frames, cache.sink_k, *rope.tables("cpu", torch.float64)[:2], *context.past[:3])
    assert not any(x.is_inference() for x in kept)
    inputs = [x.requires_grad_() for x in qkv()]
    rf.chunk_attention(*inputs, context).sum().backward()
    rf.streaming_attention(*inputs, cache[0]).sum().backward()
    rf.sink_window_attention(*inputs, sink_tokens=0, window_tokens=4, chunk_tokens=4, rope=rope).sum().backward()
    cache.begin_chunk(2)


# --- pickle and copies ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [lambda c: pickle.loads(pickle.dumps(c)), copy.deepcopy, copy.copy])
@pytest.mark.parametrize("changes", [{}, dict(rope=None), dict(dtype=torch.bfloat16, alpha=(0.5, 1.0))], ids=str)
def test_a_copied_cache_goes_on_as_the_original(copied, changes):
    cache = make(num_layers=2, **changes)
    stream(cache, range(4))
    other = copied(cache)
    assert other[1].k.data_ptr() == other.k[1].data_ptr() and other.k.data_ptr() != cache.k.data_ptr()
    assert other.alpha == cache.alpha and other.ages == cache.ages and other.open_frames == cache.open_frames
    for a, b in zip(stream(cache, range(4, 9)), stream(other, range(4, 9)), strict=True):
        assert torch.equal(a, b)


def test_a_rope_that_is_equal_hashes_alike():
    assert rf.Rope3D(16, 2, 2) == rf.Rope3D(16, 2, 2) and len({rf.Rope3D(16, 2, 2), rf.Rope3D(16, 2, 2)}) == 1
    assert len({rf.Rope3D(16, 2, 2), rf.Rope3D(16, 2, 2, theta=500.0)}) == 2


# --- chunks -----------------------------------------------------------------------------------------------------------


def test_a_chunk_that_no_layer_wrote_is_noticed_once():
    cache = make()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stream(cache, range(3))
        cache.begin_chunk(2, reopen=2)
        cache.begin_chunk(2, reopen=2)  # on purpose, as to recompute
        stream(make(), range(2))
    with pytest.warns(UserWarning, match="called once a chunk, before the first pass"):
        cache.begin_chunk(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache.begin_chunk(2)


@pytest.mark.parametrize("frames", [5, 6])
@pytest.mark.parametrize("name", TORCH_BACKENDS)
def test_a_long_first_chunk(frames, name):
    """Up to S + W frames while all fit: as frame by frame, by passes and by contexts; reopened as a whole, too."""
    q, k, v = qkv(4 * frames)
    with rf.use_backend(name):
        long, short = make(), make()
        long.begin_chunk(frames)
        pure = rf.chunk_attention(q, k, v, long[0].context())
        out = rf.streaming_attention(q, k, v, long[0])
        for frame in range(frames):
            at = slice(4 * frame, 4 * frame + 4)
            short.begin_chunk(1)
            last = rf.streaming_attention(*(x[:, at] for x in (q, k, v)), short[0])
        torch.testing.assert_close(out, pure)
        torch.testing.assert_close(out[:, -4:], last)
        torch.testing.assert_close(long.k, short.k)
        torch.testing.assert_close(long.sink_v, short.sink_v)
        long.begin_chunk(frames, reopen=frames)
        torch.testing.assert_close(rf.streaming_attention(q, k, v, long[0]), out)
        for a, b in zip(stream(long, range(3)), stream(short, range(3)), strict=True):
            torch.testing.assert_close(a, b)
        with pytest.raises(ValueError, match=r"frames must be in 1..4 once frames are evicted .*got 5"):
            long.begin_chunk(5)
        with pytest.raises(ValueError, match=r"frames must be in 1..6, got 7"):
            make().begin_chunk(7)


@pytest.mark.parametrize("name", TORCH_BACKENDS)
def test_a_long_chunk_of_streams_that_lack_frames(name):
    cache, plain = make(batch_size=2), make()
    q, k, v = (torch.cat([x, x]) for x in qkv(20))
    with rf.use_backend(name):
        cache.begin_chunk(2, samples=[1])
        cache[0].write(k[:, :8], v[:, :8])
        cache.begin_chunk(5, samples=[1], reopen=2)
        out = rf.streaming_attention(q, k, v, cache[0])
        plain.begin_chunk(5)
        torch.testing.assert_close(out[1:], rf.streaming_attention(q[:1], k[:1], v[:1], plain[0]))
    assert not out[0].any() and not cache.k[:, 0].any()


@pytest.mark.parametrize("name", TORCH_BACKENDS)
def test_a_chunk_that_is_not_finite_may_be_kept_out(name):
    """The rest of the stream is finite, sink included; by default it is what the definition says."""
    for nonfinite in ("zero", "keep"):
        cache = make(nonfinite=nonfinite)
        with rf.use_backend(name):
            for step in range(12):
                q, k, v = qkv(seed=step)
                if step == 2:
                    k[:, 3], v[:, 5] = float("nan"), float("inf")
                cache.begin_chunk(2)
                out = rf.streaming_attention(q, k, v, cache[0])
                if step == 2 and nonfinite == "zero":
                    clean = [torch.where(x.isfinite(), x, 0) for x in (k, v)]
                    assert torch.equal(out, rf.streaming_attention(q, *clean, cache[0]))
        assert bool(cache.sink_v.isfinite().all() and out.isfinite().all()) == (nonfinite == "zero")
    with pytest.raises(ValueError, match='nonfinite must be "keep" or "zero", got True'):
        make(nonfinite=True)


# --- full sequences ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("large", [None, sys.maxsize, 2**32, 2**31, 100])
@pytest.mark.parametrize("sinks", [0, 4, sys.maxsize])
@pytest.mark.parametrize("own", [True, False])
def test_a_window_larger_than_everything(large, sinks, own, backend):
    results = []
    for window, sink in ((32, 0), (large, sinks)):
        inputs = [x.requires_grad_() for x in qkv(24, torch.float32, head_dim=32)]
        options = dict(sink_tokens=sink, window_tokens=window, chunk_tokens=8, own_chunk=own, return_lse=True)
        out, lse = rf.sink_window_attention(*inputs, **options)
        results.append([out, lse, *torch.autograd.grad(out.square().sum(), inputs)])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


def test_counts_that_no_kernel_holds_are_refused():
    with pytest.raises(ValueError, match=r"chunk_tokens must be below 2\*\*31, got 4294967296"):
        rf.sink_window_attention(*qkv(), sink_tokens=0, window_tokens=4, chunk_tokens=2**32)


@pytest.mark.parametrize("queries, keys", [(8, 5), (5, 5), (3, 8), (17, 1), (4, 0), (0, 3)])
@pytest.mark.parametrize("group", [1, 3])
def test_dense_attention_takes_any_number_of_keys(queries, keys, group, backend):
    q = torch.randn(2, queries, 2 * group, 32, requires_grad=True)
    k, v = (torch.randn(2, keys, 2, 32, requires_grad=True) for _ in range(2))
    out, lse = rf.dense_attention(q, k, v, scale=0.3, return_lse=True)
    wide = [x.repeat_interleave(group, 2).transpose(1, 2) for x in (k, v)]
    scores = q.transpose(1, 2) @ wide[0].mT * 0.3
    expected = (scores.softmax(-1) @ wide[1]).transpose(1, 2)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, scores.logsumexp(-1), rtol=1e-5, atol=1e-5)
    if keys and queries:
        got = torch.autograd.grad(out.square().sum() + lse.sum(), (q, k, v))
        plain = torch.autograd.grad(expected.square().sum() + scores.logsumexp(-1).sum(), (q, k, v))
        torch.testing.assert_close(got, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("group", [1, 3])
def test_an_empty_batch(group, backend):
    q = torch.randn(0, 8, 2 * group, 32, requires_grad=True)
    k, v = (torch.randn(0, 8, 2, 32, requires_grad=True) for _ in range(2))
    window = rf.sink_window_attention(q, k, v, sink_tokens=1, window_tokens=3, return_lse=True)
    for out, lse in (window, rf.dense_attention(q, k, v, return_lse=True)):
        assert out.shape == q.shape and lse.shape == (0, 2 * group, 8)
        assert all(x.shape[0] == 0 for x in torch.autograd.grad(out.sum() + lse.sum(), (q, k, v)))


@pytest.mark.parametrize("lengths", [[4, 12, 8, 4], [8, 8, 12], [28]], ids=str)
@pytest.mark.parametrize("queries", [28, 13])
def test_chunks_of_any_lengths_equal_a_stream(lengths, queries):
    """With a static sink: as chunks of these frames in turn; and as chunks of one length where they are that."""
    q, k, v = qkv(28)
    options = dict(sink_tokens=8, rope=rf.Rope3D(16, 2, 2))
    q = q[:, 28 - queries :]
    out = rf.sink_window_attention(q, k, v, window_tokens=28, chunk_tokens=lengths, **options)
    cache = make(alpha=1.0, window_frames=7)
    begin, streamed = 0, []
    for length in lengths:
        at = slice(begin, begin + length)
        cache.begin_chunk(length // 4)
        streamed.append(rf.streaming_attention(qkv(28)[0][:, at], k[:, at], v[:, at], cache[0]))
        begin += length
    torch.testing.assert_close(out, torch.cat(streamed, 1)[:, 28 - queries :])
    for own in (True, False):
        options |= dict(window_tokens=12, own_chunk=own, return_lse=True)
        listed = rf.sink_window_attention(q, k, v, chunk_tokens=[8, 4, 4, 4, 4, 4], **options)
        plain = rf.sink_window_attention(q, k, v, chunk_tokens=4, first_chunk_tokens=8, **options)
        torch.testing.assert_close(listed, plain)
    with pytest.raises(ValueError, match=r"chunk_tokens must add up to the 28 tokens of k.* got 27"):
        rf.sink_window_attention(q, k, v, window_tokens=8, chunk_tokens=[20, 7], sink_tokens=0)


def test_dense_attention_and_merging_extend_a_stream():
    """Reference tokens beside the cache: as if their keys had been in it."""
    q, k, v = qkv(8)
    extra_k, extra_v = (x[:, :3] for x in qkv(8, seed=9)[1:])
    window = rf.sink_window_attention(q, k, v, sink_tokens=0, window_tokens=None, chunk_tokens=8, return_lse=True)
    out, _ = rf.merge_attention(*window, *rf.dense_attention(q, extra_k, extra_v, return_lse=True))
    both = [torch.cat(pair, 1) for pair in ((k, extra_k), (v, extra_v))]
    torch.testing.assert_close(out, rf.dense_attention(q, *both))


def test_dynamic_lengths_compile_once():
    """A graph for the first length, one for all others; the window a symbol, too."""

    def step(q, k, v):
        return rf.sink_window_attention(q, k, v, sink_tokens=4, window_tokens=None, chunk_tokens=q.shape[1])

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    fast = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    for tokens in (8, 12, 20, 28, 36):
        inputs = qkv(tokens, torch.float32)
        torch.testing.assert_close(fast(*inputs), step(*inputs))
    assert counter.frame_count <= 2
    torch._dynamo.reset()


# --- plain mistakes ---------------------------------------------------------------------------------------------------


def test_a_cache_without_an_index_is_named():
    cache = make()
    cache.begin_chunk(2)
    with pytest.raises(TypeError, match=r"layer must be a layer of a cache, cache\[i\], got EMASinkCache"):
        rf.streaming_attention(*qkv(), cache)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_the_published_preset_in_other_dtypes(dtype):
    options = dict(num_layers=1, dim=32, num_heads=2, latent_height=4, latent_width=4)
    assert rf.EMASinkCache.from_wan_config(**options, dtype=dtype).sink_dtype == dtype


# --- what torch may change --------------------------------------------------------------------------------------------


def test_attention_goes_on_without_torchs_private_kernel(monkeypatch):
    """The compiled pass and the Python path call a private operator of torch: where it is another, the public one."""
    from rfkernels.backends.sdpa import dense

    assert dense.has_flash()
    monkeypatch.setattr(dense, "_FLASH_SCHEMA", "aten::of another torch")
    dense.has_flash.cache_clear()
    try:
        assert not dense.has_flash()
        results = []
        for name in TORCH_BACKENDS:
            cache = make(batch_size=2)
            cache.begin_chunk(2, samples=[1])
            cache[0].write(*(torch.cat([x, x]) for x in qkv(seed=7)[1:]))
            with rf.use_backend(name), torch.profiler.profile() as profile:
                for seed in range(4):
                    cache.begin_chunk(2)
                    q, k, v = (torch.cat([x, 2 * x]) for x in qkv(seed=seed))
                    out, lse = rf.streaming_attention(q.repeat(1, 1, 2, 1), k, v, cache[0], return_lse=True)
                inputs = [x.requires_grad_() for x in (q, k, v)]
                pure = rf.chunk_attention(*inputs, cache[0].context(), return_lse=True)
                grads = torch.autograd.grad(pure[0].sum() + pure[1].sum(), inputs)
                window = rf.sink_window_attention(*inputs, sink_tokens=1, window_tokens=3, return_lse=True)
            results.append([out, lse, *pure, *grads, *window])
            called = {event.name for event in profile.events()}
            assert "rfkernels_native::streaming_attention" not in called
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    finally:
        dense.has_flash.cache_clear()
