"""docs/semantics.md, "Streaming attention" and "Positions", taken literally: Python lists of frames, in float64.

Everything is rotated anew at every pass.
Nothing here is shared with the package, so that a wrong definition cannot hide in both.
"""

from __future__ import annotations

import torch


def rotate(
    x: torch.Tensor, positions: list[int], height: int, width: int, theta: float, half: bool, dtype=torch.float64
) -> torch.Tensor:
    """``x [frames * height * width, H, D]`` by complex multiplication in ``dtype``, frame f at ``positions[f]``."""
    pairs = x.shape[-1] // 2
    split = (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)
    grid = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) for n in (len(positions), height, width)))
    grid[:, 0] = torch.tensor(positions, dtype=torch.float64)[grid[:, 0].long()]
    angles = [
        grid[:, axis : axis + 1] * theta ** (-torch.arange(p, dtype=torch.float64) / max(p, 1))
        for axis, p in enumerate(split)
    ]
    x, phase = x.to(dtype), torch.polar(torch.ones((), dtype=torch.float64), torch.cat(angles, 1))[:, None]
    phase = phase.to(dtype.to_complex())
    z = torch.complex(*x.chunk(2, -1)) if half else torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    z = z * phase
    return torch.cat([z.real, z.imag], -1) if half else torch.view_as_real(z).flatten(-2)


class LiteralStream:
    """One stream: per layer a list of sink frames and a list of window frames, un-rotated."""

    def __init__(self, layers, sink, window, size, alpha, absolute=False, theta=10000.0, half=False, rope=True):
        self.layers, self.sink_frames, self.window_frames, self.size = layers, sink, window, size
        self.alpha = torch.as_tensor(alpha, dtype=torch.float64).reshape(-1, 1)  # [heads or 1, 1]
        self.absolute, self.theta, self.half, self.rope = absolute, theta, half, rope
        self.reset()

    def reset(self):
        self.count = 0
        self.sink = [[] for _ in range(self.layers)]
        self.window = [[] for _ in range(self.layers)]  # of [frame number, k, v]

    def begin_chunk(self, frames, reopen=0):
        for _ in range(frames - reopen):
            frame, self.count = self.count, self.count + 1
            for sink, window in zip(self.sink, self.window, strict=True):
                if frame < self.sink_frames:
                    sink.append([None, None])
                    continue
                window.append([frame, None, None])
                if len(window) > self.window_frames:
                    evicted, k, v = window.pop(0)
                    if self.sink_frames:
                        slot = sink[evicted % self.sink_frames]
                        slot[0] = self.alpha * slot[0] + (1 - self.alpha) * k
                        slot[1] = self.alpha * slot[1] + (1 - self.alpha) * v
        self.open = list(range(self.count - frames, self.count))

    def write(self, layer, k, v):
        """k, v ``[F * T, H, D]``; frames that do not exist are skipped."""
        parts = zip(self.open, k.double().chunk(len(self.open)), v.double().chunk(len(self.open)), strict=True)
        for frame, k_frame, v_frame in parts:
            if 0 <= frame < self.sink_frames:
                self.sink[layer][frame] = [k_frame, v_frame]
            elif frame >= 0:
                entry = next(e for e in self.window[layer] if e[0] == frame)
                entry[1:] = [k_frame, v_frame]

    def visible(self, layer, dtype=torch.float64, shift=0):
        """(rotated k, v, position of each existing frame) of all valid frames; shift: of all positions."""
        window = self.window[layer]
        positions = list(range(len(self.sink[layer])))
        positions += [e[0] for e in window] if self.absolute else [self.sink_frames + j for j in range(len(window))]
        positions = [p + shift for p in positions]
        frames = list(range(len(self.sink[layer]))) + [e[0] for e in window]
        k = torch.cat([s[0] for s in self.sink[layer]] + [e[1] for e in window])
        v = torch.cat([s[1] for s in self.sink[layer]] + [e[2] for e in window])
        return self._rotate(k, positions, dtype), v, dict(zip(frames, positions, strict=True))

    def _rotate(self, x, positions, dtype):
        return rotate(x, positions, *self.size, self.theta, self.half, dtype) if self.rope else x.to(dtype)

    def attend(self, layer, q, scale, dtype=torch.float64):
        """(out, lse) of q ``[F * T, H_q, D]``.

        In another dtype: what plain PyTorch makes of the same rows. It rotates in float32 at the frames' absolute
        numbers: relative ones, often 0, would spare it the rounding of a rotation.
        """
        exact = dtype == torch.float64
        precision = torch.float64 if exact else torch.float32
        shift = 0 if exact or self.absolute else max(0, self.count - self.sink_frames - self.window_frames)
        out = torch.zeros(q.shape, dtype=torch.float64)
        lse = torch.full((q.shape[1], q.shape[0]), -torch.inf, dtype=torch.float64)
        missing = sum(frame < 0 for frame in self.open) * (q.shape[0] // len(self.open))
        if missing == q.shape[0]:
            return out, lse
        k, v, position = self.visible(layer, precision, shift)
        queries = self._rotate(q[missing:], [position[f] for f in self.open if f >= 0], precision)
        group = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(group, 1).transpose(0, 1).to(dtype) for x in (k, v))
        scores = (queries.transpose(0, 1).to(dtype) @ k.mT) * scale
        out[missing:] = (scores.softmax(-1) @ v).transpose(0, 1).double()
        lse[:, missing:] = scores.logsumexp(-1).double()
        return out, lse
