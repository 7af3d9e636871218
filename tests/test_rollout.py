"""Self-Forcing rollouts against the sampler and against finite differences; initialisation from trajectories."""

import pytest
import torch
from test_model import small

import rfkernels as rf
from rfkernels.draws import keyed_generator
from rfkernels.models import ChunkMask, StreamingSampler
from rfkernels.training import SelfForcingRollout, collect_trajectories, ode_regression_loss

CACHE = dict(chunk_frames=2, sink_frames=1, window_frames=3, alpha=0.6)


def prompts(device, batch=2):
    return torch.randn(batch, 3, 16, dtype=torch.float64, device=device)


def roll(rollout, context, frames=9, seed=5, **options):
    generators = [keyed_generator(seed, i) for i in range(len(context))]
    return rollout(context, frames, 4, 6, generator=generators, **options)


def test_equals_streaming_when_every_step_is_taken(device, monkeypatch):
    """Evictions and fusing included: the sampler, fed the same noise, makes the same clip."""
    model, context = small(device), prompts(device)
    rollout = SelfForcingRollout(model, last_step_only=True, grad_frames=4, **CACHE)
    clip = roll(rollout, context)
    assert clip.first_grad_frame == 6 and clip.exit_steps == [3] * 5 and clip.graded.shape[1] == 3
    sampler = StreamingSampler(model, height=4, width=6, batch_size=2, **CACHE)
    generators = [keyed_generator(5, i) for i in range(2)]

    def noise(self, frames, generator=None, again=0):
        while True:
            yield rf.draws.draw(torch.randn, (2, frames, 4, 4, 6), generators, device, torch.float64)

    monkeypatch.setattr(StreamingSampler, "_noise", noise)
    streamed = torch.cat(list(sampler.stream(context, 9)), 1)
    torch.testing.assert_close(clip.latents.detach(), streamed, rtol=1e-11, atol=1e-11)


def passes(model):
    """Records (gradients wanted, timestep) of every denoising pass."""
    seen = []
    model.register_forward_pre_hook(
        lambda _, args: seen.append((torch.is_grad_enabled(), args[1][0].item())) if args[0] is not None else None
    )
    return seen


def test_gradients_at_one_step_and_in_the_last_frames_only(device):
    model, context = small(device), prompts(device)
    rollout, seen = SelfForcingRollout(model, grad_frames=4, **CACHE), passes(model)
    times = rollout.timesteps
    clip = roll(rollout, context, 8, exit_steps=[2, 0, 1, 3])
    expected = []
    for chunk, last in enumerate((2, 0, 1, 3)):
        expected += [(False, t) for t in times[:last]] + [(chunk >= 2, times[last])] + [(False, 0.0)]
    assert [g for g, _ in seen] == [g for g, _ in expected[:-1]]  # nobody reads the cache after the last chunk
    assert [t for _, t in seen] == pytest.approx([t for _, t in expected[:-1]])
    assert not torch.autograd.grad(clip.latents[:, :4].sum(), model.head.head.bias, allow_unused=True,
                                   materialize_grads=True, retain_graph=True)[0].any()  # fmt: skip
    clip.graded.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with torch.no_grad():
        assert not roll(rollout, context, 4).latents.requires_grad


def test_gradient_against_finite_differences(device):
    """Of one chunk on a frozen past: the past does not depend on the weights, so it is rolled out by the old ones."""
    model, context = small(device), prompts(device, 1)
    rollout = SelfForcingRollout(model, grad_frames=2, **CACHE)
    parameter = model.blocks[0].cross_attn.k.weight
    direction = torch.randn_like(parameter)
    past = roll(rollout, context, 6, exit_steps=[1, 1, 0])
    past.graded.square().sum().backward()
    values = []
    for eps in (1e-5, -1e-5):

        def shift(_, args, eps=eps):
            if torch.is_grad_enabled():
                parameter.data.add_(direction, alpha=eps)

        hook = model.register_forward_pre_hook(shift)
        values.append(roll(rollout, context, 6, exit_steps=[1, 1, 0]).graded.square().sum().item())
        hook.remove()
        parameter.data.sub_(direction, alpha=eps)
    expected = (values[0] - values[1]) / 2e-5
    assert (parameter.grad * direction).sum().item() == pytest.approx(expected, rel=1e-5)


def test_checkpointing_changes_nothing(device):
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        model = small(device, checkpointing=checkpointing)
        clip = roll(SelfForcingRollout(model, grad_frames=6, **CACHE), prompts(device), 8, exit_steps=[1] * 4)
        clip.graded.square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_samples_do_not_depend_on_the_batch_and_choices_on_their_generator(device):
    model, context = small(device), prompts(device)
    rollout = SelfForcingRollout(model, **CACHE)
    with torch.no_grad():
        both = roll(rollout, context, 6, exit_steps=[1] * 3).latents
        alone = rollout(context[1:], 6, 4, 6, generator=[keyed_generator(5, 1)], exit_steps=[1] * 3).latents
        torch.testing.assert_close(both[1:], alone, rtol=1e-11, atol=1e-11)
        given = roll(rollout, context, 5, initial=both[:, :3], exit_steps=[0] * 3)
    assert given.latents.shape[1] == 5
    own = SelfForcingRollout(model, same_step=False, **CACHE)
    exits = [r._exits(40, keyed_generator(7), None) for r in (rollout, own, own)]
    assert len(set(exits[0])) == 1 and set(exits[1]) == {0, 1, 2, 3} and exits[1] == exits[2]


