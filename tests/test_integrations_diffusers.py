"""diffusers' own Wan transformer on our cache, against `CausalWan` with the same weights."""

import copy

import budget
import patched
import pytest
import torch
from test_model import diffusers_model, small
from torch._dynamo.testing import CompileCounter

from rfkernels.integrations.diffusers import DiffusersWan, patch
from rfkernels.models import CausalWan, load_checkpoint, load_lora

diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

CPU = torch.device("cpu")
CACHE = dict(sink_frames=2, window_frames=4, alpha=0.9)
TIMES = (1000.0, 937.5, 625.0, 0.0)  # the passes over a chunk; the last one leaves it clean


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


def test_quantised():
    """In int8 by torchao, as `CausalWan` with the same weights and quantisation."""
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = small(CPU, torch.float32)
    theirs = diffusers_model(model)
    plain = outputs(theirs)
    for m in (model, theirs):
        quantize_(m, Int8WeightOnlyConfig())
    with patched.sinusoids(their_sinusoids):
        torch.testing.assert_close(outputs(theirs), outputs(model), rtol=1e-4, atol=1e-4)
    assert (outputs(theirs) - plain).abs().max() > 1e-3


def lora(rank=2):
    return peft.LoraConfig(r=rank, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0", "ffn.net.2"])


def test_adapter_of_peft_and_its_scale():
    """The numbers of merged weights, of a model that was there before; ``attention_kwargs`` scales it."""
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


def test_an_attention_backend_may_be_set():
    """Of the other attentions: ours has its own."""
    theirs = diffusers_model(small(CPU, torch.float32))
    expected, cache = outputs(theirs), DiffusersWan(theirs).make_cache(2, 4, 6)
    undo = patch(theirs, cache)
    theirs.set_attention_backend("native")
    undo()
    assert torch.equal(outputs(theirs), expected)


def test_compiled_where_patched():
    theirs = diffusers_model(small(CPU, torch.float32))
    model, context, counter = DiffusersWan(theirs), text(), CompileCounter()
    caches = [model.make_cache(2, 4, 6, **CACHE) for _ in range(2)]
    chunks = [latents() for _ in range(5)]
    torch._dynamo.reset()
    compiled, results = torch.compile(theirs, backend=counter, fullgraph=True), []
    for cache, call in zip(caches, (theirs, compiled), strict=True):
        undo = patch(compiled, cache)
        for x in chunks:
            cache.begin_chunk(2)
            with torch.no_grad():
                results.append(call(x.transpose(1, 2), torch.tensor([700.0, 30.0]), context).sample)
        undo()
    torch.testing.assert_close(results[:5], results[5:], rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1, counter.frame_count


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


def test_load_lora_takes_their_transformer(tmp_path):
    """LongLive's file, in Wan's own names; then diffusers' own methods know of it."""
    model = small(CPU, torch.float32)
    theirs = diffusers_model(model)
    plain = outputs(theirs)
    names = [f"blocks.{i}.{layer}" for i in range(2) for layer in ("self_attn.q", "cross_attn.o", "ffn.2")]
    sizes = {name: dict(model.named_parameters())[f"{name}.weight"].shape for name in names}
    state = {f"base_model.model.{n}.lora_A.weight": torch.randn(2, shape[1]) for n, shape in sizes.items()}
    state |= {f"base_model.model.{n}.lora_B.weight": torch.randn(shape[0], 2) * 0.1 for n, shape in sizes.items()}
    torch.save({"generator_lora": state}, tmp_path / "lora.pt")
    assert load_lora(theirs, tmp_path / "lora.pt", alpha=4) is theirs
    with patched.sinusoids(their_sinusoids):
        expected = outputs(load_lora(model, tmp_path / "lora.pt", alpha=4))
    got = outputs(theirs)
    assert (got - plain).abs().max() > 0.1
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    theirs.disable_adapters()
    assert torch.equal(outputs(theirs), plain)
    theirs.enable_adapters()
    theirs.fuse_lora()
    torch.testing.assert_close(outputs(theirs), got, rtol=1e-4, atol=1e-4)
