"""diffusers' own Wan on our cache against `CausalWan` with the same weights; a pipeline's video against its parts."""

import copy
import importlib.util
import itertools
import subprocess
import sys
from pathlib import Path

import budget
import numpy as np
import patched
import pytest
import torch
from test_model import diffusers_model, small
from torch._dynamo.testing import CompileCounter

import rfkernels as rf
from rfkernels.integrations.diffusers import DiffusersWan, patch, stream
from rfkernels.models import CausalWan, StreamingSampler, load_checkpoint
from rfkernels.models.checkpoints import config_of
from rfkernels.models.video import StreamingDecoder, encode_frames, encode_prompts

accelerate = pytest.importorskip("accelerate")  # peft brings it
diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

CPU = torch.device("cpu")
CACHE = dict(sink_frames=2, window_frames=4, alpha=0.9)
TIMES = (1000.0, 937.5, 625.0, 0.0)  # the passes over a chunk; the last one leaves it clean
EXAMPLE = Path(__file__).parents[1] / "examples" / "diffusers_stream.py"


def latents(dtype=torch.float32, batch=2, frames=2, channels=4):
    return torch.randn(batch, frames, channels, 4, 6).to(dtype)


def text(dtype=torch.float32, batch=2):
    return torch.randn(batch, 6, 16).to(dtype)


def run(models, caches, inputs, context, chunks=5):
    """The outputs of every pass over every chunk, by model."""
    results = [[] for _ in models]
    with torch.no_grad():
        for chunk in range(chunks):
            for cache in caches:
                cache.begin_chunk(2)
            for index, time in enumerate(TIMES):
                x = inputs[chunk * len(TIMES) + index]
                for result, model, cache in zip(results, models, caches, strict=True):
                    dtype = model.dtype
                    result.append(model(x.to(dtype), torch.tensor([time, 0.5 * time]), context.to(dtype), cache))
    return [torch.stack(result) for result in results]


def outputs(model, chunks=5, **options):
    """Of one model (a `DiffusersWan`, or a transformer in one), with the same inputs every time."""
    torch.manual_seed(5)
    context, inputs = text(), [latents() for _ in range(chunks * len(TIMES))]
    model = model if isinstance(model, CausalWan | DiffusersWan) else DiffusersWan(model)
    return run([model], [model.make_cache(2, 4, 6, **CACHE | options)], inputs, context, chunks)[0]


def their_sinusoids(times, size):
    """diffusers' embedding of timesteps, whose angles, of up to 1000, are formed in float32: off by 2e-5."""
    embedding = diffusers.models.embeddings.Timesteps(size, flip_sin_to_cos=True, downscale_freq_shift=0)
    return embedding(times.flatten()).unflatten(0, times.shape)


def compared(theirs, ours):
    """``theirs`` is as near to ``ours`` in float64 as ours is in its own dtype, in every pass, past the window too.

    With the same embedding of timesteps: what else there is should be rounding.
    """
    exact = copy.deepcopy(ours).double()
    inputs, context = [latents(ours.dtype) for _ in range(5 * len(TIMES))], text(ours.dtype)
    models = [DiffusersWan(theirs), ours, exact]
    caches = [model.make_cache(2, 4, 6, **CACHE) for model in models]
    with patched.sinusoids(their_sinusoids):
        got, own, exact = run(models, caches, inputs, context)
    assert caches[0].ages == [10, 10] and got.dtype == ours.dtype
    for index, time in enumerate(TIMES * 5):
        budget.check(got[index], exact[index], own[index], f"pass {index} at {time}")
    for name in ("k", "v", "sink_k", "sink_v"):
        budget.check(*(getattr(caches[i], name) for i in (0, 2, 1)), name)


# --- the transformer --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equals_causal_wan(dtype):
    model = small(CPU).to(dtype)
    compared(diffusers_model(model), model)


def test_equals_causal_wan_with_parts_kept_in_float32(tmp_path):
    """As diffusers loads a model in bfloat16: norms, modulations and the embedding of time stay in float32."""
    model = small(CPU).to(torch.bfloat16)
    diffusers_model(model).save_pretrained(tmp_path)
    theirs = diffusers.WanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert theirs.scale_shift_table.dtype == torch.float32 and theirs.dtype == torch.bfloat16
    compared(theirs, model)


