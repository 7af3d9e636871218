"""What Re-DMD does to a distribution, with exact scores: a teacher of two modes and a reward that favours one."""

import pytest
import torch
from torch import nn

from rfkernels.losses import FlowMatchSchedule, ReDMDLoss

MODES, SPREAD = torch.tensor([-2.0, 2.0]), 0.4


def posterior_mean(noisy, sigma, means, spreads):
    """E[x0 | x_t] where x0 is an even mixture of normals; exact. noisy, sigma: [B, 1]; means, spreads: [n]."""
    scale = 1 - sigma
    variance = scale**2 * spreads**2 + sigma**2
    share = (-(noisy - scale * means).square() / (2 * variance) - variance.log() / 2).softmax(1)
    return (share * (means + scale * spreads**2 / variance * (noisy - scale * means))).sum(1, keepdim=True)


def loss_of(x, means, spreads, beta):
    """Of generated samples [B, 1], the second half of which mirrors the first; their own mixture is the fake score.

    The reward is x / 2 clamped to -1..1: 1 at the right mode, -1 at the left one.
    """
    half = len(x) // 2
    times = FlowMatchSchedule(1.0).random_timesteps(half)[:, None].repeat(2, 1)
    noise = torch.randn(half, 1)
    noisy = FlowMatchSchedule.add_noise(x.detach(), torch.cat([noise, -noise]), times)
    fake = posterior_mean(noisy, times / 1000, means.detach(), spreads.detach())
    real = posterior_mean(noisy, times / 1000, MODES, torch.full((2,), SPREAD))
    return ReDMDLoss(beta, guidance_scale=0.0)(x, fake, real, None, (x.detach() / 2).clamp(-1, 1).squeeze(1))


def distil(beta, means, spread=1.0, steps=400, half=1024, rate=0.02):
    """A student that is an even mixture of len(means) normals, their means and spreads learnt; the last half's average
    (means, spreads)."""
    torch.manual_seed(0)
    means = nn.Parameter(torch.tensor(means))
    log_spreads = nn.Parameter(torch.full_like(means, spread).log())
    optimizer = torch.optim.Adam([means, log_spreads], rate, betas=(0.0, 0.999))
    seen = []
    for index in range(steps):
        which, z = torch.randint(len(means), (half,)), torch.randn(half)
        which, z = torch.cat([which, len(means) - 1 - which]), torch.cat([z, -z])
        x = (means[which] + log_spreads.exp()[which] * z)[:, None]
        optimizer.zero_grad()
        loss_of(x, means, log_spreads.exp(), beta).backward()
        optimizer.step()
        if index >= steps // 2:
            seen.append(torch.stack([means.detach(), log_spreads.detach().exp()]).clone())
    return torch.stack(seen).mean(0)


def test_an_affine_student_moves_towards_the_reward_monotonically_in_beta():
    """One normal cannot hold both modes: which part of them it covers is the reward's to say."""
    tilts = [distil(beta, [0.0])[0].item() for beta in (0.0, 1.0, 2.0)]
    assert abs(tilts[0]) < 0.05 and tilts[0] + 0.05 < tilts[1] and tilts[1] + 0.05 < tilts[2] < 2


def test_a_student_that_can_hold_both_modes_is_not_tilted():
    """Begun near the teacher it finds it under a reward: no law of the form q * exp(beta r)."""
    means, spreads = distil(2.0, [-1.8, 1.8], spread=0.5, steps=250)
    torch.testing.assert_close(means, MODES, rtol=0, atol=0.01)
    torch.testing.assert_close(spreads, torch.full((2,), SPREAD), rtol=0, atol=0.01)


@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
def test_where_student_equals_teacher_nothing_pulls(beta):
    x = (MODES[torch.randint(2, (512,))] + SPREAD * torch.randn(512))[:, None].requires_grad_()
    loss = loss_of(x, MODES, torch.full((2,), SPREAD), beta)
    assert loss == 0 and not torch.autograd.grad(loss, x)[0].any()
