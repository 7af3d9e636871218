"""Small models in the style of the Self-Forcing family, written for the tests of `integrations.self_forcing`.

They keep the family's interface: names of parts, arguments, dicts, and what each of the four does with its cache.
"""

import sys
import types

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

DIM, HEADS, LAYERS, CHANNELS = 48, 2, 2, 4
HEAD_DIM = DIM // HEADS
GRID = (3, 4)  # rows and columns of tokens; latents are twice that
TOKENS = GRID[0] * GRID[1]
STYLES = ("self_forcing", "reward_forcing", "longlive", "infinity")


def phases(positions):
    pairs = HEAD_DIM // 2
    split = (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)
    return torch.cat(
        [torch.outer(positions.double(), 10000.0 ** (-torch.arange(p, dtype=torch.float64) / p)) for p in split], 1
    )


def rotate(x, freqs, first):
    """x [B, frames * TOKENS, H, D] with its frames numbered from ``first``, in complex128."""
    frames, pairs = x.shape[1] // TOKENS, HEAD_DIM // 2
    split = (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)
    time, row, column = freqs.split(split, 1)
    grid = torch.cartesian_prod(torch.arange(first, first + frames), torch.arange(GRID[0]), torch.arange(GRID[1]))
    turn = torch.cat([time[grid[:, 0]], row[grid[:, 1]], column[grid[:, 2]]], 1)[:, None]
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    relative = False  # keys cached un-rotated, positions counted from the sinks
    returns_update = False

    def __init__(self, local, sink):
        super().__init__()
        self.num_heads, self.head_dim, self.local_attn_size, self.sink_size = HEADS, HEAD_DIM, local, sink
        self.max_attention_size = (21 if local == -1 else local) * TOKENS
        self.q, self.k, self.v, self.o = (nn.Linear(DIM, DIM) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(DIM, eps=1e-6), nn.RMSNorm(DIM, eps=1e-6)

    def evict(self, cache, sink, count, held):
        for name in ("k", "v"):
            cache[name][:, sink : held - count] = cache[name][:, sink + count : held].clone()

    def attend(self, x, freqs, cache, start, recache=False):
        b, new = x.shape[:2]
        q, k, v = self.norm_q(self.q(x)), self.norm_k(self.k(x)), self.v(x)
        q, k, v = (y.view(b, new, HEADS, HEAD_DIM) for y in (q, k, v))
        if not self.relative:
            q, k = (rotate(y, freqs, start // TOKENS).type_as(v) for y in (q, k))
        seen, held, size = int(cache["global_end_index"]), int(cache["local_end_index"]), cache["k"].shape[1]
        end, sink = start + new, self.sink_size * TOKENS
        over = max(0, held + new - size) if self.local_attn_size != -1 and end > seen else 0
        if over:
            self.evict(cache, sink, over, held)
        last = held + end - seen - over
        protected = self.returns_update and end <= seen and start > 0 and not recache
        skip = max(0, sink - (last - new)) if protected else 0
        keys, values = cache["k"].clone(), cache["v"].clone()
        keys[:, last - new + skip : last], values[:, last - new + skip : last] = k[:, skip:], v[:, skip:]
        cache["k"].copy_(keys.detach()), cache["v"].copy_(values.detach())
        cache["global_end_index"].fill_(end), cache["local_end_index"].fill_(last)
        if self.sink_stays_visible():
            begin = max(sink, last - self.max_attention_size + sink)
            keys, values = (torch.cat([y[:, :sink], y[:, begin:last]], 1) for y in (keys, values))
        else:
            begin = max(0, last - self.max_attention_size)
            keys, values = keys[:, begin:last], values[:, begin:last]
        if self.relative:
            q = rotate(q, freqs, (keys.shape[1] - new) // TOKENS).type_as(v)
            keys = rotate(keys, freqs, 0).type_as(v)
        out = functional.scaled_dot_product_attention(*(y.transpose(1, 2) for y in (q, keys, values)))
        return self.o(out.transpose(1, 2).flatten(2))

    def sink_stays_visible(self):
        return True


class SelfForcing(Attention):
    def forward(self, x, seq_lens, grid_sizes, freqs, block_mask, kv_cache=None, current_start=0, cache_start=None):
        return self.attend(x, freqs, kv_cache, current_start)

    def sink_stays_visible(self):
        return False


class RewardForcing(SelfForcing):
    relative = True

    def __init__(self, local, sink):
        super().__init__(local, sink)
        self.compression_alpha = 0.9

    def evict(self, cache, sink, count, held):
        gone = [cache[name][:, sink : sink + count].clone() for name in ("k", "v")]
        super().evict(cache, sink, count, held)
        assert count == sink  # else the repository overwrites sink slots instead of averaging
        for name, x in zip(("k", "v"), gone, strict=True):
            cache[name][:, :sink] = self.compression_alpha * cache[name][:, :sink] + (1 - self.compression_alpha) * x

    def sink_stays_visible(self):
        return True


class LongLive(Attention):
    returns_update = True

    def forward(
        self, x, seq_lens, grid_sizes, freqs, block_mask, kv_cache=None, current_start=0, cache_start=None,
        sink_recache_after_switch=False,
    ):  # fmt: skip
        return self.attend(x, freqs, kv_cache, current_start, sink_recache_after_switch), ("end", "local", {})


class Infinity(LongLive):
    relative = True


# The repository is told by a function of the module that the class is from.
_module = sys.modules["stand_in_of_infinite_attention"] = types.ModuleType("stand_in_of_infinite_attention")
_module.block_relativistic_rope = rotate
Infinity.__module__ = _module.__name__
_CLASSES = dict(zip(STYLES, (SelfForcing, RewardForcing, LongLive, Infinity), strict=True))


class Block(nn.Module):
    def __init__(self, style, local, sink):
        super().__init__()
        self.self_attn = _CLASSES[style](local, sink)
        self.ffn = nn.Sequential(nn.Linear(DIM, DIM), nn.GELU(), nn.Linear(DIM, DIM))

    def forward(self, x, **kwargs):
        out = self.self_attn(x, None, kwargs.pop("grid_sizes"), kwargs.pop("freqs"), None, **kwargs)
        x = x + (out[0] if isinstance(out, tuple) else out)
        return x + self.ffn(x)


class Model(nn.Module):
    def __init__(self, style, local=9, sink=3):
        super().__init__()
        self.style, self.patch_size, self.gradient_checkpointing = style, (1, 2, 2), False
        self.patch_embedding = nn.Conv3d(CHANNELS, DIM, (1, 2, 2), (1, 2, 2))
        self.blocks = nn.ModuleList(Block(style, local, sink) for _ in range(LAYERS))
        self.head = nn.Linear(DIM, 4 * CHANNELS)
        self.freqs = torch.polar(torch.ones(1024, HEAD_DIM // 2, dtype=torch.float64), phases(torch.arange(1024)))

    def forward(self, x, t=None, kv_cache=None, current_start=0, **options):
        x = torch.cat([self.patch_embedding(sample[None]) for sample in x])
        grid = torch.tensor([x.shape[2:]] * len(x))
        x = x.flatten(2).transpose(1, 2)
        for index, block in enumerate(self.blocks):
            given = {
                "grid_sizes": grid,
                "freqs": self.freqs,
                "kv_cache": kv_cache[index],
                "current_start": current_start,
            }
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = checkpoint(
                    lambda y, block, given: block(y, **given), x, block, given | options, use_reentrant=False
                )
            else:
                x = block(x, **given, **options)
        return self.head(x).unflatten(1, (-1, TOKENS)).transpose(1, 2).flatten(1, 2)


def new_cache(frames=9, batch=1, dtype=torch.float64):
    def zeros():
        return torch.zeros(batch, frames * TOKENS, HEADS, HEAD_DIM, dtype=dtype)

    return [
        {"k": zeros(), "v": zeros(), "global_end_index": torch.tensor([0]), "local_end_index": torch.tensor([0])}
        for _ in range(LAYERS)
    ]


def latents(chunk, step, frames=3, batch=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1000 * chunk + step)
    size = (batch, CHANNELS, frames, 2 * GRID[0], 2 * GRID[1])
    return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)