def test_another_rule_gives_other_numbers():
    """What the comparisons would notice."""
    theirs = diffusers_model(small(CPU, torch.float32))
    expected = outputs(theirs)
    assert torch.equal(outputs(theirs), expected)
    for options in ({"alpha": 0.5}, {"sink_positions": "absolute"}, {"window_frames": 2}):
        assert (outputs(theirs, **options) - expected)[-4:].abs().max() > 1e-3


def test_timesteps_of_frames_and_of_tokens():
    """One for each frame, in both models; and the form in which pipelines of Wan 2.2 5B give them, with 48 channels."""
    model = small(CPU, torch.float32, in_channels=48, out_channels=48)
    theirs, times = diffusers_model(model), torch.tensor([[0.0, 900.0], [300.0, 500.0]])
    x, context = latents(channels=48), text()
    models = [DiffusersWan(theirs), model]
    caches = [m.make_cache(2, 4, 6) for m in models]
    for cache in caches:
        cache.begin_chunk(2)
    with torch.no_grad(), patched.sinusoids(their_sinusoids):
        got, expected = (m(x, times, context, c) for m, c in zip(models, caches, strict=True))
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        undo = patch(theirs, caches[0])
        by_token = theirs(x.transpose(1, 2), times.repeat_interleave(6, 1), context).sample.transpose(1, 2)
        assert torch.equal(by_token, got)
        one = theirs(x.transpose(1, 2), times[:, 0], context).sample
        each = theirs(x.transpose(1, 2), times[:, :1].expand(2, 12), context).sample
        torch.testing.assert_close(one, each, rtol=1e-5, atol=1e-5)
        undo()


def test_patch_streams_in_a_loop_of_ones_own_and_undo_restores():
    model = small(CPU, torch.float32)
    theirs, context = diffusers_model(model), text()
    clip = latents().transpose(1, 2), torch.tensor([500.0, 20.0]), context
    before = theirs(*clip).sample
    processors, hooks = [block.attn1.processor for block in theirs.blocks], len(theirs._forward_pre_hooks)
    caches = [DiffusersWan(theirs).make_cache(2, 4, 6, **CACHE) for _ in range(2)]
    for _ in range(5):
        x, time = latents(), torch.tensor([800.0, 0.0])
        for cache in caches:
            cache.begin_chunk(2)
        undo = patch(theirs, caches[0])
        with torch.no_grad():
            got = theirs(hidden_states=x.transpose(1, 2), timestep=time, encoder_hidden_states=context).sample
        undo()
        with torch.no_grad():
            assert torch.equal(got.transpose(1, 2), DiffusersWan(theirs)(x, time, context, caches[1]))
    assert torch.equal(caches[0].k, caches[1].k)
    assert all(block.attn1.processor is own for block, own in zip(theirs.blocks, processors, strict=True))
    assert len(theirs._forward_pre_hooks) == hooks and not theirs._forward_pre_hooks_with_kwargs
    assert torch.equal(theirs(*clip).sample, before)
    with pytest.raises(RuntimeError, match="undone already"):
        undo()


def test_patching_twice_and_undoing_what_has_been_replaced():
    theirs = diffusers_model(small(CPU, torch.float32))
    adapter = DiffusersWan(theirs)
    cache = adapter.make_cache(2, 4, 6)
    cache.begin_chunk(2)
    undo = patch(theirs, cache)
    with pytest.raises(ValueError, match="patched already"):
        patch(theirs, cache)
    with pytest.raises(ValueError, match="patched already"):
        adapter(latents(), 0.0, text(), cache)
    ours = theirs.blocks[1].attn1.processor
    theirs.blocks[1].attn1.set_processor(type(theirs.blocks[1].attn2.processor)())
    with pytest.raises(RuntimeError, match="replaced"):
        undo()
    theirs.blocks[1].attn1.set_processor(ours)
    undo()
    adapter(latents(), 0.0, text(), cache)


def test_a_pass_that_fails_leaves_the_transformer_as_it_was():
    theirs = diffusers_model(small(CPU, torch.float32))
    adapter, own = DiffusersWan(theirs), theirs.blocks[0].attn1.processor
    cache = adapter.make_cache(2, 4, 6)
    cache.begin_chunk(2)
    theirs.blocks[1].ffn.forward = lambda _: 1 / 0
    with pytest.raises(ZeroDivisionError):
        adapter(latents(), 0.0, text(), cache)
    assert theirs.blocks[0].attn1.processor is own


