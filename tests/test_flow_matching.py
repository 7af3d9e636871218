"""Flow matching: the loss of teacher and critic against its formula, and how timesteps are drawn."""

import pytest
import torch

from rfkernels.draws import draw, keyed_generator
from rfkernels.losses import FlowMatchSchedule, critic_loss, flow_matching_loss


def linear(x, timesteps, context, gain=1.0):
    """A flow that depends on everything it is given."""
    return gain * x * context.view(-1, 1, 1) + timesteps.reshape(len(x), -1, 1) / 1000


@pytest.fixture
def batch(device):
    return [torch.randn(size, dtype=torch.float64, device=device) for size in ((3, 4, 5), (3,), (3, 4, 5))]


@pytest.mark.parametrize("times", [(900.0, 100.0, 500.0), [[100.0, 200.0, 300.0, 400.0]] * 3], ids=["clip", "frame"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_equals_the_formula(times, masked, weighted, batch, device):
    clean, context, noise = batch
    times = torch.tensor(times, dtype=torch.float64, device=device)
    weight = torch.tensor([0.0, 1.0, 3.0], device=device) if weighted else None
    mask = torch.rand(3, 4, 1, device=device) > 0.5 if masked else None
    gain = torch.tensor(0.7, dtype=torch.float64, device=device, requires_grad=True)
    loss = flow_matching_loss(linear, clean, context, times, noise, weight=weight, mask=mask, gain=gain)
    total, count = 0.0, 0
    for b in range(3):
        for f in range(4):
            if masked and not mask[b, f, 0]:
                continue
            sigma = (times[b] if times.dim() == 1 else times[b, f]) / 1000
            flow = gain * ((1 - sigma) * clean[b, f] + sigma * noise[b, f]) * context[b] + sigma
            w = 1.0 if weight is None else weight[b]
            total = total + w * (flow - (noise[b, f] - clean[b, f])).square().sum()
            count += 5
    expected = total / count
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(x, gain)[0] for x in (loss, expected)), rtol=1e-12, atol=0)


def test_the_critic_gives_the_student_no_gradient(batch):
    clean, context, noise = batch
    gain = torch.ones((), dtype=torch.float64, requires_grad=True)
    clean.requires_grad_()
    critic_loss(linear, clean, context, noise=noise, gain=gain.to(clean.device)).backward()
    assert clean.grad is None and gain.grad is not None


def test_random_timesteps_are_uniform_shifted_and_clamped(device):
    times = FlowMatchSchedule(5.0).random_timesteps(20_000, generator=keyed_generator(3), device=device)
    assert times.shape == (20_000,) and times.dtype == torch.float32 and times.device.type == device.type
    assert times.min() == 20 and times.max() == 980
    unshifted = times / (5000 - 4 * times)  # sigma / (shift - (shift - 1) sigma)
    low, high = 20 / (5000 - 80), 980 / (5000 - 3920)  # 0.4 % and 90.7 % of the uniform numbers
    assert abs((times == 20).double().mean() - low) < 0.002 and abs((times == 980).double().mean() - 1 + high) < 0.01
    inside = unshifted[(times > 20) & (times < 980)]
    quantiles = torch.quantile(inside, torch.tensor([0.25, 0.5, 0.75], device=device))
    expected = low + (high - low) * torch.tensor([0.25, 0.5, 0.75], device=device)
    torch.testing.assert_close(quantiles, expected, rtol=0, atol=0.015)
    assert FlowMatchSchedule().random_timesteps((2, 7)).shape == (2, 7)


def test_a_generator_for_each_sample_makes_its_numbers_independent_of_the_batch(device):
    whole = draw(torch.randn, (3, 4), [keyed_generator(0, i) for i in range(3)], device, torch.float32)
    alone = draw(torch.randn, (1, 4), [keyed_generator(0, 2)], device, torch.float32)
    assert torch.equal(whole[2:], alone) and not torch.equal(whole[0], whole[1])
    half = draw(torch.randn, (1, 4), [keyed_generator(0, 2)], device, torch.bfloat16)
    assert torch.equal(half, alone.bfloat16())
    together = draw(torch.randn, (3, 4), keyed_generator(1), device, torch.float32)
    assert torch.equal(together.cpu(), torch.randn(3, 4, generator=keyed_generator(1)))


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(clean=torch.zeros(3)), "clean must have a batch"),
        (dict(timesteps=torch.zeros(2)), r"timesteps must be \[3\] or \[3, 4\]"),
        (dict(noise=torch.zeros(3, 4)), "noise must have clean's shape"),
        (dict(weight=torch.zeros(2)), "weight must be"),
        (dict(mask=torch.ones(2, 4, 5, dtype=torch.bool)), "mask must broadcast"),
        (dict(generator=[torch.Generator()]), "generator must be one, or one for each of 3"),
    ],
)
def test_bad_input(changes, message):
    call = dict(clean=torch.zeros(3, 4, 5), context=torch.zeros(3)) | changes
    with pytest.raises(ValueError, match=message):
        flow_matching_loss(linear, **call)
    with pytest.raises(ValueError, match="bounds"):
        FlowMatchSchedule().random_timesteps(1, bounds=(980, 20))
