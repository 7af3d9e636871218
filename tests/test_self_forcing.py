"""`integrations.self_forcing.patch` on small models in the style of each repository: the same numbers, unedited."""

import copy

import family
import pytest
import torch
from family import STYLES, TOKENS, Model, latents, new_cache
from torch import nn

import rfkernels as rf

patch = rf.integrations.self_forcing.patch


def both(style, dtype=torch.float64, **sizes):
    """The stand-in as it is, and a patched copy."""
    old = Model(style, **sizes).eval().requires_grad_(False).to(dtype)
    new = copy.deepcopy(old)
    return old, new, patch(new)


def video(model, cache, chunks=8, frames=3, dtype=torch.float64, batch=1, passes=5):
    """Every pass of a video: four of denoising and the clean one, for each chunk."""
    for chunk in range(chunks):
        for step in range(passes):
            x = latents(chunk, step, frames, batch, dtype)
            yield model(x, kv_cache=cache, current_start=chunk * frames * TOKENS)


def difference(old, new):
    pairs = list(zip(old, new, strict=True))
    return max(float((a.double() - b.double()).abs().max()) for a, b in pairs) / max(
        float(a.abs().max()) for a, _ in pairs
    )


@pytest.mark.parametrize("style", STYLES)
def test_float64(style):
    old, new, _ = both(style)
    assert difference(video(old, new_cache(batch=2), batch=2), video(new, new_cache(batch=2), batch=2)) < 1e-12


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_within_twice_theirs(style, dtype):
    old, new, _ = both(style, dtype)
    exact = list(video(copy.deepcopy(old).double(), new_cache()))
    errors = [difference(exact, video(model, new_cache(dtype=dtype), dtype=dtype)) for model in (old, new)]
    assert errors[1] <= 2 * errors[0] + torch.finfo(dtype).eps


@pytest.mark.parametrize("style", STYLES)
def test_undo_gives_the_model_and_its_caches_back(style):
    old, new, undo = both(style)
    cache, names = new_cache(), list(new.state_dict())
    patched = list(video(new, cache, 5))
    undo(), undo()
    assert type(new) is Model and type(new.blocks[0].self_attn) is type(old.blocks[0].self_attn)
    assert names == list(new.state_dict()) and set(cache[0]) == set(new_cache()[0])
    assert all(torch.equal(a, b) for a, b in zip(video(old, new_cache(), 5), video(new, cache, 5), strict=True))
    patch(new)
    assert all(torch.equal(a, b) for a, b in zip(patched, video(new, new_cache(), 5), strict=True))


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("how", ["new tensors", "zeroed", "new dicts"])
def test_a_second_video(style, how):
    old, new, _ = both(style)
    caches = [new_cache(), new_cache()]
    for scene in range(3):
        assert difference(*(video(m, c, 4 + scene, passes=2) for m, c in zip((old, new), caches, strict=True))) < 1e-12
        for index, cache in enumerate(caches):
            for layer in cache:
                for name in ("global_end_index", "local_end_index"):
                    layer[name] = torch.tensor([0]) if how == "new tensors" else layer[name].zero_()
            caches[index] = new_cache() if how == "new dicts" else cache


@pytest.mark.parametrize("style", ["longlive", "infinity"])
@pytest.mark.parametrize("sinks_too", [False, True])
@pytest.mark.parametrize("after", [2, 3, 7])
def test_switch_of_prompts_with_recache(style, sinks_too, after):
    """The newest S + W frames again; a pipeline throws the outputs of that call away."""
    old, new, _ = both(style)
    caches = [new_cache(), new_cache()]
    start = 0
    for scene in range(2):
        for chunk in range(after):
            for step in range(3):
                x = latents(10 * scene + chunk, step)
                a, b = (m(x, kv_cache=c, current_start=start * TOKENS) for m, c in zip((old, new), caches, strict=True))
                torch.testing.assert_close(b, a, atol=1e-12, rtol=0)
            start += 3
        frames = min(9, start)
        for model, cache in zip((old, new), caches, strict=True):
            if sinks_too:
                for layer in cache:
                    layer["k"].zero_(), layer["v"].zero_()
            x = latents(50 + scene, 0, frames)
            model(x, kv_cache=cache, current_start=(start - frames) * TOKENS, sink_recache_after_switch=sinks_too)