def test_guidance_is_two_streams_of_one_cache():
    theirs = diffusers_model(small(CPU, torch.float32))
    negative, context = text(batch=1), text()
    alone, guided = DiffusersWan(theirs), DiffusersWan(theirs, guidance_scale=3.0, negative=negative)
    caches = [alone.make_cache(2, 4, 6, **CACHE) for _ in range(2)] + [guided.make_cache(2, 4, 6, **CACHE)]
    assert caches[2].batch_size == 4
    both = guided.encode_context(context)
    for _ in range(4):
        x, time = latents(), torch.tensor([900.0, 300.0])
        for cache in caches:
            cache.begin_chunk(2)
        with torch.no_grad():
            positive = alone(x, time, context, caches[0])
            other = alone(x, time, negative.expand(2, -1, -1), caches[1])
            expected = other + 3.0 * (positive - other)
            torch.testing.assert_close(guided(x, time, both, caches[2]), expected, rtol=1e-4, atol=1e-4)


def test_gradients():
    """Of a LoRA, or an input, through a pass past the window."""
    model = small(CPU, torch.float32)
    models, context, grads = [DiffusersWan(diffusers_model(model)), model], text(), []
    chunks = [latents() for _ in range(4)]
    for m in models:
        cache = m.make_cache(2, 4, 6, **CACHE)
        for chunk in chunks:
            x = chunk.clone().requires_grad_()
            cache.begin_chunk(2)
            m(x, 400.0, context, cache).square().sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


# --- what diffusers does to a model -----------------------------------------------------------------------------------


