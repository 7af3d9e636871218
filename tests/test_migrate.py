"""docs/migrate.md, run: the line; self-attention with a cache in the usual style, and the same after the edit."""

import copy
import re
from pathlib import Path
from types import SimpleNamespace

import forcing_models
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rfkernels as rf

DIM, HEADS, HEIGHT, WIDTH, LAYERS, CHANNELS = 48, 2, 3, 4, 2, 4
HEAD_DIM, TOKENS = DIM // HEADS, HEIGHT * WIDTH
CHUNK, SINK, LOCAL = 3, 3, 9
ALPHA = 0.999


class Projections(nn.Module):
    """What the edit leaves alone."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(DIM, DIM) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(DIM, eps=1e-6), nn.RMSNorm(DIM, eps=1e-6)

    def qkv(self, x):
        q, k = self.norm_q(self.q(x)), self.norm_k(self.k(x))
        return (y.unflatten(-1, (HEADS, HEAD_DIM)) for y in (q, k, self.v(x)))


class Patches(nn.Module):
    """The rest of the model, which the edit leaves alone too: latents ``[B, C, F, h, w]`` to tokens and back."""

    def __init__(self):
        super().__init__()
        self.patch_embedding = nn.Conv3d(CHANNELS, DIM, (1, 2, 2), (1, 2, 2))
        self.head = nn.Linear(DIM, 4 * CHANNELS)

    def embed(self, x, t):
        time = torch.sin(t.to(x.dtype)).repeat_interleave(TOKENS, 1)[..., None]
        return self.patch_embedding(x).flatten(2).transpose(1, 2) + time

    def unpatchify(self, x):
        x = self.head(x).reshape(len(x), -1, HEIGHT, WIDTH, CHANNELS, 2, 2)
        return x.permute(0, 4, 1, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)


# --- before -----------------------------------------------------------------------------------------------------------


def old_cache(batch, dtype):
    """One dict for each layer, keys un-rotated."""
    zeros = torch.zeros(batch, LOCAL * TOKENS, HEADS, HEAD_DIM, dtype=dtype)
    counter = torch.tensor([0])
    layer = {"k": zeros, "v": zeros, "global_end_index": counter, "local_end_index": counter}
    return [{name: x.clone() for name, x in layer.items()} for _ in range(LAYERS)]


def old_rotate(x, first_frame):
    """Complex128 rotation at window-relative frames first_frame, first_frame + 1, ..."""
    pairs = HEAD_DIM // 2
    split = (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)
    frames = x.shape[1] // TOKENS
    places = [torch.arange(first_frame, first_frame + frames), torch.arange(HEIGHT), torch.arange(WIDTH)]
    grid = torch.cartesian_prod(*places).double()
    angles = [
        torch.outer(grid[:, axis], 10000.0 ** (-torch.arange(p, dtype=torch.float64) / p))
        for axis, p in enumerate(split)
    ]
    turns = torch.cat(angles, 1)[:, None]
    as_complex = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(as_complex * torch.polar(torch.ones_like(turns), turns)).flatten(-2).to(x.dtype)


class OldSelfAttention(Projections):
    def forward(self, x, kv_cache, current_start):
        q, k, v = self.qkv(x)
        sink, new = SINK * TOKENS, x.shape[1]
        current_end = current_start + new
        seen, held = kv_cache["global_end_index"].item(), kv_cache["local_end_index"].item()
        local_end = held + current_end - seen
        overflow = local_end - kv_cache["k"].shape[1]
        if overflow > 0:  # only on the first pass of a chunk: later ones see an end that does not move
            for name in ("k", "v"):
                x_cached = kv_cache[name]
                evicted = x_cached[:, sink : sink + overflow].clone()
                x_cached[:, sink : held - overflow] = x_cached[:, sink + overflow : held].clone()
                assert overflow == sink  # else the usual code overwrites sink slots instead of averaging
                x_cached[:, :sink] = ALPHA * x_cached[:, :sink] + (1 - ALPHA) * evicted
            local_end -= overflow
        kv_cache["k"][:, local_end - new : local_end] = k
        kv_cache["v"][:, local_end - new : local_end] = v
        past = max(sink, local_end - (LOCAL - SINK) * TOKENS)
        all_k = torch.cat([kv_cache["k"][:, : min(sink, local_end)], kv_cache["k"][:, past:local_end]], 1)
        all_v = torch.cat([kv_cache["v"][:, : min(sink, local_end)], kv_cache["v"][:, past:local_end]], 1)
        all_k, q = old_rotate(all_k, 0), old_rotate(q, (local_end - new) // TOKENS)
        out = F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in (q, all_k, all_v))).transpose(1, 2)
        kv_cache["global_end_index"].fill_(current_end)
        kv_cache["local_end_index"].fill_(local_end)
        return self.o(out.flatten(2))


class OldModel(Patches):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(OldSelfAttention() for _ in range(LAYERS))

    def forward(self, x, t, kv_cache, current_start):
        x = self.embed(x, t)
        for block, layer in zip(self.blocks, kv_cache, strict=True):
            x = x + block(x, layer, current_start)
        return self.unpatchify(x)


# --- after ------------------------------------------------------------------------------------------------------------


def new_cache(batch, dtype, sink_dtype=None):
    return rf.EMASinkCache.from_wan_config(
        local_attn_size=LOCAL, sink_size=SINK, num_layers=LAYERS, dim=DIM, num_heads=HEADS, latent_height=2 * HEIGHT,
        latent_width=2 * WIDTH, batch_size=batch, alpha=ALPHA, dtype=dtype, sink_dtype=sink_dtype,
    )  # fmt: skip


class NewSelfAttention(Projections):
    def forward(self, x, layer):
        q, k, v = self.qkv(x)
        return self.o(rf.streaming_attention(q, k, v, layer).flatten(2))


class NewModel(Patches):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(NewSelfAttention() for _ in range(LAYERS))

    def forward(self, x, t, cache):
        x = self.embed(x, t)
        for i, block in enumerate(self.blocks):
            x = x + block(x, cache[i])
        return self.unpatchify(x)


class Adapter(nn.Module):
    """Called in the old style, for a pipeline that passes ``current_start`` and cannot be changed yet."""

    def __init__(self, model, cache):
        super().__init__()
        self.model, self.cache, self.end = model, cache, 0

    def forward(self, x, t, kv_cache=None, current_start=0):  # x [B, C, F, h, w]; kv_cache is not looked at
        frames, start = x.shape[2], current_start // TOKENS
        if start == 0:  # a video begins, or its first chunk is passed again, which is the same
            self.cache.reset()
            self.end = 0
        end = start + frames
        if end != self.end or frames != self.cache.open_frames:
            self.cache.begin_chunk(frames, reopen=frames - (end - self.end))
            self.end = end
        return self.model(x, t, self.cache)


# --- both -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    old = OldModel().eval().requires_grad_(False)
    new = NewModel().eval().requires_grad_(False)
    new.load_state_dict(old.state_dict())
    return old, new


def inputs(chunk, step, batch=1, frames=CHUNK):
    generator = torch.Generator().manual_seed(100 * chunk + step)
    size = (batch, CHANNELS, frames, 2 * HEIGHT, 2 * WIDTH)
    return torch.randn(size, generator=generator, dtype=torch.float64)


def times(x, step):
    return torch.full((len(x), x.shape[2]), 250.0 * (step % 5))


def cast(models, dtype):
    return [copy.deepcopy(model).to(dtype) for model in models]


def stream_both(models, dtype, sink_dtype=None, batch=1):
    """20 chunks of 4 denoising passes and a clean one; yields both outputs, and leaves the caches behind."""
    (old, new), kv_cache, cache = cast(models, dtype), old_cache(batch, dtype), new_cache(batch, dtype, sink_dtype)
    for chunk in range(20):
        cache.begin_chunk(CHUNK)
        for step in range(5):
            x = inputs(chunk, step, batch).to(dtype)
            t = times(x, step)
            yield old(x, t, kv_cache, chunk * CHUNK * TOKENS), new(x, t, cache), kv_cache, cache


def test_float64(models, backend):
    for old, new, _, _ in stream_both(models, torch.float64, batch=2):
        torch.testing.assert_close(new, old, atol=1e-12, rtol=0)


def test_float32(models, backend):
    """At most twice the error of the old module, plus one rounding."""
    exact = (old for old, *_ in stream_both(models, torch.float64))
    for (old, new, *_), reference in zip(stream_both(models, torch.float32), exact, strict=True):
        error_old, error_new = ((x.double() - reference).abs().max() for x in (old, new))
        assert error_new <= 2 * error_old + torch.finfo(torch.float32).eps * reference.abs().max()


def test_published_bfloat16(models, backend):
    """Values of the first layer bit for bit: they depend on nothing that is rounded differently."""
    ring = (LOCAL - SINK) * TOKENS
    for old, new, kv_cache, cache in stream_both(models, torch.bfloat16, torch.bfloat16):
        assert torch.equal(cache.sink_v[0], kv_cache[0]["v"][:, : SINK * TOKENS])
        frames = int(cache.num_frames) - SINK
        if frames >= LOCAL - SINK:  # our ring, in the order of the old window
            window = cache[0].v[:, -ring:].roll(-(frames % (LOCAL - SINK)) * TOKENS, 1)
            assert torch.equal(window, kv_cache[0]["v"][:, -ring:])
        assert (new - old).abs().max() < 0.05 * old.abs().max()
    moved, old_k = cache.sink_k[0].float(), kv_cache[0]["k"][:, : SINK * TOKENS].float()
    assert (moved - old_k).abs().max() <= 2**-7 * old_k.abs().max()


def test_float32_averages_move_where_bfloat16_ones_do_not(models):
    def moved(sink_dtype):
        cache = new_cache(1, torch.bfloat16, sink_dtype)
        model = cast(models, torch.bfloat16)[1]
        starts = []
        for chunk in range(20):
            cache.begin_chunk(CHUNK)
            x = inputs(chunk, 4).bfloat16()
            model(x, times(x, 4), cache)
            starts.append(cache.sink_v.double().clone())
        return (starts[-1] - starts[0]).norm()

    assert moved(torch.bfloat16) < 0.7 * moved(None)


def test_unchanged_pipeline_recache_and_second_video(models):
    """The adapter: repeated passes, a recomputed window, another video, all by ``current_start``."""
    (old, new), kv_cache = cast(models, torch.float64), old_cache(1, torch.float64)
    adapter = Adapter(new, new_cache(1, torch.float64))

    def both(chunk, step, start, frames=CHUNK):
        x = inputs(chunk, step, frames=frames)
        call = dict(t=times(x, step), kv_cache=kv_cache, current_start=start * TOKENS)
        torch.testing.assert_close(adapter(x, **call), old(x, **call), atol=1e-12, rtol=0)

    for scene in range(2):
        for chunk in range(7):
            for step in range(5):
                both(10 * scene + chunk, step, chunk * CHUNK)
            if chunk == 4:  # a new prompt: the window is computed again
                both(10 * scene + chunk, 7, (chunk + 1) * CHUNK - (LOCAL - SINK), frames=LOCAL - SINK)
        for layer in kv_cache:  # before a second video
            layer["global_end_index"].zero_(), layer["local_end_index"].zero_()


def test_the_line():
    """Of a pipeline that holds a wrapper of the model."""
    pipeline = SimpleNamespace(generator=forcing_models.RewardForcingModel())
    plain = copy.deepcopy(pipeline.generator)
    undo = rf.integrations.self_forcing.patch(pipeline.generator)
    assert type(pipeline.generator) is not type(plain)
    undo()
    assert type(pipeline.generator) is type(plain)


def test_the_document_shows_this_code():
    document = Path(__file__).parents[1] / "docs" / "migrate.md"
    blocks = re.findall(r"```python\n(.*?)```", document.read_text(), re.DOTALL)
    assert len(blocks) == 5
    assert all(block in Path(__file__).read_text() for block in blocks)
