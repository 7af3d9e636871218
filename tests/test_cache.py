"""The cache's state, and what bad input does: a clear error and an unchanged cache."""

import copy
import io

import pytest
import torch

import rfkernels as rf

SIZES = dict(
    num_layers=2, batch_size=2, num_kv_heads=2, head_dim=8, frame_tokens=4, sink_frames=2, window_frames=3, alpha=0.9
)


def make(device, **changes):
    options = SIZES | dict(rope=rf.Rope3D(8, 2, 2), dtype=torch.float32, device=device) | changes
    return rf.EMASinkCache(**options)


def stream(cache, chunks, seed=0, frames=2):
    """Runs chunks of fixed numbers and returns the outputs."""
    random, outs = torch.Generator().manual_seed(seed), []
    for _ in range(chunks):
        cache.begin_chunk(frames)
        for layer in cache:
            shape = (cache.batch_size, frames * cache.frame_tokens, cache.num_kv_heads, cache.head_dim)
            q, k, v = (torch.randn(shape, generator=random).to(cache.device) for _ in range(3))
            outs.append(rf.streaming_attention(q, k, v, layer))
    return outs


def equal(a, b) -> bool:
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(a, b, strict=True))


def test_addresses_never_change(device):
    cache = make(device)
    tensors = [cache.k, cache.v, cache.sink_k, cache.sink_v, cache.num_frames]
    addresses = [x.data_ptr() for x in tensors]
    stream(cache, 6)
    state = cache.snapshot()
    cache.reset()
    cache.restore(state)
    now = [cache.k, cache.v, cache.sink_k, cache.sink_v, cache.num_frames]
    assert [x.data_ptr() for x in now] == addresses


def test_shapes_are_the_documented_ones(device):
    cache = make(device)
    assert cache.k.shape == cache.v.shape == (2, 2, 5 * 4, 2, 8)
    assert cache.sink_k.shape == cache.sink_v.shape == (2, 2, 2 * 4, 2, 8)
    assert cache.num_frames.shape == (2,) and cache.num_frames.dtype == torch.int64
    assert len(cache) == 2 and [layer.index for layer in cache] == [0, 1] and cache[-1].index == 1


