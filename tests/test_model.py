"""The transformer: against diffusers' Wan, its forms against each other, compiled, checkpointed, adapted."""

import pytest
import torch
from torch import nn

import rfkernels as rf
from rfkernels.models import CausalWan, CausalWanConfig, ChunkMask, StreamSettings

SMALL = dict(
    dim=48, ffn_dim=64, num_heads=2, num_layers=2, in_channels=4, out_channels=4, patch_size=(1, 2, 2), text_dim=16,
    text_len=6, freq_dim=32,
)  # fmt: skip


def small(device, dtype=torch.float64, **changes):
    """Every weight random, so that nothing is multiplied by zero."""
    options = {name: changes.pop(name) for name in ("checkpointing",) if name in changes}
    model = CausalWan(CausalWanConfig(**SMALL | changes), **options)
    for name, p in model.named_parameters():
        nn.init.normal_(p, 1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.2)
    return model.to(device, dtype)


def inputs(device, dtype=torch.float64, batch=2, frames=7, height=4, width=6, tokens=6):
    shape = (batch, frames, 4, height, width)
    latents, clean, context = (torch.randn(s).to(device, dtype) for s in (shape, shape, (batch, tokens, 16)))
    return latents, clean, context, torch.linspace(300, 900, batch, device=device)


def diffusers_model(model):
    """diffusers' own Wan with the same weights, converted by diffusers' own converter."""
    diffusers = pytest.importorskip("diffusers")
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    c = model.config
    other = diffusers.WanTransformer3DModel(
        patch_size=c.patch_size, num_attention_heads=c.num_heads, attention_head_dim=c.head_dim, ffn_dim=c.ffn_dim,
        in_channels=c.in_channels, out_channels=c.out_channels, text_dim=c.text_dim, freq_dim=c.freq_dim,
        num_layers=c.num_layers, eps=c.eps,
    )  # fmt: skip
    weights = {name: p.clone() for name, p in model.state_dict().items()}
    other.load_state_dict(convert_wan_transformer_to_diffusers(weights))
    return other.to(model.device, model.dtype)


@pytest.mark.parametrize("frames, height, width", [(5, 4, 6), (1, 2, 2), (3, 8, 4)])
def test_equals_diffusers(frames, height, width, device):
    """In float32, which diffusers' norms and rotary tables are fixed to."""
    model = small(device, torch.float32)
    other = diffusers_model(model)
    latents, _, context, times = inputs(device, torch.float32, frames=frames, height=height, width=width)
    with torch.no_grad():
        expected = other(latents.transpose(1, 2), times, context).sample.transpose(1, 2)
        bidirectional = model(latents, times, context)
        cache = model.make_cache(2, height, width, window_frames=frames)
        cache.begin_chunk(frames)
        streamed = model(latents, times, context, cache)
    # Both round at every layer; the activations are of the order of ten.
    for got in (bidirectional, streamed):
        torch.testing.assert_close(got, expected, rtol=2e-4, atol=2e-4 * expected.abs().max().item())