@pytest.mark.parametrize("style", STYLES)
def test_two_caches_for_guidance_and_chunks_of_many_lengths(style):
    """Where the first chunk is shorter than the sinks, all but Self-Forcing attend to zeros: not compared."""
    lengths = {"self_forcing": [1, 3, 3, 3, 3, 2, 3], "reward_forcing": [1] * 12}.get(style, [3, 1, 2, 3, 3, 3, 2, 3])
    old, new, _ = both(style, sink=1 if style == "reward_forcing" else 3)
    runs = [(m, new_cache(), new_cache()) for m in (old, new)]
    end = 0
    for chunk, frames in enumerate(lengths):
        for step in range(2):
            x = latents(chunk, step, frames)
            a, b = (
                [m(x + i, kv_cache=cache, current_start=end * TOKENS) for i, cache in enumerate(caches)]
                for m, *caches in runs
            )
            torch.testing.assert_close(b, a, atol=1e-12, rtol=0)
        end += frames


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("local", [-1, 6])
def test_a_cache_larger_than_the_window(style, local):
    old, new, _ = both(style, local=local)
    assert difference(video(old, new_cache(21), 7, passes=2), video(new, new_cache(21), 7, passes=2)) < 1e-12
    if local == -1:
        with pytest.raises(ValueError, match="kv_cache holds 21 frames"):
            list(video(new, new_cache(21), 8, passes=1))


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_a_rollout(style, checkpointing):
    """The last pass of each chunk with a graph, as in their training; keys of the past are detached."""
    gradients = []
    for patched in (False, True):
        torch.manual_seed(0)
        model = Model(style, local=6).double()
        model.gradient_checkpointing = checkpointing
        if patched:
            patch(model)
        cache, total = new_cache(21), 0.0
        for chunk in range(4):
            with torch.no_grad():
                model(latents(chunk, 0), kv_cache=cache, current_start=3 * chunk * TOKENS)
            total = total + model(latents(chunk, 1), kv_cache=cache, current_start=3 * chunk * TOKENS).square().mean()
            if checkpointing and not patched:  # their checkpoints write again: one chunk at a time
                total.backward()
                total = 0.0
        if torch.is_tensor(total):
            total.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-12, rtol=0)


def test_lora_compile_and_wrappers():
    peft = pytest.importorskip("peft")
    old, _, _ = both("reward_forcing")
    config = peft.LoraConfig(r=2, target_modules=["q", "k", "v", "o"], init_lora_weights=False)
    torch.manual_seed(1)
    adapted = peft.get_peft_model(copy.deepcopy(old), config).eval()
    exact = list(video(adapted.base_model.model, new_cache(), 5))
    undo = patch(nn.ModuleDict({"model": adapted}))
    for run in (adapted, torch.compile(adapted.base_model.model, backend="eager")):
        with torch.no_grad():
            assert difference(exact, video(run, new_cache(), 5)) < 1e-12
    undo()


def test_fully_sharded(tmp_path):
    from torch.distributed import destroy_process_group, fsdp, init_process_group

    old, new, undo = both("reward_forcing", torch.float32)
    undo()
    init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        for block in new.blocks:
            fsdp.fully_shard(block, mesh=mesh)
        fsdp.fully_shard(new, mesh=mesh)
        undo = patch(new)
        with torch.no_grad():
            runs = [video(m, new_cache(dtype=torch.float32), 5, dtype=torch.float32) for m in (old, new)]
            assert difference(*runs) < 1e-5
        undo()
        assert isinstance(new, fsdp.FSDPModule)
    finally:
        destroy_process_group()


def test_options():
    old = Model("reward_forcing").double().requires_grad_(False)
    new = copy.deepcopy(old)
    patch(new, alpha=0.5, sink_positions="absolute", sink_dtype=torch.float64)
    cache = new_cache()
    next(video(new, cache))
    made = cache[0]["rfkernels"].cache
    assert (made.alpha, made.sink_positions, made.sink_dtype) == (0.5, "absolute", torch.float64)
    assert cache[1]["k"].data_ptr() == made.k[1].data_ptr() and int(cache[1]["global_end_index"]) == 3 * TOKENS


def test_what_cannot_be_patched():
    model = Model("longlive").double().requires_grad_(False)
    with pytest.raises(TypeError, match="model must hold a causal Wan model"):
        patch(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="model must be a module"):
        patch("model")
    with pytest.raises(ValueError, match="must hold one causal Wan model, got 2"):
        patch(nn.ModuleList([model, copy.deepcopy(model)]))
    with pytest.raises(ValueError, match="sink_positions must be"):
        patch(model, sink_positions="after")
    with pytest.raises(ValueError, match="sink_dtype must be"):
        patch(model, sink_dtype="bfloat16")
    with pytest.raises(ValueError, match="alpha"):
        patch(model, alpha=1.5)
    assert type(model) is Model
    patch(model)
    with pytest.raises(ValueError, match="patched already"):
        patch(model)


def test_what_a_cache_cannot_represent():
    model = Model("longlive").double().requires_grad_(False)
    patch(model)
    for extra in ("quantized", "pinned_start"):
        cache = new_cache()
        cache[1][extra] = torch.tensor([0])
        with pytest.raises(ValueError, match=f"got also.*{extra}"):
            next(video(model, cache))
    begun = new_cache()
    begun[0]["global_end_index"].fill_(3 * TOKENS)
    with pytest.raises(ValueError, match="kv_cache must be empty"):
        next(video(model, begun))
    cache = new_cache()
    list(video(model, cache, 5))
    for start, message in ((18, "must continue"), (0, "must continue"), (0.5, "whole frames")):
        with pytest.raises(ValueError, match=message):
            model(latents(0, 0), kv_cache=cache, current_start=int(start * TOKENS))
    with pytest.raises(ValueError, match="frames of 3 x 4 tokens as before"):
        model(latents(0, 0)[..., :4], kv_cache=cache, current_start=15 * TOKENS)
    cache[0]["global_end_index"].fill_(7)
    with pytest.raises(ValueError, match="as this model left it"):
        model(latents(0, 0), kv_cache=cache, current_start=15 * TOKENS)
    with pytest.raises(RuntimeError, match="call the model, not the block"):
        x = torch.zeros(1, TOKENS, family.DIM, dtype=torch.float64)
        model.blocks[0].self_attn(x, None, None, model.freqs, None, new_cache()[0])
