"""What the kernel computes, against plain torch in float64."""

import math

import pytest
import torch

pytestmark = pytest.mark.kernels_ci
HEAD_DIM = 32


def normal(*shape, device):
    return torch.randn(shape, device=device)


def plain(q, k, v, visible):
    """[B, N, H, D] in float64; H_kv divides H_q."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~visible, -math.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def close(got, wanted):
    # GPUs multiply float32 as TF32 unless told otherwise.
    torch.testing.assert_close(got.double(), wanted, atol=3e-3 if got.is_cuda else 1e-5, rtol=0)


@pytest.mark.parametrize("chunk", [1, 5])
def test_a_window_with_sinks_and_its_gradients(rf, device, chunk):
    tokens, sinks, window = 37, 3, 10
    q, k, v = (normal(2, tokens, heads, HEAD_DIM, device=device).requires_grad_() for heads in (4, 2, 2))
    i, j = torch.arange(tokens, device=device)[:, None], torch.arange(tokens, device=device)
    end = (i // chunk + 1) * chunk
    wanted = plain(q, k, v, (j < end) & ((j >= end - window) | (j < sinks)))
    out = rf.sink_window_attention(q, k, v, sink_tokens=sinks, window_tokens=window, chunk_tokens=chunk)
    close(out, wanted)
    weight = normal(*out.shape, device=device)
    grads = torch.autograd.grad((out * weight).sum(), (q, k, v))
    for got, exact in zip(grads, torch.autograd.grad((wanted * weight).sum(), (q, k, v)), strict=True):
        close(got, exact.double())


def test_a_stream_sees_its_sinks_and_its_window(rf, device):
    tokens, sinks, window = 6, 2, 3
    cache = rf.EMASinkCache(
        num_layers=1, batch_size=1, num_kv_heads=2, head_dim=HEAD_DIM, frame_tokens=tokens, sink_frames=sinks,
        window_frames=window, alpha=1.0, rope=None, dtype=torch.float32, device=device,
    )  # fmt: skip
    keys, values = [], []
    for frame in range(9):
        q, k, v = (normal(1, tokens, heads, HEAD_DIM, device=device) for heads in (4, 2, 2))
        keys.append(k)
        values.append(v)
        seen = [f for f in range(frame + 1) if f < sinks or f > frame - window]
        cache.begin_chunk(frames=1)
        out = rf.streaming_attention(q, k, v, cache[0])
        everything = torch.ones((), dtype=torch.bool, device=device)
        close(out, plain(q, torch.cat([keys[f] for f in seen], 1), torch.cat([values[f] for f in seen], 1), everything))


def test_evicted_frames_are_averaged_into_the_sink(rf, device):
    alpha, tokens = 0.9, 4
    cache = rf.EMASinkCache(
        num_layers=1, batch_size=1, num_kv_heads=1, head_dim=HEAD_DIM, frame_tokens=tokens, sink_frames=1,
        window_frames=2, alpha=alpha, rope=None, dtype=torch.float32, device=device,
    )  # fmt: skip
    frames = [normal(1, tokens, 1, HEAD_DIM, device=device) for _ in range(6)]
    for x in frames:
        cache.begin_chunk(frames=1)
        cache[0].write(x, 2 * x)
    sink = frames[0].double()
    for x in frames[1:4]:  # two are in the window
        sink = alpha * sink + (1 - alpha) * x
    torch.testing.assert_close(cache.sink_k[0].double(), sink, atol=1e-5, rtol=0)
    torch.testing.assert_close(cache.sink_v[0].double(), 2 * sink, atol=1e-5, rtol=0)


def test_the_loss_and_its_gradient(rf, device):
    x, fake, cond, uncond = (normal(2, 3, 4, 5, device=device) for _ in range(4))
    weight = torch.tensor([0.5, 2.0], device=device)
    x.requires_grad_()
    loss = rf.redmd_loss(x, fake, cond, uncond, weight, guidance_scale=3.0)
    real = (cond + 3.0 * (cond - uncond)).double()
    norm = (x.detach().double() - real).abs().mean(dim=(1, 2, 3), keepdim=True)
    grad = (fake.double() - real) / norm
    scale = weight.double()[:, None, None, None] / x.numel()
    torch.testing.assert_close(loss.double(), (0.5 * scale * grad**2).sum(), rtol=1e-5, atol=0)
    (got,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(got.double(), scale * grad, rtol=1e-4, atol=1e-8)


def test_ops_are_in_a_namespace_of_their_own(rf):
    import kernels

    (loaded,) = [kernel for kernel in kernels.get_loaded_kernels() if kernel.module is rf]
    assert rf.__name__ == loaded.metadata.id
    assert getattr(torch.ops, loaded.metadata.id).sink_window_attention.default._schema.name.startswith("_rfkernels_")