def test_autocast_keeps_the_gradients(device):
    """Weights that autocast has cast within no_grad must not be the ones that the graded pass uses."""
    model = small(device, torch.float32)
    rollout = SelfForcingRollout(model, grad_frames=2, dtype=torch.bfloat16, **CACHE)
    with torch.autocast(device.type, torch.bfloat16):
        clip = roll(rollout, prompts(device).float(), 4, exit_steps=[1, 1])
        clip.graded.square().sum().backward()
    assert clip.latents.dtype == torch.float32
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def test_trajectories_follow_the_ode(device):
    """A linear flow has a closed form, to which Euler steps converge; guidance is cond + g (cond - uncond)."""
    noise = torch.randn(2, 2, 1, 2, 2, dtype=torch.float64, device=device)
    context = torch.tensor([1.0, 2.0], dtype=torch.float64, device=device).view(2, 1, 1)

    def flow(x, timesteps, context):
        return x * context[:, :, :, None, None]

    for uncond, g, rate in ((None, 3.0, context), (context * 0.5, 3.0, 2.5 * context), (context, 0.0, context)):
        sigmas = torch.tensor([1000, 937.5, 2500 / 3, 625, 0], dtype=torch.float64, device=device) / 1000
        exact = noise[:, None] * (rate.view(2, 1) * (sigmas - 1)).exp().view(2, 5, 1, 1, 1, 1)
        errors = [
            (collect_trajectories(flow, noise, context, uncond, guidance_scale=g, solver_steps=n) - exact)[:, 1:]
            for n in (1000, 2000)
        ]
        # A method of first order: half the step, half the error, at every state.
        torch.testing.assert_close(errors[0] / errors[1], torch.full_like(errors[0], 2.0), rtol=0.02, atol=0)


@pytest.mark.parametrize("teacher_forcing", [False, True])
def test_regression_is_the_error_of_each_chunk_at_its_step(teacher_forcing, device):
    model, mask = small(device), ChunkMask(2, 1, 3, first_chunk_frames=1)
    trajectories, context = torch.randn(2, 5, 5, 4, 4, 6, dtype=torch.float64, device=device), prompts(device)
    generators = [keyed_generator(1, i) for i in range(2)]
    calls = []
    hook = model.register_forward_hook(
        lambda _, args, kwargs, out: calls.append((*args, kwargs, out)), with_kwargs=True
    )
    loss = ode_regression_loss(
        model, trajectories, context, mask, teacher_forcing=teacher_forcing, generator=generators
    )
    hook.remove()
    ((noisy, timesteps, _, kwargs, flow),) = calls
    assert ("clean" in kwargs) == teacher_forcing
    times, total = rf.losses.FlowMatchSchedule().timesteps((1000, 750, 500, 250)), 0.0
    for b in range(2):
        assert timesteps[b, 1] == timesteps[b, 2] and timesteps[b, 3] == timesteps[b, 4]
        for f in range(5):
            index = min(range(4), key=lambda i: abs(times[i] - timesteps[b, f].item()))
            assert torch.equal(noisy[b, f], trajectories[b, index, f])
            total += (noisy[b, f] - times[index] / 1000 * flow[b, f] - trajectories[b, -1, f]).square().sum()
    torch.testing.assert_close(loss, total / (2 * 5 * 4 * 4 * 6), rtol=1e-6, atol=0)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_bad_input(device):
    model, context = small(device), prompts(device)
    for changes, message in {
        "grad_frames": dict(grad_frames=-1),
        "window_frames": dict(chunk_frames=4, window_frames=3),
        "context_noise": dict(context_noise=2000),
        "steps must fall": dict(steps=(250, 500)),
    }.items():
        with pytest.raises(ValueError, match=changes):
            SelfForcingRollout(model, **message)
    rollout = SelfForcingRollout(model, **CACHE)
    with pytest.raises(ValueError, match="exit_steps must have one index for each of 2"):
        roll(rollout, context, 4, exit_steps=[0])
    with pytest.raises(ValueError, match=r"exit_steps must be in 0\.\.3"):
        roll(rollout, context, 4, exit_steps=[0, 4])
    with pytest.raises(ValueError, match="initial must be"):
        roll(rollout, context, 4, initial=torch.zeros(1, 2, 4, 4, 6, device=device))
    with pytest.raises(ValueError, match="steps must begin with 1000"):
        collect_trajectories(model, torch.zeros(1, 2, 4, 4, 6), context, steps=(750, 250))
    with pytest.raises(ValueError, match="trajectories must be"):
        ode_regression_loss(model, torch.zeros(2, 4, 4, 4, 4, 6), context, ChunkMask(2, 1, 3))


def test_a_loss_of_trajectories_cuts_a_clip_as_masks_do(device):
    """Frames of one chunk are at one timestep, also where chunks are listed."""
    model, steps = small(device), (1000, 500)
    trajectories = torch.randn(2, 3, 6, model.config.in_channels, 4, 4, dtype=torch.float64, device=device)
    seen = []
    handle = model.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    for mask in (ChunkMask((1, 2, 3), 1, 3), ChunkMask(3, 1, 5, first_chunk_frames=4)):
        ode_regression_loss(model, trajectories, prompts(device), mask, steps=steps)
    handle.remove()
    for times, lengths in zip(seen, ([1, 2, 3], [4, 2]), strict=True):
        assert all(len(set(chunk.tolist())) == 1 for row in times for chunk in row.split(lengths))