@pytest.mark.parametrize("first", [None, 1])
def test_whole_clips_equal_streaming(first, device, backend):
    """Chunk-causal, and noisy beside clean (teacher forcing), against the stream they stand for: alpha = 1."""
    model, mask = small(device), ChunkMask(2, sink_frames=2, window_frames=4, first_chunk_frames=first)
    latents, clean, context, times = inputs(device, frames=9 if first else 8)
    kv = model.encode_context(context)
    forced = model(latents, times, kv, mask=mask, clean=clean)
    causal = model(clean, times * 0, context, mask=mask)
    cache = model.make_cache(2, 4, 6, sink_frames=2, window_frames=4, alpha=1.0)
    start = 0
    while start < latents.shape[1]:
        frames = first if first and start == 0 else 2
        cache.begin_chunk(frames)
        at = slice(start, start + frames)
        pure = model(latents[:, at], times, context, contexts=[layer.context() for layer in cache])
        with torch.no_grad():
            noisy = model(latents[:, at], times[:, None].expand(2, frames), kv, cache)
            clean_pass = model(clean[:, at], times * 0, kv, cache)
        for got in (noisy, pure):
            torch.testing.assert_close(got, forced[:, at], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(clean_pass, causal[:, at], rtol=1e-10, atol=1e-10)
        start += frames
    assert (forced - causal).abs().max() > 0.1


def test_teacher_forcing_against_the_dense_mask(device):
    """One attention over [clean | noisy] keys under an explicit mask; no sinks, so that one rotation serves."""
    model, mask = small(device, num_layers=1), ChunkMask(2, sink_frames=0, window_frames=4)
    latents, clean, context, times = inputs(device, frames=6)
    got = model(latents, times, context, mask=mask, clean=clean)

    tokens, frames = 6, 6
    frame = torch.arange(frames * tokens, device=device) // tokens
    chunk = frame // 2
    recent = frame[None] >= (chunk[:, None] + 1) * 2 - 4
    own, past = chunk[:, None] == chunk, (chunk[:, None] > chunk) & recent
    visible = torch.cat([torch.cat([own | past, torch.zeros_like(own)], 1), torch.cat([past, own], 1)])
    rope = model.rope(4, 6).tables(device, torch.float64)

    def dense(q, k, v, **_):
        at = torch.arange(2 * frames, device=device)[None] % frames
        q, k = (rf.backends.reference.rotate(x, at, rope) for x in (q, k))
        scores = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
        return torch.einsum("bhij,bjhd->bihd", scores.masked_fill(~visible, -torch.inf).softmax(-1), v)

    model._attends = lambda *_: [dense]
    expected = model(latents, times, context, mask=mask, clean=clean)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


def test_per_frame_timesteps(device):
    """A frame's timestep modulates that frame; equal ones are one for all."""
    model = small(device)
    latents, _, context, times = inputs(device)
    same = model(latents, times[:, None].expand(2, 7), context)
    torch.testing.assert_close(same, model(latents, times, context), rtol=1e-12, atol=1e-12)
    changed = times[:, None].repeat(1, 7)
    changed[:, 3] = 10
    assert not torch.allclose(model(latents, changed, context), same)


@pytest.mark.parametrize("form", ["bidirectional", "causal", "teacher forcing", "contexts"])
def test_gradients_with_and_without_checkpointing(form, device):
    grads = []
    latents, clean, context, times = inputs(device, frames=4)
    for checkpointing in (False, True):
        torch.manual_seed(1)
        model = small(device, checkpointing=checkpointing)
        own, extra = latents, {}
        if form in ("causal", "teacher forcing"):
            extra["mask"] = ChunkMask(2, 1, 2)
        if form == "teacher forcing":
            extra["clean"] = clean
        if form == "contexts":
            cache = model.make_cache(2, 4, 6, sink_frames=1, window_frames=3)
            for _ in range(3):
                cache.begin_chunk(2)
                with torch.no_grad():
                    model(clean[:, :2], times * 0, context, cache)
            cache.begin_chunk(2)
            own, extra["contexts"] = latents[:, :2], [layer.context() for layer in cache]
        x = own.clone().requires_grad_()
        model(x, times, context, **extra).square().sum().backward()
        # Keys of a cross-attention have a bias that the softmax cancels, up to rounding.
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        grads.append([x.grad, *(p.grad for p in model.parameters())])
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)
    assert grads[0][0].abs().sum() > 0


