"""The Re-DMD training step: accumulation, resumption, sharding, and that nothing happens on bad input."""

import copy
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_redmd import formula
from torch.nn.attention import SDPBackend, sdpa_kernel
from training_setup import SHARDED, batches, make

import rfkernels as rf
from rfkernels.training import ReDMDConfig, load_trainer, save_trainer


def gradients(trainer, given, monkeypatch):
    """What a step hands to the optimisers, by network."""
    seen = {}

    def update(name, weights, optimizer):
        seen[name] = [p.grad.clone() for p in weights.values()]
        return torch.zeros(())

    monkeypatch.setattr(trainer, "_update", update)
    metrics = trainer.step(given)
    return seen["student"], seen["critic"], metrics


@pytest.mark.parametrize("normalize", [False, True])
def test_micro_batches_are_one_big_batch(normalize, device, monkeypatch):
    results = []
    for sizes in ((4,), (2, 2), (1, 1, 1, 1)):
        trainer = make(device, accumulation=len(sizes), normalize_weights=normalize, beta=30.0)
        results.append(gradients(trainer, batches(0, sizes, device), monkeypatch))
    for other in results[1:]:
        for a, b in zip((*results[0][0], *results[0][1]), (*other[0], *other[1]), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
        for name in results[0][2]:
            torch.testing.assert_close(results[0][2][name], other[2][name], rtol=1e-9, atol=1e-12)
    assert results[0][2]["weight"].std() > 0.01
    assert normalize == bool((results[0][2]["weight"].mean() - 1).abs() < 1e-12)


def test_the_students_gradient_is_the_formulas(device, monkeypatch):
    """From what teacher and critic were asked and answered, and the clip's reward: the formula written out again."""
    trainer, asked = make(device, beta=3.0), {"teacher": [], "critic": []}
    for name, calls in asked.items():
        getattr(trainer, name).register_forward_hook(lambda _, args, out, calls=calls: calls.append((*args, out)))
    monkeypatch.setattr(trainer, "_train_critic", lambda _: {})
    clips, roll = [], trainer._roll
    monkeypatch.setattr(trainer, "_roll", lambda *args: clips.append(roll(*args)) or clips[-1])
    found = []
    given = batches(0, (2,), device)
    monkeypatch.setattr(trainer, "_update", lambda _, weights, __: found.extend(
        p.grad.clone() for p in weights.values()) or torch.zeros(()))  # fmt: skip
    monkeypatch.setattr(torch.Tensor, "backward", lambda self, **_: torch.autograd.backward(self, retain_graph=True))
    metrics = trainer.step(given)
    (cond, uncond), (fake,) = asked["teacher"], asked["critic"]
    noisy, times, context, _ = cond
    assert torch.equal(context, given[0][0]) and torch.equal(uncond[2], trainer.uncond.expand(2, -1, -1))
    assert all(torch.equal(noisy, call[0]) and torch.equal(times, call[1]) for call in (uncond, fake))
    assert times.shape == (2,) and times[0] != times[1]
    sigma = times.double().view(2, 1, 1, 1, 1) / 1000
    clean = [noisy - sigma * call[-1] for call in (fake, cond, uncond)]
    x = clips[0].latents[:, clips[0].first_grad_frame :]
    assert clips[0].first_grad_frame == 1 and x.shape[1] == 4
    weight = (3.0 * torch.sigmoid(x.detach()).mean((1, 2, 3, 4))).exp()
    loss, grad = formula(x, *clean, weight, 3.0)
    torch.testing.assert_close(metrics["loss"], loss, rtol=1e-9, atol=0)
    expected = torch.autograd.grad(x, list(trainer.student.parameters()), grad)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-12)


def test_one_critic_update_a_step_and_every_second_one_of_the_student(device):
    trainer = make(device, accumulation=1)
    student, critic = trainer.student.head.head.weight, trainer.critic.head.head.weight
    assert not any(p.requires_grad for p in trainer.teacher.parameters())
    teacher = copy.deepcopy(trainer.teacher.state_dict())
    before = critic.detach().clone()
    for step, metrics in enumerate(trainer.train(lambda step: batches(step, (2,), device), 4), 1):
        assert ("loss" in metrics) == (step % 2 == 1) and metrics["critic_loss"].isfinite()
        if step == 1:
            first, ema = student.clone(), trainer.ema["head.head.weight"].clone()
            assert torch.equal(ema, first.float())  # begins as a copy
        if step == 2:
            assert torch.equal(student, first)
        if step == 3:
            expected = ema + 0.1 * (student.detach().float() - ema)
            torch.testing.assert_close(trainer.ema["head.head.weight"], expected)
            assert not torch.equal(student, first)
            assert 1 <= metrics["effective_sample_size"] <= 2 and metrics["grad_norm"] > 0
            assert metrics["weight"].shape == metrics["reward"].shape == (2,)
        assert not torch.equal(critic, before)
        before = critic.detach().clone()
    assert trainer.step_index == 4
    assert all(torch.equal(x, teacher[name]) for name, x in trainer.teacher.state_dict().items())


