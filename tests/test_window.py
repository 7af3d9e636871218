"""Full-sequence attention: the visibility rule, its rope form, and its kinship with streaming."""

import budget
import pytest
import torch

import rfkernels as rf
from rfkernels.contract.geometry import WindowMask


def rand(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inputs(queries, keys, heads=2, kv_heads=2, head_dim=8, batch=2, dtype=torch.float64, device="cpu"):
    shapes = ((batch, queries, heads, head_dim), (batch, keys, kv_heads, head_dim), (batch, keys, kv_heads, head_dim))
    return [rand(*shape, seed=i, dtype=dtype).to(device) for i, shape in enumerate(shapes)]


def dense(q, k, v, mask: WindowMask, dtype=torch.float64):
    """Softmax over the keys that the rule of docs/semantics.md names, written out key by key."""
    keys, first = k.shape[1], k.shape[1] - q.shape[1]
    visible = torch.zeros(q.shape[1], keys, dtype=torch.bool)
    for row in range(q.shape[1]):
        i = first + row
        begin, end = 0, mask.first_chunk_tokens
        while end <= i:
            begin, end = end, end + mask.chunk_tokens
        for j in range(keys):
            seen = j < (end if mask.own_chunk else begin)
            visible[row, j] = seen and (j >= end - mask.window_tokens or j < mask.sink_tokens)
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2).transpose(1, 2).cpu().to(dtype) for x in (k, v))
    scores = (q.transpose(1, 2).cpu().to(dtype) @ k.mT) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~visible, -torch.inf)
    weights = torch.where(visible.any(-1, keepdim=True), scores, 0).softmax(-1) * visible.any(-1, keepdim=True)
    return (weights @ v).transpose(1, 2), scores.logsumexp(-1)


MASKS = [  # sink, window, chunk, first chunk, own chunk
    (0, 5, 1, None, True),
    (3, 5, 1, None, True),
    (4, 64, 1, None, True),
    (2, 6, 3, None, True),
    (2, 3, 3, 1, True),
    (4, 8, 4, None, False),
    (4, 2, 4, 2, False),
    (50, 7, 5, None, True),
    (0, 400, 400, None, True),  # bidirectional
    (6, 1, 1, None, True),
    (1, 260, 150, 20, True),  # one chunk larger than a masked block
]


LENGTHS = [(m, n) for m in MASKS for n in [(37, 37), (5, 37), (1, 37)]] + [
    ((m, (300, 330)))
    for m in MASKS
    if m[1] >= 64 or m[2] == 1  # several blocks
]