@pytest.mark.parametrize("form", ["streaming", "whole"])
def test_compiles_as_one_graph_without_recompilation(form, device):
    torch._dynamo.reset()
    model = small(device, torch.float32)
    latents, clean, context, times = inputs(device, torch.float32, frames=2)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    kv = model.encode_context(context)
    caches = [model.make_cache(2, 4, 6, sink_frames=1, window_frames=3, alpha=0.9) for _ in range(2)]
    results = []
    for index in range(6):
        if form == "whole":
            extras = [{"mask": ChunkMask(1, 1, 1), "clean": clean}] * 2
        else:
            for cache in caches:
                cache.begin_chunk(2)
            extras = [{"cache": cache} for cache in caches]
        if index == 4:  # the cache is full; from here on nothing may be new
            torch._dynamo.config.error_on_recompile = True
        try:
            with torch.no_grad():
                results.append([m(latents + index, times, kv, **extra)
                                for m, extra in zip((compiled, model), extras, strict=True)])  # fmt: skip
        finally:
            torch._dynamo.config.error_on_recompile = False
    for a, b in results:
        torch.testing.assert_close(a, b)
    assert not torch.equal(results[-1][0], results[-2][0])


def test_fsdp_wraps_everything(device, tmp_path):
    """Sharded weights exist whole within a wrapped forward only: encode_context must pass through it too."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    if device.type != "cpu" or not dist.is_available():
        pytest.skip("one process on the CPU, by gloo")
    model = small(device, torch.float32)
    latents, _, context, times = inputs(device, torch.float32, frames=2)

    def streamed():
        cache = model.make_cache(2, 4, 6, dtype=torch.float32, device=device)
        cache.begin_chunk(2)
        return model(latents, times, model.encode_context(context), cache)

    expected = streamed()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        for module in (*model.blocks, model):
            fully_shard(module, mesh=mesh)
        got = streamed()
        got.square().sum().backward()
        torch.testing.assert_close(got, expected)
        assert all(p.grad is not None for p in model.parameters())
    finally:
        dist.destroy_process_group()


def test_the_published_sizes():
    """1.3B has 1 418 996 800 parameters, counted by hand from the sizes, on the meta device."""
    with torch.device("meta"):
        model = CausalWan("wan2.1-t2v-1.3b")
    d, f, layers = 1536, 8960, 30
    linear = d * d + d
    block = 8 * linear + 4 * d + 2 * d + (d * f + f) + (f * d + d) + 6 * d
    outside = (16 * 4 * d + d) + (4096 * d + d) + linear + (256 * d + d) + linear + (6 * d * d + 6 * d)
    outside += (d * 64 + 64) + 2 * d
    assert sum(p.numel() for p in model.parameters()) == layers * block + outside == 1_418_996_800


def test_half_precision_and_a_cache_of_another_dtype(device):
    exact = small(device)
    latents, _, context, times = inputs(device)
    expected = exact(latents, times, context)
    model = exact.to(torch.bfloat16)
    got = model(latents.float(), times, context)
    assert got.dtype == torch.float32
    assert (got - expected).norm() / expected.norm() < 0.1  # a dozen roundings to 8 bits
    cache = model.make_cache(2, 4, 6, window_frames=7, dtype=torch.float32)
    cache.begin_chunk(7)
    with torch.no_grad():
        assert model(latents.float(), times, context, cache).isfinite().all()


def test_lora_adapters_apply(device):
    peft = pytest.importorskip("peft")
    model = small(device, torch.float32)
    latents, _, context, times = inputs(device, torch.float32)
    before = model(latents, times, context)
    config = peft.LoraConfig(r=2, target_modules=["q", "k", "v", "o", "ffn.0", "ffn.2"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    after = adapted(latents, times, context)
    assert not torch.allclose(before, after)
    after.square().sum().backward()
    trained = {name for name, p in adapted.named_parameters() if p.grad is not None}
    assert len(trained) == 2 * 10 * 2 and all("lora_" in name for name in trained)
    torch.testing.assert_close(adapted.merge_and_unload()(latents, times, context), after, rtol=1e-4, atol=1e-4)


def test_quantised_weights_apply(device):
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = small(device, torch.float32)
    latents, _, context, times = inputs(device, torch.float32)
    with torch.no_grad():
        before = model(latents, times, context)
        quantize_(model, Int8WeightOnlyConfig())
        cache = model.make_cache(2, 4, 6, window_frames=7)
        cache.begin_chunk(7)
        after = model(latents, times, model.encode_context(context), cache)
    assert 0 < (after - before).norm() / before.norm() < 0.1


def wrong(model, **changes):
    latents, _, context, times = inputs(model.device)
    call = dict(latents=latents, timesteps=times, context=context) | changes
    cache = model.make_cache(2, 4, 6, window_frames=8)
    cache.begin_chunk(7)
    if call.pop("with_cache", False):
        call["cache"] = cache
    before = cache.snapshot()
    try:
        model(**call)
    finally:
        after = cache.snapshot()
        assert all(torch.equal(before[n], after[n]) for n in ("k", "v", "num_frames"))


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(latents=torch.zeros(2, 7, 3, 4, 6)), "C=4"),
        (dict(latents=torch.zeros(2, 7, 4, 5, 6)), "divisible"),
        (dict(latents=torch.zeros(2, 6, 4, 4, 6), with_cache=True), "7 open frames"),
        (dict(latents=torch.zeros(2, 7, 4, 4, 8), with_cache=True), "6 tokens"),
        (dict(timesteps=torch.zeros(3)), "timesteps"),
        (dict(context=torch.zeros(2, 6, 9)), "text_dim=16"),
        (dict(context=torch.zeros(1, 6, 16)), "batch=2"),
        (dict(context=[(torch.zeros(2, 6, 2, 24),) * 2]), "2 layers"),
        (dict(contexts=[]), "contexts must have 2 layers"),
        (dict(mask=ChunkMask(), with_cache=True), "at most one"),
        (dict(clean=torch.zeros(2, 7, 4, 4, 6)), "need mask"),
        (dict(clean=torch.zeros(2, 5, 4, 4, 6), mask=ChunkMask()), "clean must have the shape"),
    ],
)
def test_bad_input(changes, message, device):
    moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in changes.items()}
    with pytest.raises(ValueError, match=message):
        wrong(small(device), **moved)


def test_bad_sizes(device):
    with pytest.raises(ValueError, match="preset must be one of"):
        CausalWan("wan3")
    for field, value in dict(num_heads=5, patch_size=(2, 2, 2), freq_dim=3).items():
        with pytest.raises(ValueError, match=field):
            CausalWanConfig(**SMALL | {field: value})
    with pytest.raises(ValueError, match="window_frames"):
        ChunkMask(3, 3, 2)
    with pytest.raises(ValueError, match="first_chunk_frames"):
        ChunkMask(3, 3, 6, 7)
    model = small(device, checkpointing=True)
    latents, _, context, times = inputs(device)
    cache = model.make_cache(2, 4, 6, window_frames=7)
    cache.begin_chunk(7)
    with pytest.raises(ValueError, match="checkpointing needs contexts"):
        model(latents, times, context, cache)


def test_schedule():
    schedule = rf.losses.FlowMatchSchedule(5.0)
    expected = (1000.0, 937.5, 2500 / 3, 625.0)
    assert schedule.timesteps((1000, 750, 500, 250)) == pytest.approx(expected)
    clean, noise = torch.randn(2, 3, 4).double(), torch.randn(2, 3, 4).double()
    for times in (torch.tensor([250.0, 700.0]), torch.rand(2, 3) * 1000 + 1, 300.0):
        noisy = schedule.add_noise(clean, noise, times)
        torch.testing.assert_close(schedule.clean(noisy, noise - clean, times), clean)
        torch.testing.assert_close(schedule.flow(noisy, clean, times), noise - clean)
    for shift in (0, -1, "5"):
        with pytest.raises(ValueError, match="shift"):
            rf.losses.FlowMatchSchedule(shift)
    for steps in ((), (500, 1000), (0,), (1001,)):
        with pytest.raises(ValueError, match="steps"):
            schedule.timesteps(steps)


@pytest.mark.parametrize("teacher_forcing", [False, True])
def test_a_first_chunk_as_long_as_the_window(teacher_forcing, device):
    """Five frames, then three and three: a clip in one pass is a stream."""
    model, mask = small(device), ChunkMask(3, 2, 5, first_chunk_frames=5)
    latents, _, context, _ = inputs(device, frames=11)
    cache = model.make_cache(2, 4, 6, sink_frames=2, window_frames=5, alpha=1.0)
    expected = []
    for chunk in latents.split([5, 3, 3], 1):
        cache.begin_chunk(chunk.shape[1])
        with torch.no_grad():
            expected.append(model(chunk, 0.0, context, cache))
    # Of clean clips that are like the noisy ones, at the same timestep, teacher forcing is that too.
    clean = latents if teacher_forcing else None
    got = model(latents, 0.0, context, mask=mask, clean=clean)
    torch.testing.assert_close(got, torch.cat(expected, 1))


def test_a_timestep_may_be_a_number(device):
    model = small(device)
    latents, clean, context, _ = inputs(device, frames=4)
    for timestep in (500.0, 500, torch.tensor(500.0, device=device)):
        expected = model(latents, torch.full((2, 4), 500.0, device=device), context)
        assert torch.equal(model(latents, timestep, context), expected)
    assert model(latents, 500.0, context, mask=ChunkMask(), clean=clean).shape == latents.shape
    with pytest.raises(TypeError, match=r"timesteps must be a tensor.*or a number for all, got list"):
        model(latents, [500.0, 500.0], context)


@pytest.mark.parametrize("prompt", ["a cat", ["a cat", "a dog"]])
def test_a_prompt_must_be_encoded(prompt, device):
    model = small(device)
    latents, _, _, times = inputs(device)
    for call in (
        lambda: model(latents, times, prompt),
        lambda: model.encode_context(prompt),
        lambda: rf.training.SelfForcingRollout(model)(prompt, 3, 4, 6),
        lambda: rf.training.collect_trajectories(model, latents, prompt),
    ):
        with pytest.raises(TypeError, match=r"context must be text embeddings.*encode_prompts"):
            call()


def test_offloaded_by_accelerate(device):
    """On a CPU that is slower and no smaller, but it is the same code."""
    accelerate = pytest.importorskip("accelerate")
    model = small(device)
    latents, _, context, times = inputs(device)

    def passes():
        cache = model.make_cache(2, 4, 6, window_frames=7)
        cache.begin_chunk(7)
        with torch.no_grad():
            return model(latents, times, model.encode_context(context), cache), model(latents, times, context)

    expected = passes()
    accelerate.cpu_offload(model, device)
    assert model.patch_embedding.weight.is_meta and model.device == device
    for a, b in zip(passes(), expected, strict=True):
        assert torch.equal(a, b)
    empty = small(device).to("meta")
    for call in (lambda: empty(latents, times, context), lambda: empty.encode_context(context)):
        with pytest.raises(ValueError, match=r"must hold its weights.*assign=True"):
            call()
    assert empty(latents.to("meta"), times.to("meta"), context.to("meta")).shape == latents.shape


@pytest.mark.parametrize("clean", [False, True])
def test_a_mask_of_listed_chunks(clean, device):
    """Any partition; equal to a first chunk and the others where it is that."""
    model = small(device)
    video = torch.randn(1, 7, model.config.in_channels, 4, 4, device=device)
    prompt = torch.randn(1, 6, model.config.text_dim, device=device)
    given = {"clean": torch.randn_like(video)} if clean else {}
    masks = (ChunkMask((1, 3, 3), 2, 4), ChunkMask(3, 2, 4, first_chunk_frames=1))
    listed, plain = (model(video, torch.tensor([500.0], device=device), prompt, mask=mask, **given) for mask in masks)
    torch.testing.assert_close(listed, plain)
    assert StreamSettings(chunk_frames=(1, 2, 3), window_frames=4).chunks(12) == [1, 2, 3, 3, 3]
    assert StreamSettings(chunk_frames=(1, 2, 3), window_frames=4).chunks(4, frames_so_far=2) == [1, 3]
    with pytest.raises(ValueError, match="chunk_frames must be one length, or a list"):
        ChunkMask((1, 3), first_chunk_frames=1)
