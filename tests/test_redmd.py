"""The Re-DMD loss against the formula of docs/semantics.md in float64, written out sample by sample."""

import math

import budget
import pytest
import torch

import rfkernels as rf
from rfkernels import native
from rfkernels.losses import ReDMDLoss, effective_sample_size, redmd_loss


def formula(
    x, fake, cond, uncond, weight, guidance, mask=None, fake_uncond=None, fake_guidance=0.0, dtype=torch.float64
):
    """(loss, gradient in x), with loops over samples and Python numbers where that is clearer."""
    x, fake, cond, uncond, fake_uncond = (
        None if t is None else t.detach().to(dtype) for t in (x, fake, cond, uncond, fake_uncond)
    )
    mask = torch.ones(x.shape, dtype=torch.bool) if mask is None else mask.expand(x.shape)
    count, loss, grads = max(1, int(mask.sum())), 0.0, []
    for b in range(x.shape[0]):
        real = cond[b] if uncond is None else cond[b] + guidance * (cond[b] - uncond[b])
        guess = fake[b] if fake_uncond is None else fake[b] + fake_guidance * (fake[b] - fake_uncond[b])
        grad = (guess - real) / (x[b] - real).abs().mean()
        grad[~grad.isfinite()] = 0
        w = weight[b].item()
        loss += 0.5 * w * grad[mask[b]].square().sum().item() / count
        grads.append(w * torch.where(mask[b], grad, 0) / count)
    return torch.tensor(loss, dtype=dtype), torch.stack(grads)


def latents(dtype=torch.float64, shape=(3, 5, 4, 7, 9), device="cpu", seed=0):
    random = torch.Generator().manual_seed(seed)
    made = [torch.randn(shape, generator=random, dtype=torch.float64).to(device, dtype) for _ in range(5)]
    return made[0].requires_grad_(), *made[1:]