@pytest.mark.parametrize("masked, lengths", LENGTHS, ids=str)
def test_equals_the_dense_mask(masked, lengths, device, backend):
    (sink, window, chunk, first, own), (queries, keys) = masked, lengths
    q, k, v = inputs(queries, keys, heads=4, device=device)
    options = dict(sink_tokens=sink, window_tokens=window, chunk_tokens=chunk, first_chunk_tokens=first, own_chunk=own)
    out, lse = rf.sink_window_attention(q, k, v, **options, return_lse=True)
    expected = dense(q, k, v, WindowMask(sink, window, chunk, first or chunk, own))
    torch.testing.assert_close(out.cpu(), expected[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse.cpu(), expected[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_error_budget(dtype, device, backend):
    q, k, v = inputs(90, 90, heads=4, head_dim=32, dtype=dtype, device=device)
    mask = WindowMask(4, 20, 3, 3, True)
    out, lse = rf.sink_window_attention(q, k, v, sink_tokens=4, window_tokens=20, chunk_tokens=3, return_lse=True)
    exact, plain = dense(q, k, v, mask), dense(q, k, v, mask, dtype)
    budget.check(out, exact[0], plain[0], "out")
    budget.check(lse.to(dtype), exact[1], plain[1], "lse", least=1.0)


def stream(rope, q, k, v, frames, sink, window, device, absolute=False):
    """The same tokens chunk by chunk through a cache with a static sink."""
    tokens = rope.frame_tokens or 1
    cache = rf.EMASinkCache(
        num_layers=1, batch_size=q.shape[0], num_kv_heads=k.shape[2], head_dim=q.shape[3], frame_tokens=tokens,
        sink_frames=sink, window_frames=window, alpha=1.0, rope=rope, dtype=q.dtype, device=device,
        sink_positions="absolute" if absolute else "before_window",
    )  # fmt: skip
    outs = []
    for part in zip(*(x.split(frames * tokens, 1) for x in (q, k, v)), strict=True):
        cache.begin_chunk(frames)
        outs.append(rf.streaming_attention(*part, cache[0], return_lse=True))
    return torch.cat([o for o, _ in outs], 1), torch.cat([lse for _, lse in outs], 2)


@pytest.mark.parametrize("frames, sink, window", [(1, 0, 2), (1, 2, 3), (2, 1, 4), (3, 3, 6), (2, 3, 2)])
@pytest.mark.parametrize("size", [(2, 2), (None, None)], ids=["3-D", "1-D"])
def test_with_rope_it_equals_the_stream(frames, sink, window, size, device, backend):
    rope = rf.Rope3D(8, *size)
    tokens = rope.frame_tokens or 1
    total = 10 * frames * tokens
    q, k, v = inputs(total, total, heads=4, device=device)
    options = dict(sink_tokens=sink * tokens, window_tokens=window * tokens, chunk_tokens=frames * tokens)
    out, lse = rf.sink_window_attention(q, k, v, **options, rope=rope, return_lse=True)
    expected = stream(rope, q, k, v, frames, sink, window, device)
    torch.testing.assert_close(out, expected[0], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(lse, expected[1], rtol=1e-11, atol=1e-11)
    # A suffix of the queries over all keys.
    part = rf.sink_window_attention(q[:, -tokens - 1 :], k, v, **options, rope=rope)
    torch.testing.assert_close(part, out[:, -tokens - 1 :], rtol=1e-11, atol=1e-11)


def test_pre_rotated_keys_do_so_only_until_the_first_eviction(device, backend):
    """Rotated at absolute frames, without a rope: sinks then stand at frame 0, not right before the window."""
    from rfkernels.backends import reference

    rope, frames, sink, window = rf.Rope3D(8, 2, 2), 2, 2, 4
    total = 8 * frames * 4
    q, k, v = inputs(total, total, device=device)
    numbers = torch.arange(total // 4, device=device)[None]
    tables = rope.tables(q.device, q.dtype)
    rotated = [reference.rotate(x, numbers, tables) for x in (q, k)]
    out = rf.sink_window_attention(*rotated, v, sink_tokens=sink * 4, window_tokens=window * 4, chunk_tokens=frames * 4)
    moving, _ = stream(rope, q, k, v, frames, sink, window, device)
    fixed, _ = stream(rope, q, k, v, frames, sink, window, device, absolute=True)
    before = (sink + window) * 4
    torch.testing.assert_close(out[:, :before], moving[:, :before], rtol=1e-11, atol=1e-11)
    assert (out[:, before:] - moving[:, before:]).abs().max() > 1e-2
    torch.testing.assert_close(out, fixed, rtol=1e-11, atol=1e-11)  # absolute sinks: for ever


@pytest.mark.parametrize("sink, window, chunk, first, own", MASKS[1:8])
@pytest.mark.parametrize("rope", [None, rf.Rope3D(8)], ids=["plain", "rope"])
def test_gradcheck(sink, window, chunk, first, own, rope, device, backend):
    q, k, v = (x.requires_grad_() for x in inputs(9, 12, heads=4, batch=1, device=device))

    def finite(*qkv):
        out, lse = rf.sink_window_attention(
            *qkv, sink_tokens=sink, window_tokens=window, chunk_tokens=chunk, first_chunk_tokens=first, own_chunk=own,
            rope=rope, return_lse=True,
        )  # fmt: skip
        return out, torch.where(lse.isfinite(), lse, 0.0)

    assert torch.autograd.gradcheck(finite, (q, k, v), fast_mode=True)


def test_backward_of_several_blocks(device, backend):
    """Longer than one block of queries and of scores: against autograd through the dense formula."""
    options = dict(sink_tokens=3, window_tokens=150, chunk_tokens=1)
    q, k, v = (x.requires_grad_() for x in inputs(300, 320, heads=4, batch=1, device=device))
    out, lse = rf.sink_window_attention(q, k, v, **options, return_lse=True)
    grads = torch.autograd.grad((out.sin() + lse.transpose(1, 2)[..., None]).sum(), (q, k, v))
    out, lse = dense(q, k, v, WindowMask(3, 150, 1, 1, True))
    expected = torch.autograd.grad((out.sin() + lse.transpose(1, 2)[..., None]).sum(), (q, k, v))
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_teacher_forcing_by_merging_two_halves(device, backend):
    """Noisy queries see clean past chunks and their own noisy chunk: two calls and a merge equal one dense mask."""
    chunk, window, sink, total = 4, 12, 4, 24
    q, noisy_k, noisy_v = inputs(total, total, device=device)
    _, clean_k, clean_v = (rand(2, total, 2, 8, seed=10 + i).to(device) for i in range(3))
    past = rf.sink_window_attention(
        q,
        clean_k,
        clean_v,
        sink_tokens=sink,
        window_tokens=window,
        chunk_tokens=chunk,
        own_chunk=False,
        return_lse=True,
    )
    own = rf.sink_window_attention(
        q, noisy_k, noisy_v, sink_tokens=0, window_tokens=chunk, chunk_tokens=chunk, return_lse=True
    )
    out, lse = rf.merge_attention(*past, *own)
    row, column = torch.arange(total)[:, None] // chunk, torch.arange(total)[None] // chunk
    recent = (column > row - window // chunk) | (column < sink // chunk)
    visible = torch.cat([(column < row) & recent, column == row], 1).to(device)
    k, v = (torch.cat(pair, 1).transpose(1, 2) for pair in ((clean_k, noisy_k), (clean_v, noisy_v)))
    scores = (q.transpose(1, 2) @ k.mT * 8**-0.5).masked_fill(~visible, -torch.inf)
    torch.testing.assert_close(out, (scores.softmax(-1) @ v).transpose(1, 2), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, scores.logsumexp(-1), rtol=1e-12, atol=1e-12)


def test_merge_is_differentiable_and_handles_empty_rows(device):
    out1, out2 = (rand(1, 3, 2, 4, seed=i).to(device).requires_grad_() for i in range(2))
    lse1, lse2 = (rand(1, 2, 3, seed=2 + i).to(device).requires_grad_() for i in range(2))
    assert torch.autograd.gradcheck(rf.merge_attention, (out1, lse1, out2, lse2))
    empty1, empty2 = lse1.detach().clone(), lse2.detach().clone()
    empty1[..., :2], empty2[..., 0] = -torch.inf, -torch.inf
    leaves = [x.detach().requires_grad_() for x in (out1, empty1, out2, empty2)]
    out, lse = rf.merge_attention(*leaves)
    assert not out[:, 0].any() and (lse[..., 0] == -torch.inf).all()
    torch.testing.assert_close(out[:, 1], out2[:, 1])
    grads = torch.autograd.grad(out.sum() + lse[..., 1:].sum(), leaves)
    assert all(g.isfinite().all() for g in grads)


def test_no_quadratic_mask_on_the_cpu():
    """16k tokens of a language model's shape: a mask would take 256 MB, float scores 4 GB."""
    import resource

    q, k, v = inputs(16384, 16384, heads=1, kv_heads=1, head_dim=16, batch=1, dtype=torch.float32)
    rf.sink_window_attention(q[:, :256], k[:, :256], v[:, :256], sink_tokens=4, window_tokens=64)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    out = rf.sink_window_attention(q, k, v, sink_tokens=4, window_tokens=64)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert out.isfinite().all() and grown < 100, f"{grown:.0f} MB"


BAD = [
    (dict(sink_tokens=-1), ValueError, "sink_tokens must be at least 0, got -1"),
    (dict(window_tokens=0), ValueError, "window_tokens must be at least 1, got 0"),
    (dict(chunk_tokens=0), ValueError, "chunk_tokens must be at least 1, got 0"),
    (dict(first_chunk_tokens=0), ValueError, "first_chunk_tokens must be at least 1, got 0"),
    (dict(window_tokens=2.5), TypeError, "window_tokens must be an integer, got 2.5"),
    (dict(rope=rf.Rope3D(16)), ValueError, "rope must have head_dim=8, got 16"),
    (dict(rope=rf.Rope3D(8, 2, 2), window_tokens=6), ValueError, "window_tokens must be whole frames of 4 tokens"),
    (dict(rope=3), TypeError, "rope must be a Rope3D or None, got int"),
    (dict(scale=None, q=rand(2, 13, 2, 8)), ValueError, "q must have at most as many tokens as k, 12, got 13"),
    (dict(q=rand(2, 12, 3, 8)), ValueError, "q must have a multiple of 2 heads"),
    (dict(q=rand(2, 12, 8)), ValueError, "q must have 4 dimensions"),
    (dict(k=rand(1, 12, 2, 8)), ValueError, "k must be .*batch=2"),
    (dict(v=rand(2, 11, 2, 8)), ValueError, "v must be .*tokens=12"),
    (dict(v=rand(2, 12, 2, 8).long()), TypeError, "v must be float16"),
    (dict(k=rand(2, 12, 2, 8).to("meta")), ValueError, "k must be on cpu, got meta"),
]


@pytest.mark.parametrize("changes, error, message", BAD)
def test_bad_input(changes, error, message):
    options = dict(zip("qkv", inputs(12, 12), strict=True)) | dict(sink_tokens=4, window_tokens=4, chunk_tokens=4)
    options |= changes
    with pytest.raises(error, match=message):
        rf.sink_window_attention(options.pop("q"), options.pop("k"), options.pop("v"), **options)


def test_bad_merge():
    out, lse = rand(1, 3, 2, 4), rand(1, 2, 3)
    with pytest.raises(ValueError, match=r"lse2 must be \[batch=1, heads=2, tokens=3\]"):
        rf.merge_attention(out, lse, out, lse.transpose(1, 2))
    with pytest.raises(ValueError, match="out2 must be"):
        rf.merge_attention(out, lse, out[:, :2], lse)
