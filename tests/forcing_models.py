"""Small models in the style of the Self-Forcing family, with what their self-attention does to its cache, literally.

Signatures, attributes and dicts are as in Reward-Forcing, Self-Forcing and LongLive 1; the infinity model of LongLive
is in forcing_infinity.py, since its module tells it from the other.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

DIM, HEADS, CHANNELS, LAYERS, TEXT = 32, 2, 3, 2, 8
HEAD_DIM = DIM // HEADS
ROWS, COLUMNS = 2, 3  # of patches
TOKENS = ROWS * COLUMNS


def rope_table(positions=1024, head_dim=HEAD_DIM, theta=10000.0):
    def axis(size):
        return torch.outer(torch.arange(positions), theta ** -(torch.arange(0, size, 2).double() / size))

    third = 2 * (head_dim // 6)
    angles = torch.cat([axis(head_dim - 2 * third), axis(third), axis(third)], 1)
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x, grid_sizes, freqs, first):
    """Frames of x get the numbers first, first + 1, ..."""
    _, rows, columns = grid_sizes[0].tolist()
    frames, pairs = x.shape[1] // (rows * columns), x.shape[3] // 2
    t, h, w = freqs.split([pairs - 2 * (pairs // 3), pairs // 3, pairs // 3], 1)
    size = (frames, rows, columns, -1)
    parts = t[first : first + frames, None, None], h[None, :rows, None], w[None, None, :columns]
    turns = torch.cat([part.expand(size) for part in parts], -1).reshape(x.shape[1], 1, pairs)
    turned = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous()) * turns
    return torch.view_as_real(turned).flatten(-2).type_as(x)


def dense(q, k, v):
    return F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in (q, k, v))).transpose(1, 2)


class Attention(nn.Module):
    def __init__(self, local_attn_size, sink_size):
        super().__init__()
        self.num_heads, self.local_attn_size, self.sink_size = HEADS, local_attn_size, sink_size
        self.max_attention_size = (21 if local_attn_size == -1 else local_attn_size) * TOKENS
        self.q, self.k, self.v, self.o = (nn.Linear(DIM, DIM) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(DIM, eps=1e-6), nn.RMSNorm(DIM, eps=1e-6)

    def qkv(self, x):
        q, k = self.norm_q(self.q(x)), self.norm_k(self.k(x))
        return [y.unflatten(-1, (HEADS, HEAD_DIM)) for y in (q, k, self.v(x))]

    def places(self, cache, new, current_end):
        """Where the window moves: tokens evicted, and where the new ones end."""
        seen, held = (cache[f"{name}_end_index"].item() for name in ("global", "local"))
        evicted = 0
        if self.local_attn_size != -1 and current_end > seen and new + held > cache["k"].shape[1]:
            evicted = new + held - cache["k"].shape[1]
        return evicted, held, held + current_end - seen - evicted

    @staticmethod
    def shifted(x, sink, evicted, held):
        x = x.clone()
        x[:, sink : held - evicted] = x[:, sink + evicted : held].clone()
        return x

    @staticmethod
    def finish(cache, current_end, local_end):
        cache["global_end_index"].fill_(current_end)
        cache["local_end_index"].fill_(local_end)


class SelfForcingAttention(Attention):
    """Keys rotated at absolute frames before they are cached; the last tokens of the cache are seen."""

    def forward(
        self, x, seq_lens, grid_sizes, freqs, block_mask, kv_cache=None, current_start=0, cache_start=None
    ):  # fmt: skip
        q, k, v = self.qkv(x)
        if kv_cache is None:
            q, k = (rotate(y, grid_sizes, freqs, 0) for y in (q, k))
            return self.o(dense(q, k, v).flatten(2))
        q, k = (rotate(y, grid_sizes, freqs, current_start // TOKENS) for y in (q, k))
        new, current_end = x.shape[1], current_start + x.shape[1]
        evicted, held, end = self.places(kv_cache, new, current_end)
        for name, y in (("k", k), ("v", v)):
            if evicted:
                kv_cache[name][:] = self.shifted(kv_cache[name], self.sink_size * TOKENS, evicted, held)
            kv_cache[name][:, end - new : end] = y
        seen = slice(max(0, end - self.max_attention_size), end)
        x = dense(q, kv_cache["k"][:, seen], kv_cache["v"][:, seen])
        self.finish(kv_cache, current_end, end)
        return self.o(x.flatten(2))


class RewardForcingAttention(Attention):
    """Keys un-rotated in the cache; what leaves it is averaged into the sink; all that is seen is rotated again."""

    def __init__(self, local_attn_size, sink_size, compression_alpha=0.999):
        super().__init__(local_attn_size, sink_size)
        self.compression_alpha = compression_alpha

    def forward(
        self, x, seq_lens, grid_sizes, freqs, block_mask, kv_cache=None, current_start=0, cache_start=None
    ):  # fmt: skip
        q, k, v = self.qkv(x)
        new, current_end, sink = x.shape[1], current_start + x.shape[1], self.sink_size * TOKENS
        evicted, held, end = self.places(kv_cache, new, current_end)
        for name, y in (("k", k), ("v", v)):
            cached = kv_cache[name]
            if evicted:
                assert evicted == sink  # else the sink is overwritten
                leaving, alpha = cached[:, sink : sink + evicted].clone(), self.compression_alpha
                cached[:] = self.shifted(cached, sink, evicted, held)
                cached[:, :sink] = alpha * cached[:, :sink] + (1 - alpha) * leaving
            cached[:, end - new : end] = y
        first = max(sink, end - self.max_attention_size + sink)
        k, v = (torch.cat([kv_cache[name][:, :sink], kv_cache[name][:, first:end]], 1) for name in ("k", "v"))
        q = rotate(q, grid_sizes, freqs, (k.shape[1] - new) // TOKENS)
        x = dense(q, rotate(k, grid_sizes, freqs, 0), v)
        self.finish(kv_cache, current_end, end)
        return self.o(x.flatten(2))


class LongLiveAttention(Attention):
    """As Self-Forcing with a static sink; the cache is written when all layers are done; a recache spares the sink."""

    relative = False

    def forward(
        self, x, seq_lens, grid_sizes, freqs, block_mask, kv_cache=None, current_start=0, cache_start=None,
        sink_recache_after_switch=False,
    ):  # fmt: skip
        q, k, v = self.qkv(x)
        new, current_end, sink = x.shape[1], current_start + x.shape[1], self.sink_size * TOKENS
        again = current_end <= kv_cache["global_end_index"].item() and current_start > 0
        evicted, held, end = self.places(kv_cache, new, current_end)
        begin = end - new
        first = max(begin, sink) if again and not sink_recache_after_switch else begin
        if not self.relative:
            q, k = (rotate(y, grid_sizes, freqs, current_start // TOKENS) for y in (q, k))
        after = {}
        for name, y in (("k", k), ("v", v)):
            after[name] = self.shifted(kv_cache[name], sink, evicted, held) if evicted else kv_cache[name].clone()
            after[name][:, first:end] = y[:, first - begin :]
        seen_k, seen_v = after["k"][:, :end], after["v"][:, :end]
        if self.relative:
            q, seen_k = rotate(q, grid_sizes, freqs, begin // TOKENS), rotate(seen_k, grid_sizes, freqs, 0)
        window = max(sink, end - self.max_attention_size + sink)
        x = dense(q, *(torch.cat([y[:, :sink], y[:, window:]], 1) for y in (seen_k, seen_v)))
        return self.o(x.flatten(2)), (after, again, current_end, end)


class Block(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.norm1, self.self_attn = nn.LayerNorm(DIM, elementwise_affine=False), attention
        self.text, self.ffn = nn.Linear(TEXT, DIM), nn.Sequential(nn.Linear(DIM, DIM), nn.GELU(), nn.Linear(DIM, DIM))

    def forward(
        self, x, e, seq_lens, grid_sizes, freqs, context, block_mask, kv_cache=None, crossattn_cache=None,
        current_start=0, cache_start=None, **switch,
    ):  # fmt: skip
        y = self.norm1(x).type_as(x) + e
        y = self.self_attn(
            y, seq_lens, grid_sizes, freqs, block_mask, kv_cache, current_start, cache_start, *switch.values()
        )
        y, update = y if isinstance(y, tuple) else (y, None)
        x = x + y
        x = x + self.ffn(x + self.text(context).mean(1, keepdim=True))
        return x if update is None else (x, update)


class CausalWanModel(nn.Module):
    attention = SelfForcingAttention

    def __init__(self, local_attn_size=9, sink_size=3, attention=None):
        super().__init__()
        attention = attention or self.attention
        self.patch_size, self.freqs, self.block_mask = (1, 2, 2), rope_table(), None
        self.patch_embedding = nn.Conv3d(CHANNELS, DIM, self.patch_size, self.patch_size)
        self.blocks = nn.ModuleList(Block(attention(local_attn_size, sink_size)) for _ in range(LAYERS))
        self.head = nn.Linear(DIM, CHANNELS * 4)
        self.gradient_checkpointing = False

    def forward(self, *args, **kwargs):
        if kwargs.get("kv_cache") is not None:
            return self._forward_inference(*args, **kwargs)
        return self._forward_train(*args, **kwargs)

    def _forward_train(self, x, t, context):
        return self._forward_inference(x, t, context, kv_cache=[None] * LAYERS)

    def _forward_inference(
        self, x, t, context, seq_len=32760, kv_cache=None, crossattn_cache=None, current_start=0, cache_start=0,
        **switch,
    ):  # fmt: skip
        x = self.patch_embedding(x)
        grid_sizes = torch.tensor([x.shape[2:]] * len(x))
        x = x.flatten(2).transpose(1, 2)
        e = torch.sin(t.to(x.dtype)).repeat_interleave(TOKENS, 1)[..., None]
        updates = []
        for i, block in enumerate(self.blocks):
            own = dict(kv_cache=kv_cache[i], current_start=current_start, cache_start=cache_start, **switch)
            args = (x, e, None, grid_sizes, self.freqs, context, self.block_mask)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, *args, use_reentrant=False, **own)
            else:
                x = block(*args, **own)
            if isinstance(x, tuple):
                x, update = x
                updates.append(update)
        for cache, (after, again, current_end, end) in zip(kv_cache, updates, strict=False):
            cache["k"][:], cache["v"][:] = after["k"], after["v"]
            if not again:
                Attention.finish(cache, current_end, end)
        frames = grid_sizes[0, 0].item()
        x = self.head(x).reshape(len(x), frames, ROWS, COLUMNS, CHANNELS, 2, 2)
        return x.permute(0, 4, 1, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)


class RewardForcingModel(CausalWanModel):
    attention = RewardForcingAttention


class LongLiveModel(CausalWanModel):
    attention = LongLiveAttention

    def forward(self, *args, **kwargs):
        kwargs.setdefault("sink_recache_after_switch", False)
        return super().forward(*args, **kwargs)


def new_cache(batch=1, frames=9, dtype=torch.float64, layers=LAYERS):
    def layer():
        size = (batch, frames * TOKENS, HEADS, HEAD_DIM)
        cache = {name: torch.zeros(size, dtype=dtype) for name in ("k", "v")}
        return cache | {f"{name}_end_index": torch.tensor([0]) for name in ("global", "local")}

    return [layer() for _ in range(layers)]


def latents(frames, seed, batch=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    size = (batch, CHANNELS, frames, 2 * ROWS, 2 * COLUMNS)
    return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)


def prompt(seed, batch=1, dtype=torch.float64):
    return torch.randn(batch, 4, TEXT, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def run(model, x, cache, start, text=0, **switch):
    """One pass in the style of the family, of latents ``x [B, C, F, h, w]`` that begin at frame ``start``."""
    t = torch.full((len(x), x.shape[2]), math.pi / 5, dtype=x.dtype)
    text = prompt(text, len(x), x.dtype)
    return model(x, t=t, context=text, kv_cache=cache, crossattn_cache=None, current_start=start * TOKENS, **switch)