def test_fused_projections():
    theirs = diffusers_model(small(CPU, torch.float32))
    expected = outputs(theirs)
    theirs.fuse_qkv_projections()
    assert theirs.blocks[0].attn1.fused_projections
    torch.testing.assert_close(outputs(theirs), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
def test_group_offloading(offload_type):
    theirs = diffusers_model(small(CPU, torch.float32))
    expected = outputs(theirs)
    theirs.enable_group_offload(
        CPU, CPU, offload_type, **{"num_blocks_per_group": 1} if "block" in offload_type else {}
    )
    adapter = DiffusersWan(theirs)
    assert adapter.device == CPU
    assert torch.equal(outputs(adapter), expected)


def test_layerwise_casting():
    """Weights rounded to fp8 between passes: the numbers of a model that has the rounded ones."""
    model = small(CPU).to(torch.bfloat16)
    theirs = diffusers_model(model)
    theirs.enable_layerwise_casting(torch.float8_e4m3fn, torch.bfloat16)
    assert theirs.blocks[0].attn1.to_q.weight.dtype == torch.float8_e4m3fn
    assert DiffusersWan(theirs).dtype == torch.bfloat16
    rounded = diffusers_model(model)
    for own, cast in zip(rounded.parameters(), theirs.parameters(), strict=True):
        own.data = cast.data.to(torch.bfloat16)
    got = outputs(theirs)
    assert torch.equal(got, outputs(rounded)) and not torch.equal(got, outputs(diffusers_model(model)))
    assert theirs.blocks[0].attn1.to_q.weight.dtype == torch.float8_e4m3fn


def lora(rank=2):
    return peft.LoraConfig(r=rank, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0", "ffn.net.2"])


def test_adapter_of_peft_and_its_scale():
    """The numbers of merged weights; ``attention_kwargs`` scales it; it may come and go while a video runs."""
    theirs = diffusers_model(small(CPU, torch.float32))
    plain = outputs(theirs)
    merged = copy.deepcopy(theirs)
    adapter = DiffusersWan(theirs)
    theirs.add_adapter(lora())
    for name, p in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    other = dict(merged.named_modules())
    for name, module in theirs.named_modules():
        if hasattr(module, "base_layer"):
            other[name].weight.data += module.get_delta_weight("default")
    expected = outputs(merged)
    assert (expected - plain).abs().max() > 1e-2
    torch.testing.assert_close(outputs(adapter), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outputs(DiffusersWan(theirs, attention_kwargs={"scale": 0.0})), plain)
    theirs.disable_adapters()
    assert torch.equal(outputs(adapter), plain)


@pytest.mark.parametrize("how", ["whole", "blocks"])
def test_compiled_without_a_break_or_another_compilation(how):
    theirs = diffusers_model(small(CPU, torch.float32))
    expected = outputs(theirs)
    counter = CompileCounter()
    torch._dynamo.reset()
    if how == "whole":
        adapter = DiffusersWan(torch.compile(theirs, backend=counter, fullgraph=True))
    else:
        theirs.compile_repeated_blocks(backend=counter, fullgraph=True)
        adapter = DiffusersWan(theirs)
    torch.testing.assert_close(outputs(adapter, chunks=2), expected[:8], rtol=1e-5, atol=1e-5)
    first = counter.frame_count
    torch.testing.assert_close(outputs(adapter), expected, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == first <= 2, (first, counter.frame_count)


def test_load_checkpoint_takes_their_transformer(tmp_path):
    """Files of few-step models have Wan's own names."""
    model = small(CPU, torch.float32)
    theirs = diffusers_model(small(CPU, torch.float32))
    torch.save({"generator_ema": {f"model.{k}": x for k, x in model.state_dict().items()}}, tmp_path / "model.pt")
    assert load_checkpoint(theirs, tmp_path / "model.pt") is theirs
    expected = diffusers_model(model).state_dict()
    assert all(torch.equal(x, expected[name]) for name, x in theirs.state_dict().items())
    torch.save({"head.head.weight": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="missing"):
        load_checkpoint(theirs, tmp_path / "other.pt")


# --- what is refused --------------------------------------------------------------------------------------------------

TINY = dict(num_attention_heads=2, attention_head_dim=12, ffn_dim=8, num_layers=1, text_dim=16, freq_dim=8)


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(image_dim=8, added_kv_proj_dim=24), "image_dim=8, added_kv_proj_dim=24"),
        (dict(in_channels=36), "36 input channels for 16 output channels"),
        (dict(patch_size=(2, 2, 2)), "patch_size must be"),
    ],
)
def test_other_transformers_are_refused(changes, said):
    theirs = diffusers.WanTransformer3DModel(**TINY | changes)
    for call in (DiffusersWan, lambda model: patch(model, None)):
        with pytest.raises(ValueError, match=said):
            call(theirs)


@pytest.mark.parametrize("given", [None, torch.nn.Linear(2, 2), "path"])
def test_what_is_no_transformer_is_refused(given):
    with pytest.raises(TypeError, match="transformer must be diffusers' WanTransformer3DModel"):
        DiffusersWan(given)


@pytest.fixture(scope="module")
def their_tiny():
    return diffusers.WanTransformer3DModel(**TINY)


def other_cache(**changes):
    options = dict(
        num_layers=1, batch_size=1, num_kv_heads=2, head_dim=12, frame_tokens=6, sink_frames=1, window_frames=2,
        rope=rf.Rope3D(12, 2, 3), dtype=torch.float32,
    )  # fmt: skip
    return rf.EMASinkCache(**options | changes)


@pytest.mark.parametrize(
    "cache, said",
    [
        (lambda: other_cache(num_layers=2), "1 layers of 2 heads of size 12, got 2, 2 and 12"),
        (lambda: other_cache(num_kv_heads=1), "got 1, 1 and 12"),
        (lambda: other_cache(rope=None), "cache must have a Rope3D"),
        (lambda: other_cache(rope=rf.Rope3D(12)), "cache must have a Rope3D"),
    ],
)
def test_other_caches_are_refused(cache, said, their_tiny):
    own = their_tiny.blocks[0].attn1.processor
    with pytest.raises(ValueError, match=said):
        patch(their_tiny, cache())
    with pytest.raises(TypeError, match="must be an EMASinkCache"):
        patch(their_tiny, [])
    assert their_tiny.blocks[0].attn1.processor is own and not their_tiny._forward_pre_hooks


@pytest.mark.parametrize(
    "shape, said",
    [
        ((1, 16, 1, 4, 6), "got 1 of 1 of 2 x 3"),
        ((1, 16, 2, 6, 4), "got 1 of 2 of 3 x 2"),
        ((2, 16, 2, 4, 6), "got 2 of 2 of 2 x 3"),
        ((1, 16, 2, 4, 5), "divisible"),
    ],
)
def test_latents_that_are_not_the_open_chunk(shape, said, their_tiny):
    cache = other_cache()
    undo = patch(their_tiny, cache)
    try:
        with pytest.raises(ValueError, match="no chunk is open"):
            their_tiny(torch.randn(1, 16, 2, 4, 6), torch.tensor([0.0]), torch.randn(1, 6, 16))
        cache.begin_chunk(2)
        with pytest.raises(ValueError, match=said):
            their_tiny(torch.randn(shape), torch.zeros(shape[0]), torch.randn(shape[0], 6, 16))
        assert not cache._written
    finally:
        undo()
    with pytest.raises(ValueError, match=said):
        batch, channels, frames, height, width = shape
        latents = torch.randn(batch, frames, channels, height, width)
        DiffusersWan(their_tiny)(latents, 0.0, torch.randn(1, 6, 16), cache)


def test_passes_that_would_leave_out_or_repeat_something():
    theirs = diffusers.WanTransformer3DModel(**TINY | dict(num_layers=2))
    adapter, args = DiffusersWan(theirs), (torch.randn(1, 2, 16, 4, 6), 0.0, torch.randn(1, 6, 16))
    cache = other_cache(num_layers=2)
    cache.begin_chunk(2)
    theirs.enable_gradient_checkpointing()
    with torch.no_grad():
        adapter(*args, cache)
    with pytest.raises(ValueError, match="gradient checkpointing"):
        adapter(*args, cache)
    theirs.disable_gradient_checkpointing()
    theirs.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.2))
    with pytest.raises(ValueError, match="disable_cache"):
        adapter(*args, cache)
    theirs.disable_cache()
    theirs._parallel_config = object()
    with pytest.raises(ValueError, match="split over devices"):
        adapter(*args, cache)