def test_no_reward_is_beta_zero_is_dmd(device, monkeypatch):
    plain = gradients(make(device, reward=None), batches(0, (2,), device), monkeypatch)
    zero = gradients(make(device, beta=0.0), batches(0, (2,), device), monkeypatch)
    assert all(torch.equal(a, b) for a, b in zip(plain[0], zero[0], strict=True))


def test_clipping(device):
    trainer = make(device, max_grad_norm=1e-3)
    seen = []
    trainer.optimizer.register_step_pre_hook(
        lambda *_: seen.append(torch.stack([p.grad.norm() for p in trainer.student.parameters()]).norm().item())
    )
    assert trainer.step(batches(0, (1,), device))["grad_norm"] > 1e-3
    assert seen[0] == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("autocast", [None, "bfloat16"])
def test_resumes_bit_for_bit(autocast, device, tmp_path):
    def random_reward(frames, prompts):  # the global generator's state counts too
        return torch.rand(len(frames))

    def data(step):
        return batches(step, (1, 1), device, torch.float32)

    options = dict(dtype=torch.float32, reward=random_reward, accumulation=2, autocast=autocast)
    trainer = make(device, **options)
    # Cross-attention: the backward of torch's fused kernels adds in any order on a GPU.
    with sdpa_kernel(SDPBackend.MATH):
        list(trainer.train(data, 3))
        save_trainer(trainer, tmp_path / "run", {"epoch": 7})
        expected = list(trainer.train(data, 6))
        other = make(device, **options)
        other.step(data(9))  # it has been elsewhere
        assert load_trainer(other, tmp_path / "run") == {"epoch": 7}
        got = list(other.train(data, 6))
    assert len(got) == 3
    for a, b in zip(expected, got, strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    for name in ("student", "critic"):
        states = (getattr(t, name).state_dict() for t in (trainer, other))
        assert all(torch.equal(a, b) for a, b in zip(*(s.values() for s in states), strict=True))
    assert all(torch.equal(x, other.ema[name]) for name, x in trainer.ema.items())
    model = rf.models.from_pretrained(tmp_path / "run" / "ema")
    assert model.config == trainer.student.config


def compiled(model):
    return torch.compile(model, backend="eager")


def compiled_blocks(model):
    model.blocks[0] = compiled(model.blocks[0])
    return model


def recomputed_blocks(model):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model.blocks[0] = checkpoint_wrapper(model.blocks[0])
    return model


def frozen(model):
    model.text_embedding.requires_grad_(False)
    return model


def adapted(model):
    peft = pytest.importorskip("peft")
    options = dict(r=2, target_modules=["q", "ffn.0"], modules_to_save=["head.head"], init_lora_weights=False)
    return peft.get_peft_model(model, peft.LoraConfig(**options))


def adapted_within(model):
    """As peft's integrations do: the model stays what it was, its layers are exchanged."""
    adapted(model)
    return model


@pytest.mark.parametrize(
    "before, after",
    [
        (compiled, lambda model: model),
        (lambda model: model, compiled),
        (recomputed_blocks, compiled_blocks),
        (frozen, frozen),
        (adapted, adapted_within),
        (adapted_within, lambda model: compiled(adapted(model))),
    ],
)
def test_a_student_goes_on_however_it_is_wrapped(before, after, device, tmp_path):
    trainer = make(device, dtype=torch.float32, wrap=before, generator_every=1)
    data = [batches(step, (2,), device, torch.float32) for step in range(2)]
    trainer.step(data[0])
    save_trainer(trainer, tmp_path / "run")
    other = make(device, dtype=torch.float32, wrap=after, generator_every=1)
    load_trainer(other, tmp_path / "run")
    # What is saved are whole, plain models; they are the student, with adapters merged.
    student, average = (rf.models.from_pretrained(tmp_path / "run" / name).to(device) for name in ("student", "ema"))
    clip = torch.randn(1, 2, 4, 4, 6, device=device), torch.tensor([500.0], device=device), data[0][0][0][:1]
    with torch.no_grad():
        expected = trainer.student(*clip)
        for model in (student, average):  # which begins as a copy
            torch.testing.assert_close(model(*clip), expected, rtol=1e-4, atol=1e-5)
    expected, got = trainer.step(data[1]), other.step(data[1])
    assert all(torch.equal(x, got[name]) for name, x in expected.items())
    assert trainer.ema and all(torch.equal(x, other.ema[name]) for name, x in trainer.ema.items())


def test_an_average_saved_without_the_frozen_weights_is_loaded(device, tmp_path):
    """As runs that were saved before have it."""
    trainer = make(device, wrap=frozen)
    trainer.step(batches(0, (1,), device))
    save_trainer(trainer, tmp_path / "run")
    file = tmp_path / "run" / "ema" / "diffusion_pytorch_model.safetensors"
    rf.models.checkpoints.save_weights(trainer.ema, trainer.student.config, file.parent)
    other = make(device, wrap=frozen)
    load_trainer(other, tmp_path / "run")
    assert all(torch.equal(x, other.ema[name]) for name, x in trainer.ema.items())
    before = state(trainer := make(device))
    with pytest.raises(ValueError, match=r"ema must hold|must train the weights .* such as text_embedding"):
        load_trainer(trainer, tmp_path / "run")
    assert all(torch.equal(a, b) for a, b in zip(before[0], state(trainer)[0], strict=True))


def test_what_could_not_be_loaded_is_not_saved(device, tmp_path):
    peft, numpy = pytest.importorskip("peft"), pytest.importorskip("numpy")
    trainer = make(device, lr=numpy.float64(1e-3), num_frames=numpy.int64(5), alpha=torch.tensor([0.5, 0.75]))
    save_trainer(trainer, tmp_path / "run", {"epoch": 1})
    for extra in ({"folder": tmp_path}, {"schedule": lambda step: 1.0}):
        with pytest.raises(ValueError, match="extra must be plain values"):
            save_trainer(trainer, tmp_path / "run", extra)
    again = make(device, lr=1e-3, num_frames=5, alpha=[0.5, 0.75], steps=[1000, 500])
    assert load_trainer(again, tmp_path / "run") == {"epoch": 1}
    with pytest.raises(ValueError, match=r"blocks.0.self_attn.q must have a plain LoRA.*lora_magnitude_vector"):
        make(device, wrap=lambda m: peft.get_peft_model(m, peft.LoraConfig(r=2, target_modules=["q"], use_dora=True)))


@pytest.mark.parametrize("stopped", ["first", "second"])
def test_a_save_that_was_stopped_loses_nothing(stopped, device, tmp_path, monkeypatch):
    trainer = make(device)
    save_trainer(trainer, tmp_path / "run", {"at": 0})
    replace = os.replace

    def stop(source, target):
        if Path(target).name == ("run.old" if stopped == "first" else "run"):
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        save_trainer(trainer, tmp_path / "run", {"at": 1})
    monkeypatch.undo()
    assert load_trainer(trainer, tmp_path / "run") == {"at": 0 if stopped == "first" else 1}


def test_optimisation_settings_may_change(device, tmp_path):
    trainer = make(device)
    trainer.step(batches(0, (1,), device))
    save_trainer(trainer, tmp_path / "run")
    free = dict(lr=3e-4, critic_lr=2e-4, weight_decay=0.2, max_grad_norm=None, max_weight=1.5, ema_decay=0.5,
                total_steps=9)  # fmt: skip
    other = make(device, **free)
    load_trainer(other, tmp_path / "run")
    groups = [o.param_groups[0] for o in (other.optimizer, other.critic_optimizer)]
    assert [g["lr"] for g in groups] == [3e-4, 2e-4] and all(g["weight_decay"] == 0.2 for g in groups)
    assert other.loss.max_weight == 1.5 and other.step_index == 1 and other.optimizer.state
    for group in trainer.optimizer.param_groups:
        group["lr"] = 7e-5  # by a scheduler: where the configuration is the same, it stays
    save_trainer(trainer, tmp_path / "run")
    load_trainer(other := make(device), tmp_path / "run")
    assert other.optimizer.param_groups[0]["lr"] == 7e-5
    for name, value in dict(betas=(0.9, 0.999), alpha=0.9, beta=1.0, seed=5, sink_frames=2).items():
        with pytest.raises(ValueError, match=f"trained with .*{name}"):
            load_trainer(make(device, **{name: value}), tmp_path / "run")


def test_of_ddp_the_model_within_is_trained(tmp_path):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        trainer = make(wrap=torch.nn.parallel.DistributedDataParallel)
        trainer.step(batches(0, (1,)))
        save_trainer(trainer, tmp_path / "run")
        load_trainer(make(wrap=lambda m: compiled(torch.nn.parallel.DistributedDataParallel(m))), tmp_path / "run")
    finally:
        dist.destroy_process_group()
    load_trainer(make(), tmp_path / "run")
    with pytest.raises(TypeError, match="student must be a CausalWan"):
        make(wrap=lambda m: torch.nn.Sequential(m))


def test_two_ranks_are_one_big_batch(tmp_path):
    """torchrun, gloo, FSDP2, recomputation; saved sharded, loaded whole."""
    script = Path(__file__).with_name("training_setup.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    path = os.pathsep.join([str(script.parent), str(script.parents[1]), os.environ.get("PYTHONPATH", "")])
    # FSDP2's mesh is of the accelerator wherever torch sees one, and these ranks are on the CPU.
    hidden = {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(tmp_path)], env=os.environ | hidden,
                          capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    trainer = make(**SHARDED)
    for step in range(2):
        metrics = trainer.step(batches(step, (4,)))
    other = make(checkpointing=True, **SHARDED)
    with pytest.raises(ValueError, match="accumulation"):
        load_trainer(other, tmp_path / "sharded")
    other = make(accumulation=2, checkpointing=True, **SHARDED)
    assert load_trainer(other, tmp_path / "sharded") == {"seen": 2} and other.step_index == 2
    for name in ("student", "critic"):
        for a, b in zip(*(getattr(t, name).parameters() for t in (trainer, other)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    for name, x in trainer.ema.items():
        torch.testing.assert_close(x, other.ema[name])
    seen = torch.load(tmp_path / "metrics.pt", weights_only=True)
    for name in ("grad_norm", "critic_grad_norm", "effective_sample_size"):
        assert seen[name] == pytest.approx(metrics[name].item(), rel=1e-6)
    assert seen["stopped"]


def state(trainer):
    modules = (trainer.student, trainer.critic, trainer.teacher)
    tensors = [x.clone() for m in modules for x in m.state_dict().values()]
    return tensors, [len(o.state) for o in (trainer.optimizer, trainer.critic_optimizer)], trainer.step_index


@pytest.mark.parametrize(
    "reward, got",
    [
        (lambda frames, _: frames.new_tensor([1.0, torch.nan]), r"\[1.0, nan\]"),
        (lambda frames, _: frames.new_tensor([torch.inf, 0.0]), "inf"),
        (lambda frames, _: frames.new_zeros(2, 1), r"shape \(2, 1\)"),
        (lambda frames, _: 3.0, "float"),
    ],
)
def test_a_bad_reward_stops_before_anything_changes(reward, got, device):
    trainer = make(device, reward=reward)
    before = state(trainer)
    with pytest.raises(ValueError, match=f"reward must be finite, one number for each of 2 samples, got .*{got}"):
        trainer.step(batches(0, (2,), device))
    after = state(trainer)
    assert all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True)) and before[1:] == after[1:]
    assert all(p.grad is None for p in trainer.student.parameters())


def test_a_non_finite_gradient_stops_before_the_optimiser(device):
    trainer = make(device)
    with torch.no_grad():
        trainer.critic.head.head.bias[0] = torch.nan
    trainer.step_index = 1  # the critic's turn alone
    with pytest.raises(FloatingPointError, match="critic's gradient"):
        trainer.step(batches(0, (1,), device))
    assert not trainer.critic_optimizer.state and trainer.step_index == 1


@pytest.mark.parametrize("saved", [False, True])
def test_a_step_whose_critic_failed_is_finished_by_the_next_call(saved, device, monkeypatch, tmp_path):
    whole, trainer, given = make(device), make(device), batches(0, (2,), device)
    expected = whole.step(given)
    before = trainer.student.head.head.weight.clone(), trainer.critic.head.head.weight.clone()
    with monkeypatch.context() as patch:
        patch.setattr("rfkernels.training.trainer.critic_loss", lambda *_, **__: 1 / 0)
        for _ in range(2):  # failing twice moves the student once
            with pytest.raises(ZeroDivisionError):
                trainer.step(given)
    assert trainer.step_index == 0 and not trainer.critic_optimizer.state
    assert torch.equal(trainer.critic.head.head.weight, before[1])
    assert not torch.equal(trainer.student.head.head.weight, before[0])
    if saved:
        save_trainer(trainer, tmp_path / "run")
        trainer = make(device)
        load_trainer(trainer, tmp_path / "run")
    metrics = trainer.step(given)
    assert trainer.step_index == 1 and trainer.unfinished is None
    assert metrics.keys() == ({"critic_loss", "critic_grad_norm"} if saved else expected.keys())
    assert all(torch.equal(x, expected[name]) for name, x in metrics.items())
    for a, b in zip(state(trainer)[0], state(whole)[0], strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(x, whole.ema[name]) for name, x in trainer.ema.items())


def test_bad_input(device, tmp_path):
    trainer = make(device)
    for given, message in [
        ([], "accumulation=1"),
        ([(torch.zeros(1, 3, 7, device=device), ["x"])], "text_dim=16"),
        ([(torch.zeros(2, 3, 16, device=device), ["x"])], "one prompt for each of 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            trainer.step(given)
    with pytest.raises(FileNotFoundError, match="must hold a trainer"):
        load_trainer(trainer, tmp_path)
    with pytest.raises(ValueError, match="three models"):
        rf.training.ReDMDTrainer(trainer.student, trainer.student, trainer.critic, None)
    other = make(device, dtype=torch.float32).teacher
    other.config = dataclasses.replace(other.config, text_dim=8)
    with pytest.raises(ValueError, match="teacher must have the student's text_dim=16, got 8"):
        rf.training.ReDMDTrainer(trainer.student, other, trainer.critic, None)
    with pytest.raises(ValueError, match="critic must be on the student's device"):
        rf.training.ReDMDTrainer(trainer.student, trainer.teacher, other.to("meta"), None)
    with pytest.raises(ValueError, match="decode"):
        rf.training.ReDMDTrainer(trainer.student, trainer.teacher, trainer.critic, None, reward=lambda *_: None)
    for field, value in dict(
        accumulation=0, window_frames=1, lr=-1, max_grad_norm=0, ema_decay=1.0, autocast="fp8", steps=(1, 2),
        timestep_bounds=(980, 20), generator_every=0, first_chunk_frames=9, context_noise=-1,
    ).items():  # fmt: skip
        with pytest.raises(ValueError, match=field.split("_")[-1]):
            ReDMDConfig(**{field: value})


def test_batches_that_are_no_list_of_micro_batches(device):
    trainer = make(device)
    context, prompts = batches(0, (2,), device)[0]
    for given, message in [
        ((context, prompts), r"got one pair: give \[\(embeddings, prompts\)\]"),
        (iter([(context, prompts)]), "got list_iterator"),
        ({"context": context}, "got dict"),
        ([context], "got .*Tensor"),
        ([(context, "ab")], "one text as its prompts"),
        ([("a cat", prompts)], "encode_prompts"),
    ]:
        with pytest.raises(TypeError, match=message):
            trainer.step(given)
        with pytest.raises(TypeError, match=message):
            next(trainer.train(lambda step, given=given: given))
    with pytest.raises(TypeError, match="data must be a function"):
        next(trainer.train([(context, prompts)]))
    with pytest.raises(TypeError, match=r"uncond must be text embeddings"):
        rf.training.ReDMDTrainer(trainer.student, trainer.teacher, trainer.critic, "blurry")
    assert trainer.step_index == 0


def test_the_published_settings():
    config = ReDMDConfig.published()
    assert (config.lr, config.critic_lr, config.betas) == (2e-6, 4e-7, (0.0, 0.999))
    assert (config.generator_every, config.guidance_scale, config.beta) == (5, 3.0, 2.0)
    assert (config.ema_decay, config.ema_start, config.accumulation, config.total_steps) == (0.99, 200, 8, 601)
    assert config.timestep_bounds == (20, 980) and config.grad_frames == 21 and config.shift == 5
    assert ReDMDConfig.published(seed=3).seed == 3