@pytest.mark.parametrize(
    "changes, own",
    [
        (dict(dtype=torch.bfloat16), 2 * 4),  # float32 accumulators of K and V
        (dict(dtype=torch.float32), 4),  # V lives in the cache; K is un-rotated
        (dict(dtype=torch.float32, rope=None), 0),
        (dict(dtype=torch.bfloat16, alpha=1.0), 2),  # un-rotated keys to move along with the window
        (dict(dtype=torch.bfloat16, alpha=1.0, sink_positions="absolute"), 0),
        (dict(dtype=torch.bfloat16, sink_dtype=torch.bfloat16), 2),
        (dict(dtype=torch.bfloat16, sink_frames=0), 0),
    ],
)
def test_accumulators_take_only_what_they_need(device, changes, own):
    cache = make(device, **changes)
    elements = 2 * 2 * 4 * 2 * 8  # of one frame, all layers and samples
    image = 2 * cache._geometry.capacity * elements * cache.dtype.itemsize
    assert cache.nbytes == image + cache.sink_frames * elements * own + 2 * 8
    assert cache.sink_v.shape[2] == cache.sink_frames * 4
    if changes.get("sink_positions") == "absolute":
        assert cache.sink_k is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_numbers_are_rounded_to_the_nearest(dtype, device, backend):
    """In the middle of two neighbours, ties going to the even one, and right beside it; subnormal ones too."""
    if (backend, device.type, dtype) == ("triton", "cpu", torch.bfloat16):
        pytest.skip("Triton's interpreter truncates to bfloat16")
    below = torch.arange(0, 0x7B00, 3, dtype=torch.int16)  # bits of finite positive numbers
    low, high = (x.view(dtype).to(torch.float32) for x in (below, below + 1))
    middle = (low + high) / 2  # exact: float32 has bits to spare
    numbers = torch.cat([middle, middle.nextafter(low), middle.nextafter(high)])
    numbers = torch.cat([numbers, -numbers])
    numbers = numbers[: len(numbers) // 64 * 64].view(1, -1, 1, 64).to(device)
    cache = rf.EMASinkCache(
        num_layers=1, batch_size=1, num_kv_heads=1, head_dim=64, frame_tokens=numbers.shape[1], sink_frames=0,
        window_frames=1, dtype=dtype, device=device,
    )  # fmt: skip
    cache.begin_chunk(1)
    cache[0].write(numbers, numbers)
    for x in (cache[0].k, cache[0].v):
        torch.testing.assert_close(x, numbers.to(dtype), rtol=0, atol=0)


def test_snapshot_and_restore_replay_bit_for_bit(device, backend):
    cache = make(device)
    stream(cache, 3)
    saved = cache.snapshot()
    first = stream(cache, 4, seed=1)
    cache.restore(saved)
    assert equal(first, stream(cache, 4, seed=1))


def test_state_dict_survives_a_file(device, backend):
    cache, file = make(device), io.BytesIO()
    stream(cache, 3)
    torch.save(cache.state_dict(), file)
    file.seek(0)
    other = make(device)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert equal(stream(cache, 4, seed=1), stream(other, 4, seed=1))


def test_to_copies_to_another_device(device):
    cache = make("cpu")
    stream(cache, 3)
    assert cache.to("cpu") is cache
    there = cache.to("meta") if device.type == "cpu" else cache.to(device)
    assert there.device.type != "cpu" and there.ages == cache.ages and there.open_frames == 2


def test_reset_forgets_all_or_some(device, backend):
    cache = make(device)
    fresh = stream(cache, 4)
    for x in (cache.k, cache.v, cache.sink_k, cache.sink_v):
        x.fill_(float("nan"))  # of the former streams: nothing reads it
    cache.reset()
    assert cache.open_frames == 0 and cache.ages == [0, 0]
    assert equal(fresh, stream(cache, 4))
    cache.reset([1])
    assert cache.ages == [8, 0] and cache.num_frames.tolist() == [8, 0]


def test_full_is_known_on_the_host(device):
    cache = make(device)
    seen = []
    for _ in range(4):
        cache.begin_chunk(2)
        seen.append(cache.full)
    assert seen == [False, False, True, True]


def test_from_wan_config_is_the_published_model():
    cache = rf.EMASinkCache.from_wan_config(num_layers=1, device="meta")
    assert cache._geometry == (3, 6, 1560) and (cache.num_kv_heads, cache.head_dim) == (12, 128)
    assert cache.dtype == cache.sink_dtype == torch.bfloat16 and cache.alpha == 0.999
    assert rf.EMASinkCache.from_wan_config(num_layers=1, sink_dtype=None, device="meta").sink_v.dtype == torch.float32
    with pytest.raises(ValueError, match=r"local_attn_size.*sink_size=3, got 3"):
        rf.EMASinkCache.from_wan_config(3, 3)


def test_paper_shape_accumulators_cost_what_the_docs_say():
    """57.5 MB a layer at the paper's shape."""
    own, published = (
        rf.EMASinkCache.from_wan_config(num_layers=1, sink_dtype=dtype, device="meta")
        for dtype in (None, torch.bfloat16)
    )
    assert own.sink_k.nbytes + own.sink_v.nbytes == 57_507_840
    assert published.nbytes == own.nbytes - 57_507_840 + 57_507_840 // 4


BAD_CONSTRUCTION = [
    (dict(num_layers=0), ValueError, "num_layers must be at least 1, got 0"),
    (dict(batch_size=1.5), TypeError, "batch_size must be an integer, got 1.5"),
    (dict(sink_frames=-1), ValueError, "sink_frames must be at least 0, got -1"),
    (dict(window_frames=0), ValueError, "window_frames must be at least 1, got 0"),
    (dict(alpha=1.5), ValueError, r"alpha must be in \[0, 1\], got 1.5"),
    (dict(alpha=float("nan")), ValueError, "alpha must be in"),
    (dict(alpha=[0.5]), ValueError, "alpha must be one number or one for each of 2 KV heads, got 1"),
    (dict(rope=rf.Rope3D(16, 2, 2)), ValueError, "rope must have head_dim=8, got 16"),
    (dict(rope=rf.Rope3D(8, 2, 3)), ValueError, r"rope must cover frame_tokens=4, got height \* width = 2 \* 3"),
    (dict(rope="yes"), TypeError, "rope must be a Rope3D or None, got str"),
    (dict(sink_positions="left"), ValueError, "sink_positions must be .*, got 'left'"),
    (dict(dtype=torch.int8), TypeError, "dtype must be one of .*, got torch.int8"),
    (dict(sink_dtype=torch.float16, dtype=torch.bfloat16), ValueError, "sink_dtype must be None or one of .*float16"),
]


@pytest.mark.parametrize("changes, error, message", BAD_CONSTRUCTION)
def test_bad_construction(changes, error, message):
    with pytest.raises(error, match=message):
        make("cpu", **changes)


def good(cache, heads=2):
    shape = (2, 8, heads, 8)
    return [torch.randn(shape, device=cache.device) for _ in range(3)]


def with_(index, value):
    """The arguments (q, k, v) with one of them replaced or transformed."""

    def change(cache):
        qkv = good(cache)
        qkv[index] = value(qkv[index]) if callable(value) else value
        return qkv

    return change


BAD_PASSES = [
    (with_(0, lambda x: x[0]), ValueError, r"q must have 4 dimensions, got shape \(8, 2, 8\)"),
    (with_(0, lambda x: x[:, :4]), ValueError, r"q must be \[batch=2, tokens=8, heads, head_dim=8\], got .*2, 4, 2, 8"),
    (with_(0, lambda x: x[:, :, :1]), ValueError, r"q must have a multiple of 2 heads \(the key heads\), got 1"),
    (with_(0, lambda x: x[..., :6]), ValueError, r"q must be .*head_dim=8"),
    (with_(1, lambda x: x[:1]), ValueError, r"k must be \[batch=2"),
    (with_(1, lambda x: x[:, :, :1]), ValueError, r"k must be .*heads=2"),
    (with_(2, lambda x: x[:, :4]), ValueError, r"v must be .*tokens=8"),
    (with_(2, lambda x: x.int()), TypeError, r"v must be float16, bfloat16, float32 or float64, got torch.int32"),
    (with_(1, lambda x: x.to("meta")), ValueError, r"k must be on .*, got meta"),
    (with_(0, None), TypeError, "q must be a tensor, got NoneType"),
    (with_(1, [1.0]), TypeError, "k must be a tensor, got list"),
]


@pytest.mark.parametrize("change, error, message", BAD_PASSES)
def test_a_bad_pass_changes_nothing(change, error, message, device):
    cache = make(device)
    stream(cache, 3)
    q, k, v = change(cache)
    before = cache.snapshot()
    context = cache[0].context()
    for call in (
        lambda: rf.streaming_attention(q, k, v, cache[0]),
        lambda: rf.chunk_attention(q, k, v, context),
    ):
        with pytest.raises(error, match=message):
            call()
    if "q must" not in message:
        with pytest.raises(error, match=message):
            cache[0].write(k, v)
    assert equal(cache.snapshot().values(), before.values())


BAD_CALLS = [
    (lambda c: c.begin_chunk(0), ValueError, "frames must be in 1..5, got 0"),
    (lambda c: c.begin_chunk(4), ValueError, r"frames must be in 1..3 once frames are evicted .*got 4"),
    (lambda c: c.begin_chunk(2.0), TypeError, "frames must be an integer, got 2.0"),
    (lambda c: c.begin_chunk(2, reopen=3), ValueError, r"reopen must be at most min\(frames=2, .*got 3"),
    (lambda c: c.begin_chunk(2, reopen=-1), ValueError, "reopen must be at least 0, got -1"),
    (lambda c: c.begin_chunk(1, samples=[2]), IndexError, "samples must be below batch_size=2, got 2"),
    (lambda c: c.begin_chunk(1, samples=[-3]), ValueError, "samples must be at least -2, got -3"),
    (lambda c: c.begin_chunk(1, samples=[True, False]), TypeError, "samples must be an integer, got True"),
    (lambda c: c.begin_chunk(1, samples=torch.zeros(1, device="meta")), TypeError, "samples must be host indices"),
    (lambda c: c.reset([5]), IndexError, "samples must be below batch_size=2, got 5"),
    (lambda c: c[2], IndexError, r"layer must be in 0..1, got 2"),
    (lambda c: c["0"], TypeError, "indexed by layer, an integer, got '0'"),
    (lambda c: rf.streaming_attention(*good(c), c[0], scale="big"), TypeError, "scale must be a number, got str"),
    (lambda c: c.load_state_dict({}), ValueError, "state must have the entries"),
    (lambda c: c.load_state_dict(make(c.device, alpha=0.5).state_dict()), ValueError, r"state has alpha=\[0.5, 0.5\]"),
    (lambda c: c.load_state_dict(make(c.device, sink_frames=1).state_dict()), ValueError, "state has sink_frames=1"),
    (lambda c: c.load_state_dict(make(c.device, rope=rf.Rope3D(8, 1, 4)).state_dict()), ValueError, "state has rope="),
    (lambda c: c.load_state_dict(c.state_dict() | {"k": c.k[:1]}), ValueError, r"state\['k'\] must be torch.float32"),
    (lambda c: c.load_state_dict(c.state_dict() | {"k": 1}), ValueError, r"state\['k'\] must be .*, got 1"),
    (
        lambda c: c.load_state_dict(c.state_dict() | {"open_frames": 9}),
        ValueError,
        "open_frames.*must be in 0..5, got 9",
    ),
    (lambda c: c.load_state_dict(c.state_dict() | {"ages": [1]}), ValueError, "ages.* must have 2 entries, got 1"),
    (lambda c: rf.use_backend("magic").__enter__(), ValueError, "backend must be .*, got 'magic'"),
]


@pytest.mark.parametrize("call, error, message", BAD_CALLS)
def test_a_bad_call_changes_nothing(call, error, message, device):
    cache = make(device)
    stream(cache, 3)
    before = copy.deepcopy(cache.snapshot())
    with pytest.raises(error, match=message):
        call(cache)
    assert equal(cache.snapshot().values(), before.values())


def test_replace_is_bounded_by_the_youngest_advancing_stream(device):
    cache = make(device)
    with pytest.raises(ValueError, match=r"frames so far=0\), got 1"):
        cache.begin_chunk(2, reopen=1)
    cache.begin_chunk(2, samples=[0])
    cache.begin_chunk(2, reopen=2, samples=[0])
    with pytest.raises(ValueError, match="reopen must be at most"):
        cache.begin_chunk(2, reopen=2)


def test_nothing_works_before_begin_chunk(device):
    cache = make(device)
    q, k, v = good(cache)
    for call in (
        lambda: rf.streaming_attention(q, k, v, cache[0]),
        lambda: cache[0].write(k, v),
        lambda: cache[0].context(),
    ):
        with pytest.raises(ValueError, match=r"no chunk is open: call begin_chunk\(frames\) first"):
            call()
    assert not cache.k.any()