@pytest.mark.parametrize(
    "options, said",
    [
        (dict(guidance_scale=2.0), "go together, got 2.0 and no negative"),
        (dict(negative=torch.zeros(1, 6, 16)), "go together, got 1.0 and negative"),
        (dict(guidance_scale=0.5), "guidance_scale must be in"),
        (dict(guidance_scale=2.0, negative=torch.zeros(1, 6, 15)), "negative must"),
    ],
)
def test_guidance_that_cannot_be(options, said, their_tiny):
    with pytest.raises(ValueError, match=said):
        DiffusersWan(their_tiny, **options)


# --- a pipeline's video -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("diffusers_stream", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def pipe(example):
    pipe = example.tiny_pipeline()
    for p in pipe.vae.parameters():  # its first values would leave hardly anything of the latents
        torch.nn.init.normal_(p, std=0.3)
    return pipe


SIZE = dict(height=32, width=48, max_sequence_length=8, steps=(1000, 500), progress=False)


def video(pipe, prompt="a cat walks", **options):
    chunks = list(stream(pipe, prompt, output_type="pt", **SIZE | options))
    return torch.cat(chunks, 1)


def by_hand(pipe, prompts=("a cat walks",), frames=7, seed=0, initial=None, **options):
    """The same from the parts, with a `CausalWan` of the same weights; whole decoding by the VAE itself."""
    model = CausalWan(config_of(pipe.transformer.config, "config"))
    load_checkpoint_of(pipe.transformer, model)
    context = encode_prompts(pipe.tokenizer, pipe.text_encoder, prompts, 8)
    sampler = StreamingSampler(model, (1000, 500), 5.0, height=4, width=6, batch_size=len(prompts), **options)
    chunks = sampler.stream(context, frames, seed=seed, initial=initial, progress=False)
    latents = torch.cat([*([] if initial is None else [initial]), *chunks], 1)
    with torch.no_grad():
        return StreamingDecoder(pipe.vae).decode(latents) / 2 + 0.5


def load_checkpoint_of(transformer, model):
    from rfkernels.models.reading import own_names

    model.load_state_dict(own_names(transformer.state_dict()))


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


def test_a_video_is_that_of_its_parts(pipe):
    """Of a number of frames that no chunk ends with; the scheduler's shift is 5."""
    got = video(pipe, num_frames=23, seed=3)
    assert got.shape == (1, 23, 3, 32, 48) and got.min() >= 0 and got.max() <= 1 and got.std() > 0.05
    close(got, by_hand(pipe, seed=3)[:, :23])
    assert not torch.allclose(got, video(pipe, num_frames=23, seed=4))