MASKS = {
    "no mask": None,
    "mask": torch.rand(3, 5, 4, 7, 9, generator=torch.Generator().manual_seed(7)) > 0.4,
    "frames": torch.tensor([True, False, True, True, False]).view(1, 5, 1, 1, 1),
    "empty": torch.zeros(3, 1, 1, 1, 1, dtype=torch.bool),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("guidance", ["both", "real", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_equals_the_formula(mask, guidance, dtype, device, backend):
    x, fake, cond, uncond, fake_uncond = latents(dtype, device=device)
    uncond, fake_uncond = (None if guidance == "none" else uncond), (fake_uncond if guidance == "both" else None)
    weight = torch.tensor([0.5, 1.0, 7.0], dtype=torch.float64)
    options = dict(guidance_scale=3.0, fake_uncond=fake_uncond, fake_guidance_scale=1.5)
    on_device = None if mask is None else mask.to(device)
    loss = redmd_loss(x, fake, cond, uncond, weight.to(device), mask=on_device, **options)
    (grad,) = torch.autograd.grad(2.0 * loss, x)
    cpu = [None if t is None else t.detach().cpu() for t in (x, fake, cond, uncond)]
    others = dict(mask=mask, fake_uncond=None if fake_uncond is None else fake_uncond.cpu(), fake_guidance=1.5)
    exact = formula(*cpu, weight, 3.0, **others)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and grad.dtype == dtype
    if dtype == torch.float64:
        torch.testing.assert_close(loss.detach().cpu(), exact[0], rtol=1e-12, atol=0)
        torch.testing.assert_close(grad.cpu(), 2 * exact[1], rtol=1e-12, atol=1e-15)
    else:
        plain = formula(*cpu, weight, 3.0, **others, dtype=torch.float32)
        budget.check(loss[None], exact[0][None], plain[0][None], "loss")
        budget.check(grad, 2 * exact[1], 2 * plain[1], "gradient")


def test_gradcheck_of_the_surrogate(device, backend):
    """Where grad is held fixed, d/dx of 0.5 w (x - stopgrad(x - grad))**2 is what the op returns."""
    x, fake, cond, uncond, _ = latents(shape=(2, 6), device=device)
    weight = torch.tensor([1.0, 3.0], dtype=torch.float64, device=device)
    loss = redmd_loss(x, fake, cond, uncond, weight)
    _, grad = formula(x, fake, cond, uncond, torch.ones(2, dtype=torch.float64), 3.0)
    target = (x.detach() - grad.to(device) * x.numel()).detach()
    surrogate = (0.5 * weight[:, None] * (x - target).square()).sum() / x.numel()
    torch.testing.assert_close(loss, surrogate, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(*(torch.autograd.grad(y, x)[0] for y in (loss, surrogate)), rtol=1e-12, atol=1e-12)


def test_module_weights_by_the_exponential_of_each_samples_reward(device, backend):
    x, fake, cond, uncond, _ = latents(torch.float32, device=device)
    reward = torch.tensor([0.3, -0.2, 1.1], device=device, requires_grad=True)
    loss = ReDMDLoss(beta=2.0, guidance_scale=3.0)(x, fake, cond, uncond, reward)
    expected = redmd_loss(x, fake, cond, uncond, (2.0 * reward).exp(), guidance_scale=3.0)
    assert torch.equal(loss, expected)
    assert torch.autograd.grad(loss, reward, allow_unused=True)[0] is None
    plain = ReDMDLoss(beta=0.0)(x, fake, cond, uncond, reward)
    assert torch.equal(plain, redmd_loss(x, fake, cond, uncond, torch.ones(3, device=device)))


REWARD = torch.tensor([0.3, -0.2, 1.1], dtype=torch.float64)
USER = torch.tensor([2.0, 0.0, 0.5], dtype=torch.float64)
WEIGHTED = {  # exp(2 r), clipped, then divided by its mean, then times the caller's, written out again
    "plain": ({}, None, [math.exp(0.6), math.exp(-0.4), math.exp(2.2)]),
    "clipped": ({"max_weight": 3.0}, None, [math.exp(0.6), math.exp(-0.4), 3.0]),
    "normalized": (
        {"normalize": True}, None,
        [3 * math.exp(r) / (math.exp(0.6) + math.exp(-0.4) + math.exp(2.2)) for r in (0.6, -0.4, 2.2)],
    ),
    "the caller's": ({}, USER, [2 * math.exp(0.6), 0.0, 0.5 * math.exp(2.2)]),
    "all three": (
        {"max_weight": 3.0, "normalize": True}, USER,
        [3 * w / (math.exp(0.6) + math.exp(-0.4) + 3.0) for w in (2 * math.exp(0.6), 0.0, 1.5)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("options, sample_weight, expected", WEIGHTED.values(), ids=WEIGHTED)
@pytest.mark.parametrize("mask", ["no mask", "mask"])
def test_weights_and_metrics_of_the_module(options, sample_weight, expected, mask, device, backend):
    x, fake, cond, uncond, _ = latents(device=device)
    mask = MASKS[mask]
    given = dict(mask=None if mask is None else mask.to(device), return_metrics=True)
    if sample_weight is not None:
        given["sample_weight"] = sample_weight.to(device)
    module = ReDMDLoss(beta=2.0, guidance_scale=1.5, **options)
    loss, metrics = module(x, fake, cond, uncond, REWARD.to(device), **given)
    weight = torch.tensor(expected, dtype=torch.float64)
    exact, grad = formula(*(t.detach().cpu() for t in (x, fake, cond, uncond)), weight, 1.5, mask)
    close = {"rtol": 1e-12, "atol": 1e-15}
    torch.testing.assert_close(loss.detach().cpu(), exact, **close)
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0].cpu(), grad, **close)
    assert metrics.keys() == {"weight", "effective_sample_size", "gradient_norm"}
    assert not any(metric.requires_grad for metric in metrics.values())
    torch.testing.assert_close(metrics["weight"].cpu(), weight, **close)
    effective = sum(expected) ** 2 / sum(w * w for w in expected)
    assert metrics["effective_sample_size"].item() == pytest.approx(effective, rel=1e-12)
    norms = [math.sqrt(sum(g * g for g in sample.flatten().tolist())) for sample in grad]
    assert metrics["gradient_norm"].tolist() == pytest.approx(norms, rel=1e-12)
    with torch.no_grad():
        same, metrics = module(x, fake, cond, uncond, REWARD.to(device), **given)
    assert torch.equal(same, loss) and metrics.keys() == {"weight", "effective_sample_size"}


def test_effective_sample_size():
    assert effective_sample_size(torch.tensor([0.3, 0.3, 0.3, 0.3])).item() == pytest.approx(4)
    assert effective_sample_size(torch.tensor([0.0, 0.0, 7.0])).item() == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_reward(bad, device):
    """An error on the CPU; elsewhere nothing is read by the host, and the loss shows it."""
    x, fake, cond, _, _ = latents(torch.float32, device=device)
    reward = torch.tensor([0.0, bad, 1.0], device=device)
    if torch.device(device).type == "cpu":
        with pytest.raises(ValueError, match=rf"reward must be finite, got \[0.0, {bad}, 1.0\]"):
            ReDMDLoss()(x, fake, cond, None, reward)
    elif bad != -math.inf:  # e^-inf is 0
        assert not ReDMDLoss()(x, fake, cond, None, reward).isfinite()


def test_a_reward_on_a_device_is_not_read():
    """The meta device has nothing to read: what reads values raises there."""
    x, fake, cond, _, _ = (t.to("meta") for t in latents(torch.float32))
    reward, weight = torch.zeros(3, device="meta"), torch.ones(3, device="meta")
    loss, _ = ReDMDLoss(max_weight=2.0, normalize=True)(
        x, fake, cond, None, reward, sample_weight=weight, return_metrics=True
    )
    assert loss.device.type == "meta" and loss.shape == ()


def test_where_student_equals_teacher_grad_is_zero_even_if_norm_is(device, backend):
    x, *_ = latents(torch.float32, device=device)
    same = x.detach().clone()
    loss = redmd_loss(x, same, same, None, torch.ones(3, device=device))  # 0 / 0 everywhere
    assert loss.item() == 0 and not torch.autograd.grad(loss, x)[0].any()
    partly = same.clone()
    partly[0] += 1  # sample 0: norm > 0; the others: 0 / 0
    loss = redmd_loss(x, same, partly, None, torch.ones(3, device=device))
    (grad,) = torch.autograd.grad(loss, x)
    assert grad[0].any() and not grad[1:].any() and math.isfinite(loss.item())


def test_non_finite_entries_are_dropped_not_spread(device, backend):
    x, fake, cond, _, _ = latents(torch.float32, device=device)
    fake = fake.clone()
    fake[1, 2, 3, 4, 5], fake[2, 0, 0, 0, 0] = torch.nan, torch.inf
    (grad,) = torch.autograd.grad(redmd_loss(x, fake, cond, None, torch.ones(3, device=device)), x)
    assert grad.isfinite().all() and grad[1, 2, 3, 4, 5] == 0 and grad[2, 0, 0, 0, 0] == 0


def test_the_number_of_threads_does_not_change_a_bit():
    x, fake, cond, uncond, _ = latents(torch.float32, shape=(2, 21, 16, 20, 26))
    results, threads = [], torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        loss = redmd_loss(x, fake, cond, uncond, torch.ones(2))
        results.append((loss, torch.autograd.grad(loss, x)[0]))
    torch.set_num_threads(threads)
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def test_inputs_may_be_strided(device, backend):
    tensors = [t.detach().transpose(1, 2) for t in latents(torch.float32, device=device)[:4]]
    weight = torch.ones(3, device=device)
    expected = redmd_loss(*(t.contiguous() for t in tensors), weight)
    torch.testing.assert_close(redmd_loss(*tensors, weight), expected)
    x = tensors[0].requires_grad_()
    (grad,) = torch.autograd.grad(redmd_loss(x, *tensors[1:], weight), x)
    y = tensors[0].detach().contiguous().requires_grad_()
    torch.testing.assert_close(grad, torch.autograd.grad(redmd_loss(y, *tensors[1:], weight), y)[0])


BAD = [
    (dict(x=torch.zeros(4)), ValueError, "x must have a batch and at least one more dimension"),
    (dict(x=torch.zeros(2, 3).int()), TypeError, "x must be float16"),
    (dict(fake=torch.zeros(2, 4)), ValueError, r"fake must have x's shape \(2, 3\), got \(2, 4\)"),
    (dict(real_uncond=torch.zeros(3)), ValueError, "real_uncond must have x's shape"),
    (dict(real_cond=torch.zeros(2, 3, device="meta")), ValueError, "real_cond must be on cpu, got meta"),
    (dict(weight=torch.zeros(3)), ValueError, r"weight must be \[batch=2\], got shape \(3,\)"),
    (dict(weight=1.0), TypeError, "weight must be a tensor, got float"),
    (dict(mask=torch.zeros(2, 3)), TypeError, "mask must be a bool tensor, got torch.float32"),
    (dict(mask=torch.ones(5, dtype=torch.bool)), ValueError, r"mask must broadcast to \(2, 3\), got \(5,\)"),
]


@pytest.mark.parametrize("changes, error, message", BAD)
def test_bad_input(changes, error, message):
    options = {name: torch.zeros(2, 3) for name in ("x", "fake", "real_cond", "real_uncond")}
    options |= dict(weight=torch.ones(2)) | changes
    with pytest.raises(error, match=message):
        redmd_loss(**options)


BAD_OF_THE_MODULE = [
    (dict(x=torch.zeros(())), ValueError, "x must have a batch"),
    (dict(reward=1.0), TypeError, "reward must be a tensor, got float"),
    (dict(reward=torch.zeros(2, 1)), ValueError, "reward must have 1 dimensions"),
    (dict(reward=torch.zeros(3)), ValueError, r"reward must be \[batch=2\], got shape \(3,\)"),
    (dict(reward=torch.zeros(2, device="meta")), ValueError, "reward must be on cpu, got meta"),
    (dict(sample_weight=torch.zeros(3)), ValueError, r"sample_weight must be \[batch=2\]"),
    (dict(sample_weight=torch.zeros(2, dtype=torch.long)), TypeError, "sample_weight must be float16"),
]


@pytest.mark.parametrize("changes, error, message", BAD_OF_THE_MODULE)
def test_bad_input_of_the_module(changes, error, message):
    options = {name: torch.zeros(2, 3) for name in ("x", "fake", "real_cond", "real_uncond")}
    options |= dict(reward=torch.ones(2)) | changes
    with pytest.raises(error, match=message):
        ReDMDLoss()(**options)


@pytest.mark.parametrize(
    "options",
    [dict(beta=math.nan), dict(guidance_scale=math.inf), dict(fake_guidance_scale=math.nan), dict(max_weight=0.0),
     dict(max_weight=math.nan)],
)  # fmt: skip
def test_bad_settings_of_the_module(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
        ReDMDLoss(**options)


def test_losses_are_public():
    assert rf.losses.ReDMDLoss is ReDMDLoss


@pytest.mark.skipif(native.missing is not None, reason=f"of the compiled loss: {native.missing}")
def test_extra_memory_is_at_most_two_latents():
    """What the allocator hands out at once during forward and backward: the gradient, and it times the incoming one."""
    x, fake, cond, uncond, _ = latents(torch.float32, shape=(1, 21, 16, 20, 26))
    weight, mask = torch.ones(1), torch.rand(x.shape) > 0.5
    with torch.profiler.profile(profile_memory=True) as profile:
        (2.0 * redmd_loss(x, fake, cond, uncond, weight, mask=mask)).backward()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert x.nbytes <= peak <= 2 * x.nbytes + 4096


def test_backward_twice(device, backend):
    """The gradient that backward hands out is not the saved one once the graph is kept."""
    x, fake, cond, _, _ = latents(torch.float32, device=device)
    loss = redmd_loss(x, fake, cond, None, torch.ones(3, device=device))
    loss.backward(retain_graph=True)
    once = x.grad.clone()
    x.grad.mul_(7.0)
    x.grad = None
    (3.0 * loss).backward()
    torch.testing.assert_close(x.grad, 3.0 * once)
