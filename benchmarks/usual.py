"""What streaming video models usually do, and published loss code, as baselines to measure against.

Written from the description of the procedures (README.md, docs/semantics.md), for comparison only.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


class UsualCache:
    """Per layer a ``[B, tokens, H, D]`` cache with un-rotated keys whose window is moved down by slice-clone-assign.

    Every pass joins sinks and window and rotates all of their keys, and the queries, in complex128 with ready-made
    tables. The lengths are tensors on the device, which the host reads. Frames that leave are averaged into the sink in
    the cache's dtype, all at once where they are as many as the sink has.
    """

    def __init__(self, heads, head_dim, frame_tokens, sink, window, phases, alpha, dtype, device="cpu"):
        """phases: complex128 ``[sink + window, frame_tokens, head_dim / 2]``."""
        size = (1, (sink + window) * frame_tokens, heads, head_dim)
        self.k, self.v = (torch.zeros(size, dtype=dtype, device=device) for _ in range(2))
        self.frame_tokens, self.slots, self.sink, self.alpha = frame_tokens, sink, sink * frame_tokens, alpha
        self.phases = phases.flatten(0, 1)[:, None]
        # Tokens held, and tokens seen.
        self.filled, self.seen = (torch.zeros(1, dtype=torch.int64, device=device) for _ in range(2))

    def open(self, new, start):
        """Makes room for the chunk of ``new`` tokens that begins at token ``start``, unless it is open already."""
        if start + new <= self.seen.item():
            return
        filled = self.filled.item()
        leaving = max(0, filled + new - self.k.shape[1])
        if leaving:
            first = (self.seen.item() - filled + self.sink) // self.frame_tokens  # the oldest frame of the window
            for cache in (self.k, self.v):
                evicted = cache[:, self.sink : self.sink + leaving].clone()
                cache[:, self.sink : filled - leaving] = cache[:, self.sink + leaving : filled].clone()
                self._average(cache, evicted, first)
        self.filled.fill_(filled + new - leaving)
        self.seen.fill_(start + new)

    def _average(self, cache, evicted, first):
        if not self.slots:
            return
        if evicted.shape[1] == self.sink and first % self.slots == 0:
            cache[:, : self.sink] = self.alpha * cache[:, : self.sink] + (1 - self.alpha) * evicted
            return
        for i, frame in enumerate(evicted.split(self.frame_tokens, 1)):
            at = (first + i) % self.slots * self.frame_tokens
            sink = cache[:, at : at + self.frame_tokens]
            cache[:, at : at + self.frame_tokens] = self.alpha * sink + (1 - self.alpha) * frame

    def visible(self, q, k, v, start):
        """Writes the open chunk; its queries and all keys, rotated, and all values."""
        new = q.shape[1]
        self.open(new, start)
        filled = self.filled.item()
        begin = filled - new
        self.k[:, begin:filled], self.v[:, begin:filled] = k, v
        keys = torch.cat([self.k[:, : self.sink], self.k[:, self.sink : filled]], 1)
        values = torch.cat([self.v[:, : self.sink], self.v[:, self.sink : filled]], 1)
        return rotate(q, self.phases[begin:filled]), rotate(keys, self.phases[:filled]), values

    def attend(self, q, k, v, start):
        """One pass over the chunk that begins at token ``start`` of the stream."""
        return sdpa(*self.visible(q, k, v, start))


def phases(rope, frames, device="cpu"):
    """complex128 ``[frames, frame_tokens, head_dim / 2]`` of a `Rope3D`."""
    tables = rope.tables(torch.device(device), torch.float64)
    turns = torch.outer(torch.arange(frames, device=device).double(), rope.frequencies[0].to(device))[:, None]
    time = torch.polar(torch.ones_like(turns), turns).expand(-1, rope.frame_tokens, -1)
    space = torch.view_as_complex(tables.spatial)[None].expand(len(time), -1, -1)
    return torch.cat([time, space], -1)


def sdpa(q, k, v):
    """On ``[B, N, H, D]``, heads grouped where k and v have fewer."""
    grouped = q.shape[2] != k.shape[2]
    out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), enable_gqa=grouped)
    return out.transpose(1, 2)


def chunk_attention(q, k, v, past_k, past_v, phases):
    """As trainers have it: un-rotated past and own keys joined, everything rotated, differentiable.

    phases: of all visible frames, the chunk's last.
    """
    keys = rotate(torch.cat([past_k, k], 1), phases.flatten(0, 1)[:, None])
    return sdpa(rotate(q, phases.flatten(0, 1)[-q.shape[1] :, None]), keys, torch.cat([past_v, v], 1))


def rotate(x, phases):
    z = torch.view_as_complex(x.to(torch.float64).unflatten(-1, (-1, 2)))
    return torch.view_as_real(z * phases).flatten(-2).to(x.dtype)


def published_loss(x, fake, cond, uncond, weight, guidance, mask=None):
    """Re-DMD as eager code has it: float64 mse_loss against a detached target, boolean indexing for a mask."""
    with torch.no_grad():
        real = cond + guidance * (cond - uncond)
        grad = (fake - real) / (x - real).abs().mean(dim=[1, 2, 3, 4], keepdim=True)
        grad = torch.nan_to_num(grad)
    target = (x.double() - grad.double()).detach()
    if mask is None:
        return 0.5 * weight * F.mse_loss(x.double(), target, reduction="mean")
    return 0.5 * weight * F.mse_loss(x.double()[mask], target[mask], reduction="mean")


class _PlainLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, grad, weight):
        scaled = grad.mul(weight / grad.numel())
        ctx.save_for_backward(scaled)
        return 0.5 * torch.dot(scaled.view(-1), grad.view(-1))

    @staticmethod
    def backward(ctx, incoming):
        (scaled,) = ctx.saved_tensors
        return scaled * incoming, None, None


def plain_loss(x, fake, cond, uncond, weight, guidance, mask=None):
    """The best float32 formula in plain torch that we could write: in-place steps, no graph, a dot product."""
    with torch.no_grad():
        real = torch.lerp(uncond, cond, 1 + guidance)
        norm = torch.dist(x.detach(), real, p=1) / x.numel()
        grad = real.sub_(fake).div_(-norm).nan_to_num_(0.0, 0.0, 0.0)
        if mask is not None:
            grad.mul_(mask)
    scale = 1.0 if mask is None else x.numel() / mask.sum()
    return _PlainLoss.apply(x, grad, weight * scale)