def test_prompts_of_a_batch_and_settings_of_the_stream(pipe):
    options = dict(chunk_frames=2, first_chunk_frames=1, sink_frames=1, window_frames=3, alpha=0.5,
                   sink_positions="absolute")  # fmt: skip
    prompts = ["a cat walks", "a dog sleeps"]
    chunks = list(stream(pipe, prompts, num_frames=17, output_type="pt", **SIZE | options))
    assert [chunk.shape[1] for chunk in chunks] == [1, 8, 8]
    close(torch.cat(chunks, 1), by_hand(pipe, prompts, 5, **options))


@pytest.mark.parametrize("kind", ["np", "pt", "pil", "latent"])
def test_output_types(kind, pipe):
    stream_ = stream(pipe, "a cat walks", num_frames=9, output_type=kind, **SIZE)
    (chunk,) = list(stream_)
    if kind == "latent":
        assert chunk.shape == (1, 16, 3, 4, 6)
    elif kind == "pil":
        assert len(chunk[0]) == 9 and chunk[0][0].size == (48, 32)
    else:
        assert chunk.shape == {"np": (1, 9, 32, 48, 3), "pt": (1, 9, 3, 32, 48)}[kind]
        assert isinstance(chunk, np.ndarray if kind == "np" else torch.Tensor)


def test_without_end_and_another_prompt(pipe):
    one, two = (stream(pipe, "a cat walks", num_frames=None, output_type="latent", **SIZE) for _ in range(2))
    with pytest.raises(ValueError, match="after the first chunk"):
        one.switch("a dog sleeps")
    for _ in range(4):
        assert torch.equal(next(one), next(two))
    one.switch("a dog sleeps")
    with pytest.raises(ValueError, match="either prompt or prompt_embeds"):
        two.switch()
    two.switch(prompt_embeds=encode_prompts(pipe.tokenizer, pipe.text_encoder, ["a dog sleeps"], 8))
    assert one.sampler.frames == 12 and one.sampler.cache.ages == [12]
    got = next(one)
    torch.testing.assert_close(got, next(two))
    plain = list(itertools.islice(stream(pipe, "a cat walks", num_frames=None, output_type="latent", **SIZE), 5))
    assert not torch.allclose(got, plain[-1])
    one.close()
    with pytest.raises(StopIteration):
        next(one)


@pytest.mark.parametrize("kind", ["image", "video"])
def test_what_a_video_begins_with(kind, pipe):
    frames = np.random.default_rng(0).random((7, 32, 48, 3)).astype(np.float32)
    given = frames if kind == "video" else pipe.video_processor.numpy_to_pil(frames[:1])[0]
    got = video(pipe, num_frames=17, initial=given)
    pixels = torch.from_numpy(frames if kind == "video" else np.asarray(given)[None] / np.float32(255))
    initial = encode_frames(pipe.vae, pixels[None, : 5 if kind == "video" else 1].permute(0, 1, 4, 2, 3) * 2 - 1)
    close(got, by_hand(pipe, initial=initial, frames=5 - initial.shape[1]))
    with pytest.raises(ValueError, match="num_frames must be more than"):
        video(pipe, num_frames=1, initial=given)


def test_guidance(pipe):
    """Scale 1 has none; above, the negative prompt matters, and the pipeline's own default is the empty one."""
    plain = video(pipe, num_frames=21)
    assert torch.equal(video(pipe, num_frames=21, guidance_scale=1.0), plain)
    guided = video(pipe, num_frames=21, guidance_scale=4.0)
    assert torch.equal(video(pipe, num_frames=21, guidance_scale=4.0, negative_prompt=""), guided)
    others = [plain, video(pipe, num_frames=21, guidance_scale=4.0, negative_prompt="a dog")]
    assert not any(torch.allclose(guided, other) for other in others)
    same = video(pipe, num_frames=21, guidance_scale=4.0, negative_prompt="a cat walks")
    close(same, plain)  # positive and negative cancel


@pytest.mark.parametrize("how", ["model", "layers", "group"])
def test_offloading(how, pipe):
    expected = video(pipe, num_frames=21)
    if how == "model":
        pipe.enable_model_cpu_offload(device="cpu")
    elif how == "layers":  # weights on the meta device between calls
        accelerate.cpu_offload(pipe.transformer, CPU)
        assert pipe.transformer.blocks[0].attn1.to_q.weight.is_meta
    else:
        for part in (pipe.transformer, pipe.vae):
            part.enable_group_offload(CPU, CPU, "leaf_level")
        diffusers.hooks.apply_group_offloading(pipe.text_encoder, CPU, CPU, "leaf_level")
    for _ in range(2):
        assert torch.equal(video(pipe, num_frames=21), expected)


