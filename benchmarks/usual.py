"""What streaming video models usually do, and published loss code, as baselines to measure against.

Written from the description of the procedures (DESIGN section 0 and 1.6), for comparison only.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


class UsualCache:
    """Per layer a ``[B, tokens, H, D]`` cache with un-rotated keys whose window is moved down by slice-clone-assign.

    Every pass joins sinks and window and rotates all of their keys, and the queries, in complex128 with ready-made
    tables. Sinks are averaged when a chunk as long as the sink leaves.
    """

    def __init__(self, heads, head_dim, frame_tokens, sink, window, phases, alpha, dtype):
        """phases: complex128 ``[sink + window, frame_tokens, head_dim / 2]``."""
        size = (1, (sink + window) * frame_tokens, heads, head_dim)
        self.k, self.v = torch.zeros(size, dtype=dtype), torch.zeros(size, dtype=dtype)
        self.tokens, self.sink, self.alpha = frame_tokens, sink * frame_tokens, alpha
        self.phases = phases.flatten(0, 1)[:, None]
        self.filled = self.seen = 0

    def attend(self, q, k, v, start):
        """One pass over the chunk that begins at token ``start`` of the stream."""
        new, size = q.shape[1], self.k.shape[1]
        if start + new > self.seen:  # the first pass of a chunk
            if self.filled + new > size:
                for cache in (self.k, self.v):
                    evicted = cache[:, self.sink : self.sink + new].clone()
                    cache[:, self.sink : -new] = cache[:, self.sink + new :].clone()
                    cache[:, : self.sink] = self.alpha * cache[:, : self.sink] + (1 - self.alpha) * evicted
                self.filled -= new
            self.filled, self.seen = self.filled + new, start + new
        begin = self.filled - new
        self.k[:, begin : self.filled], self.v[:, begin : self.filled] = k, v
        keys = torch.cat([self.k[:, : self.sink], self.k[:, self.sink : self.filled]], 1)
        values = torch.cat([self.v[:, : self.sink], self.v[:, self.sink : self.filled]], 1)
        keys = rotate(keys, self.phases[: self.filled])
        q = rotate(q, self.phases[begin : self.filled])
        out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, keys, values)))
        return out.transpose(1, 2)


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
