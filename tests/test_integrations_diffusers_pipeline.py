"""A video from a diffusers pipeline, against the same from its parts with a `CausalWan`."""

import copy
import itertools
import runpy
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from test_integrations_diffusers import lora

from rfkernels.integrations.diffusers import stream
from rfkernels.models import CausalWan, StreamingSampler
from rfkernels.models.checkpoints import config_of
from rfkernels.models.reading import own_names
from rfkernels.models.video import StreamingDecoder, encode_frames, encode_prompts

accelerate = pytest.importorskip("accelerate")  # peft brings it
diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

CPU = torch.device("cpu")
EXAMPLE = Path(__file__).parents[1] / "examples" / "diffusers_stream.py"


@pytest.fixture
def pipe():
    pipe = runpy.run_path(str(EXAMPLE))["tiny_pipeline"]()
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
    model.load_state_dict(own_names(pipe.transformer.state_dict()))
    context = encode_prompts(pipe.tokenizer, pipe.text_encoder, prompts, 8)
    sampler = StreamingSampler(model, (1000, 500), 5.0, height=4, width=6, batch_size=len(prompts), **options)
    chunks = sampler.stream(context, frames, seed=seed, initial=initial, progress=False)
    latents = torch.cat([*([] if initial is None else [initial]), *chunks], 1)
    with torch.no_grad():
        return StreamingDecoder(pipe.vae).decode(latents) / 2 + 0.5


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


def test_wan_22_5b(pipe):
    """48 channels of 16 x 16 pixels, its VAE, and the pipeline that begins with an image."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(
        base_dim=4, decoder_base_dim=4, z_dim=48, dim_mult=[1, 1, 1, 1], num_res_blocks=1, is_residual=True,
        in_channels=12, out_channels=12, patch_size=2, scale_factor_spatial=16, latents_mean=[0.1] * 48,
        latents_std=[0.9] * 48, temperal_downsample=[False, True, True],
    ).eval()  # fmt: skip
    for p in vae.parameters():
        torch.nn.init.normal_(p, std=0.2)
    sizes = dict(num_attention_heads=2, attention_head_dim=12, ffn_dim=32, num_layers=2, text_dim=16, freq_dim=16)
    parts = dict(vae=vae, transformer=diffusers.WanTransformer3DModel(in_channels=48, out_channels=48, **sizes))
    parts = {name: pipe.components[name] for name in ("tokenizer", "text_encoder", "scheduler")} | parts
    image = np.random.default_rng(0).random((1, 64, 96, 3)).astype(np.float32)
    big = diffusers.WanImageToVideoPipeline(**parts, image_processor=None, image_encoder=None, expand_timesteps=True)
    options = dict(num_frames=21, height=64, width=96, initial=image)  # and embeddings: this pipeline's text needs ftfy
    options["prompt_embeds"] = encode_prompts(pipe.tokenizer, pipe.text_encoder, ["a cat walks"], 8)
    got = video(big, None, **options)
    assert got.shape == (1, 21, 3, 64, 96) and got.std() > 0.01
    initial = encode_frames(vae, torch.from_numpy(image)[None].permute(0, 1, 4, 2, 3) * 2 - 1)
    close(got, by_hand(big, initial=initial, frames=5))
    latents = torch.cat(list(stream(big, output_type="latent", **SIZE | options)), 2)
    with torch.no_grad():
        whole = vae.decode(latents * 0.9 + 0.1).sample / 2 + 0.5
    close(got, whole.transpose(1, 2))


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


def test_the_pipeline_is_its_own_between_chunks(pipe):
    """Its own procedure gives what it gave; the stream goes on as without it, in inference mode too."""

    def whole():
        options = dict(height=32, width=48, num_frames=9, num_inference_steps=2, max_sequence_length=8)
        return pipe("a cat", **options, output_type="latent", generator=torch.Generator().manual_seed(0)).frames

    pipe.set_progress_bar_config(disable=True)
    options = dict(num_frames=33, output_type="latent") | SIZE
    expected, alone = list(stream(pipe, "a cat walks", **options)), whole()
    got = []
    for chunk in stream(pipe, "a cat walks", **options):
        got.append(chunk)
        assert torch.equal(whole(), alone)
    with torch.inference_mode():
        inferred = list(stream(pipe, "a cat walks", **options))
    for one, two, three in zip(got, inferred, expected, strict=True):
        assert torch.equal(one, three) and torch.equal(two, three)


def test_snapshots_of_its_sampler(pipe):
    """With guidance, whose cache has twice the streams."""
    one = stream(pipe, "a cat walks", num_frames=None, guidance_scale=2.0, output_type="latent", **SIZE)
    for _ in range(4):
        next(one)
    state = one.sampler.snapshot()
    expected = next(one)
    one.sampler.restore(state)
    assert torch.equal(next(one), expected)


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


@pytest.mark.parametrize("how", ["model", "layers", "leaf_level", "block_level"])
def test_offloading(how, pipe):
    expected = video(pipe, num_frames=21)
    if how == "model":
        pipe.enable_model_cpu_offload(device="cpu")
    elif how == "layers":  # weights on the meta device between calls
        accelerate.cpu_offload(pipe.transformer, CPU)
        assert pipe.transformer.blocks[0].attn1.to_q.weight.is_meta
    else:
        for part in (pipe.transformer, pipe.vae):
            part.enable_group_offload(CPU, CPU, how, num_blocks_per_group=1)
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
    """From a file of diffusers: the numbers of fused weights, in mid-video too; unloaded, those from before."""
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

    results = []
    for fused in (False, True):  # in the middle of a video
        one = stream(pipe, "a cat walks", num_frames=33, output_type="pt", **SIZE)
        close(next(one), plain[:, :9])
        pipe.load_lora_weights(tmp_path)
        if fused:
            pipe.fuse_lora()
        results.append(torch.cat(list(one), 1))
        if fused:
            pipe.unfuse_lora()
        pipe.unload_lora_weights()
    close(*results)
    assert not torch.allclose(results[0][:, :12], plain[:, 9:], atol=1e-2)


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


def test_a_pipeline_that_lacks_ftfy(pipe, monkeypatch):
    def encode(*args, **kwargs):
        raise NameError("name 'ftfy' is not defined", name="ftfy")

    monkeypatch.setattr(pipe, "encode_prompt", encode)
    with pytest.raises(ImportError, match="WanPipeline needs ftfy for prompts: pip install ftfy"):
        stream(pipe, "a cat", **SIZE)


def test_the_shift_is_the_schedulers_unless_given(pipe):
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0)
    made = [stream(pipe, "a cat", **SIZE), stream(pipe, "a cat", shift=5.0, **SIZE)]
    assert [one.sampler.settings.shift for one in made] == [2.0, 5.0]


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [EXAMPLE.name, "--frames", "30"])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(",")[0] for line in lines] == ["9 frames", "21 frames", "30 frames"]
    assert len({line.partition(",")[2] for line in lines}) == 1  # the cache does not grow
    with PIL.Image.open(tmp_path / "video.webp") as written:
        assert written.n_frames == 30 and written.size == (48, 32)