def test_layers_stored_in_half(pipe):
    expected = video(pipe, num_frames=21)
    pipe.transformer.enable_layerwise_casting(torch.bfloat16, torch.float32)
    got = video(pipe, num_frames=21)
    assert not torch.equal(got, expected)
    torch.testing.assert_close(got, expected, rtol=0, atol=0.1)


def test_a_lora_of_the_pipeline(pipe, tmp_path):
    """Loaded from a file as diffusers writes it: the numbers of fused weights; unloaded, those from before."""
    plain = video(pipe, num_frames=21)
    pipe.transformer.add_adapter(lora())
    state = peft.get_peft_model_state_dict(pipe.transformer)
    state = {name: torch.randn_like(x) * 0.2 for name, x in state.items()}
    pipe.transformer.delete_adapters("default")
    pipe.save_lora_weights(tmp_path, state)
    pipe.load_lora_weights(tmp_path)
    got = video(pipe, num_frames=21)
    assert not torch.allclose(got, plain)
    pipe.fuse_lora()
    close(video(pipe, num_frames=21), got)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    close(video(pipe, num_frames=21), plain)


def test_offloaded_models_are_freed_at_the_end_and_when_closed(pipe, monkeypatch):
    freed = []
    monkeypatch.setattr(type(pipe), "maybe_free_model_hooks", lambda self: freed.append(1))
    video(pipe, num_frames=9)
    assert freed == [1]
    one = stream(pipe, "a cat walks", num_frames=None, **SIZE)
    next(one)
    assert freed == [1]
    one.close()
    one.close()
    assert freed == [1, 1]


@pytest.mark.parametrize(
    "options, said",
    [
        (dict(height=40), "height must be a multiple of 16, got 40"),
        (dict(num_frames=0), "num_frames must be"),
        (dict(output_type="gif"), "output_type must be one of"),
        (dict(prompt=None), "either prompt or prompt_embeds"),
        (dict(prompt_embeds=torch.zeros(1, 8, 16)), "either prompt or prompt_embeds"),
        (dict(negative_prompt="a dog"), "needs guidance_scale above 1"),
        (dict(guidance_scale=0.0), "guidance_scale must be in"),
        (dict(seed=-1), "seed must be"),
        (dict(window_frames=2), "window_frames"),
        (dict(initial=np.zeros((2, 1, 32, 48, 3), np.float32)), "initial must be one video"),
    ],
)
def test_bad_arguments(options, said, pipe):
    with pytest.raises(ValueError, match=said):
        stream(pipe, **dict(prompt="a cat") | SIZE | options)


def test_pipelines_that_do_not_stream(pipe):
    def refused(said, **changes):
        other = type(pipe)(**pipe.components | changes)
        with pytest.raises(ValueError, match=said):
            stream(other, "a cat", **SIZE)

    refused("got two, for high and for low noise", transformer_2=copy.deepcopy(pipe.transformer))
    refused("without transformer", transformer=None)
    refused("must have a text_encoder", text_encoder=None)
    refused("must be one of flow matching", scheduler=diffusers.UniPCMultistepScheduler())
    refused("use_dynamic_shifting", scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))
    refused("16 channels, got 4", vae=diffusers.AutoencoderKLWan(base_dim=4, z_dim=4, num_res_blocks=1))
    pipe.vae.enable_tiling()
    refused("tiling off")


def test_the_shift_is_the_schedulers_unless_given(pipe):
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0)
    made = [stream(pipe, "a cat", **SIZE), stream(pipe, "a cat", shift=5.0, **SIZE)]
    assert [one.sampler.settings.shift for one in made] == [2.0, 5.0]


def test_the_example_runs(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(EXAMPLE.parents[1])!r}); import runpy, torch; torch.set_num_threads(1)"
    command = f"{code}; sys.argv = ['x', '--frames', '30', '--out', '']; runpy.run_path({str(EXAMPLE)!r}, "
    done = subprocess.run(
        [sys.executable, "-c", command + "run_name='__main__')"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["9", "21", "30"]
