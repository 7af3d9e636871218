"""Text to a video file, with tiny random versions of the real VAE, text encoder and tokenizer saved to disk."""

from pathlib import Path

import pytest
import torch
from memory import check_constant, memory

from rfkernels.__main__ import main
from rfkernels.models import (
    CausalWan,
    CausalWanConfig,
    StreamingSampler,
    encode_prompts,
    from_pretrained,
    load_lora,
    save_checkpoint,
)
from rfkernels.models.video import StreamingDecoder, encode_frames
from rfkernels.tools.video_files import read_frames

av = pytest.importorskip("av")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

CONFIG = CausalWanConfig(dim=32, ffn_dim=32, num_heads=2, num_layers=1, text_dim=16, text_len=8, freq_dim=16)


def tiny_vae():
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    for p in vae.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return vae.eval()


def tiny_text():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "</s>", "<unk>", "a", "cat", "walks"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    torch.manual_seed(0)
    config = transformers.UMT5Config(vocab_size=8, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return tokenizer, transformers.UMT5EncoderModel(config).eval()


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    torch.manual_seed(0)
    model = CausalWan(CONFIG)
    torch.nn.init.normal_(model.head.head.weight, std=0.2)
    save_checkpoint(model, folder / "transformer")
    tiny_vae().save_pretrained(folder / "vae")
    tokenizer, encoder = tiny_text()
    tokenizer.save_pretrained(folder / "tokenizer")
    encoder.save_pretrained(folder / "text_encoder")
    return folder


def generate(folder, out, *more, frames=10, prompt=("--prompt", "a cat walks")):
    size = ["--height", "32", "--width", "48", "--frames", str(frames), "--device", "cpu", "--steps", "1000", "500"]
    return main(["generate", "--model", str(folder), *prompt, "--out", str(out), *size, *more])


def read(path):
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def test_text_to_file(pipeline, tmp_path, capsys):
    assert generate(pipeline, tmp_path / "x.mp4") == 0
    images = read(tmp_path / "x.mp4")
    assert len(images) == 10 and images[0].shape == (32, 48, 3)
    assert "10 frames" in capsys.readouterr().out

    # The same by hand: the parts, then whole decoding by the VAE itself.
    vae, (tokenizer, encoder) = tiny_vae(), tiny_text()
    model = CausalWan(CONFIG)
    from rfkernels.models import load_checkpoint

    load_checkpoint(model, pipeline)
    sampler = StreamingSampler(model, (1000, 500), height=4, width=6)
    latents = torch.cat(list(sampler.stream(encode_prompts(tokenizer, encoder, ["a cat walks"], 8), 4)), 1)
    mean, std = (torch.tensor(c)[:, None, None, None] for c in (vae.config.latents_mean, vae.config.latents_std))
    with torch.no_grad():
        whole = vae.decode(latents.transpose(1, 2) * std + mean).sample[0]
    expected = ((whole.permute(1, 2, 3, 0) + 1) * 127.5)[:10]
    error = sum((torch.from_numpy(a).float() - b).abs().mean() for a, b in zip(images, expected, strict=True)) / 10
    assert error < 0.25 * expected.std()  # what a lossy codec leaves of noise


@pytest.mark.parametrize("chunks", [[7], [1, 3, 3], [3, 3, 1], [1] * 7])
def test_chunked_decoding_is_whole_decoding(chunks):
    vae = tiny_vae()
    latents = torch.randn(2, 7, 16, 2, 3)
    mean, std = (torch.tensor(c)[:, None, None, None] for c in (vae.config.latents_mean, vae.config.latents_std))
    with torch.no_grad():
        whole = vae.decode(latents.transpose(1, 2) * std + mean).sample.transpose(1, 2)
    decoder = StreamingDecoder(vae)
    for _ in range(2):
        got = torch.cat([decoder.decode(part) for part in latents.split(chunks, 1)], 1)
        assert got.shape == (2, 25, 3, 16, 24)
        torch.testing.assert_close(got, whole, rtol=1e-5, atol=1e-5)
        decoder.reset()
    assert whole.abs().mean() > 0.01


def test_two_decoders_share_a_vae():
    vae = tiny_vae()
    videos = torch.randn(2, 1, 4, 16, 2, 2)
    expected = [StreamingDecoder(vae).decode(video) for video in videos]
    decoders = [StreamingDecoder(vae) for _ in videos]
    got = [[d.decode(v[:, i : i + 1]) for d, v in zip(decoders, videos, strict=True)] for i in range(4)]
    for index in range(2):
        joined = torch.cat([pair[index] for pair in got], 1)
        torch.testing.assert_close(joined, expected[index], rtol=1e-5, atol=1e-5)


def long_decoding(chunks):
    decoder, seen = StreamingDecoder(tiny_vae()), []
    for index in range(chunks):
        decoder.decode(torch.randn(1, 1, 16, 1, 1))
        if index in (20, chunks - 1):
            seen.append(memory())
    return (seen,)


@pytest.mark.parametrize("chunks", [60, pytest.param(200, marks=pytest.mark.slow)])
def test_memory_of_decoding_is_flat(chunks):
    check_constant(long_decoding, chunks)


def test_prompts_are_padded_with_zeros():
    tokenizer, encoder = tiny_text()
    embedded = encode_prompts(tokenizer, encoder, ["a  cat\n walks", "a", "cat " * 20], 8)
    assert embedded.shape == (3, 8, 16)
    assert [int(row.abs().sum(-1).ne(0).sum()) for row in embedded] == [3, 1, 8]
    alone = encode_prompts(tokenizer, encoder, ["a cat walks"], 3)
    torch.testing.assert_close(embedded[:1, :3], alone, rtol=1e-5, atol=1e-5)


def test_a_stopped_command_leaves_a_partial_file(pipeline, tmp_path, capsys, monkeypatch):
    """And what was there under the name before."""
    (tmp_path / "x.mp4").write_text("before")
    decode, calls = StreamingDecoder.decode, []

    def stopped(self, latents):
        calls.append(latents)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return decode(self, latents)

    monkeypatch.setattr(StreamingDecoder, "decode", stopped)
    assert generate(pipeline, tmp_path / "x.mp4", frames=24) == 130
    error = capsys.readouterr().err
    assert "x.partial.mp4 holds the frames made so far" in error and "Traceback" not in error
    assert (tmp_path / "x.mp4").read_text() == "before"
    assert len(read(tmp_path / "x.partial.mp4")) == 9
    monkeypatch.undo()
    assert generate(pipeline, tmp_path / "x.mp4") == 0
    assert [p.name for p in tmp_path.iterdir()] == ["x.mp4"] and len(read(tmp_path / "x.mp4")) == 10


def test_a_vae_that_tiles_or_slices_is_refused():
    """The decoder calls the VAE's parts: it would do neither, and would need the memory that they save."""
    for how in ("tiling", "slicing"):
        vae = tiny_vae()
        decoder = StreamingDecoder(vae)
        getattr(vae, f"enable_{how}")()
        with pytest.raises(ValueError, match=f"vae must have {how} off.*disable_{how}"):
            StreamingDecoder(vae)
        with pytest.raises(ValueError, match=f"vae must have {how} off.*disable_{how}"):
            decoder.decode(torch.randn(1, 1, 16, 2, 2))
        getattr(vae, f"disable_{how}")()
        assert decoder.decode(torch.randn(1, 1, 16, 2, 2)).shape == (1, 1, 3, 16, 16)


def test_a_vae_may_be_moved_offloaded_and_cast():
    accelerate = pytest.importorskip("accelerate")
    vae, latents = tiny_vae(), torch.randn(1, 2, 16, 2, 2)
    expected = StreamingDecoder(tiny_vae().double()).decode(latents.double())
    decoder = StreamingDecoder(vae)
    vae.double()
    torch.testing.assert_close(decoder.decode(latents), expected)
    vae = tiny_vae().double()
    seen = []
    accelerate.cpu_offload_with_hook(vae, "cpu")
    vae._hf_hook.pre_forward, own = lambda *a, **k: seen.append(1) or own(*a, **k), vae._hf_hook.pre_forward
    torch.testing.assert_close(StreamingDecoder(vae).decode(latents), expected)
    assert seen  # it is brought to its device, as its own decode does
    with pytest.raises(ValueError, match="vae must hold its weights"):
        StreamingDecoder(tiny_vae().to("meta"))


def test_prompts_must_be_a_list():
    tokenizer, encoder = tiny_text()
    with pytest.raises(TypeError, match=r"prompts must be a list of texts, got one text.*\[prompt\]"):
        encode_prompts(tokenizer, encoder, "a cat walks", 8)
    expected = encode_prompts(tokenizer, encoder, ["a cat", "a"], 8)
    tokenizer.padding_side = "left"
    assert torch.equal(encode_prompts(tokenizer, encoder, ["a cat", "a"], 8), expected)


def test_what_is_missing_is_said(pipeline, tmp_path, capsys, monkeypatch):
    def fails(message, *arguments, folder=pipeline, out=tmp_path / "x.mp4", **more):
        assert generate(folder, out, *arguments, **more) == 2
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error
        return error

    (tmp_path / "empty").mkdir()
    error = fails("it lacks", folder=tmp_path / "empty")
    assert all(part in error for part in ("transformer", "--vae", "--text-encoder", "--tokenizer"))
    fails("multiples of 16 and 16", "--height", "40")
    fails("at least 1", frames=0)
    fails("--weights must be", "--weights", str(tmp_path / "none.pt"))
    fails("existing folder", out=tmp_path / "no" / "x.mp4")
    fails("--out must be a file that can be written", out=Path("/proc/x.mp4"))
    fails("got the folder", out=tmp_path)
    fails("--device must be one that is here", "--device", "cuda:99")
    fails("--device must be one that is here", "--device", "gpu")
    fails("window_frames must be at least 3", "--window-frames", "2")
    other = CausalWan(CausalWanConfig(**{**CONFIG.__dict__, "dim": 64}))
    torch.save({"generator_ema": other.state_dict()}, tmp_path / "other.pt")
    fails("of another shape", "--weights", str(tmp_path / "other.pt"))
    with monkeypatch.context() as patch:  # found before any weights are read
        patch.setattr(diffusers.AutoencoderKLWan, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
        for name in ("x.nonsense", "x.gif", "x"):
            fails("video format", out=tmp_path / name)
            assert not (tmp_path / name).exists()
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    fails('pip install "rfkernels[video]"')


def by_hand(pipeline, switch=None, initial=None, frames=24, prepare=lambda model: model, **options):
    """Frames 0..255 of the parts, called one by one; ``switch``: (chunks before it, prompt)."""
    (tokenizer, encoder), vae = tiny_text(), tiny_vae()
    model = prepare(from_pretrained(pipeline / "transformer"))
    sampler = StreamingSampler(model, (1000, 500), height=4, width=6, **options)
    decoder, first = StreamingDecoder(vae), 0 if initial is None else initial.shape[1]
    parts = [] if initial is None else [decoder.decode(initial)[0]]
    stream = sampler.stream(encode_prompts(tokenizer, encoder, ["a cat walks"], 8),
                            1 + -(-(frames - 1) // 4) - first, initial=initial)  # fmt: skip
    for index, chunk in enumerate(stream):
        parts.append(decoder.decode(chunk)[0])
        if switch is not None and index + 1 == switch[0]:
            sampler.switch(encode_prompts(tokenizer, encoder, [switch[1]], 8))
    return ((torch.cat(parts)[:frames] + 1) * 127.5).permute(0, 2, 3, 1).clamp(0, 255)


@pytest.fixture
def written(monkeypatch):
    """The frames that the command writes (to a file, or to the last one), before a lossy codec."""
    from rfkernels.tools import generate as command

    seen, write = {}, command.write_video

    def recorded(path, chunks, *more):
        chunks_of = seen["last"] = seen[path] = []
        write(path, (chunks_of.append(chunk) or chunk for chunk in chunks), *more)

    monkeypatch.setattr(command, "write_video", recorded)
    return lambda n, path="last": ((torch.cat(seen[path])[:n] + 1) * 127.5).permute(0, 2, 3, 1).clamp(0, 255)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=0.02)  # of 255


def test_how_the_sinks_are_placed_and_averaged(pipeline, tmp_path, written, monkeypatch):
    made, make = [], CausalWan.make_cache
    monkeypatch.setattr(CausalWan, "make_cache", lambda *a, **k: made.append(make(*a, **k)) or made[-1])
    options = ["--sink-positions", "absolute", "--alpha", "1", "--first-chunk-frames", "1", "--context-noise", "50"]
    assert generate(pipeline, tmp_path / "x.mp4", *options, frames=45) == 0
    assert made[0].sink_positions == "absolute" and made[0].sink_dtype == torch.float32
    expected = by_hand(
        pipeline, frames=45, sink_positions="absolute", alpha=1.0, first_chunk_frames=1, context_noise=50
    )
    close(written(45), expected)
    half = ["--dtype", "bfloat16", "--sink-dtype"]
    assert generate(pipeline, tmp_path / "x.mp4", *half, "published", frames=1) == 0
    assert made[-1].sink_dtype == torch.bfloat16
    assert generate(pipeline, tmp_path / "x.mp4", *half, "float32", frames=1) == 0
    assert made[-1].sink_dtype == torch.float32


def test_prompts_are_switched_at_frames_of_the_video(pipeline, tmp_path, written):
    """Chunks of three latent frames begin at 0, 9, 21, 33 of the video."""
    for frame in (10, 21):
        assert generate(pipeline, tmp_path / "x.mp4", "--switch", f"{frame}: walks", frames=34) == 0
        close(written(34), by_hand(pipeline, (2, "walks"), frames=34))
    plain = by_hand(pipeline, frames=34)
    assert (written(34) - plain)[:21].abs().max() < 0.02 < (written(34) - plain)[21:].abs().max()
    # Of two that are due at once the later one holds.
    assert generate(pipeline, tmp_path / "x.mp4", "--switch", "2: cat", "--switch", "9:walks", frames=34) == 0
    close(written(34), by_hand(pipeline, (1, "walks"), frames=34))


def test_several_prompts_and_samples(pipeline, tmp_path, capsys, written):
    """The video of each prompt and seed is the one that a command of its own makes, bit for bit."""
    (tmp_path / "prompts.txt").write_text("a cat walks\n\n  cat cat \n")
    file = ("--prompts", str(tmp_path / "prompts.txt"))
    assert generate(pipeline, tmp_path / "x.mp4", "--samples", "2", "--seed", "5", prompt=file) == 0
    made = [tmp_path / f"x-{i}.mp4" for i in range(4)]
    assert sorted(tmp_path.glob("*.mp4")) == made
    said = capsys.readouterr().out
    assert all(f"{path}: 10 frames at 16 frames/s" in said for path in made)
    videos = []
    for text in ("a cat walks", "cat cat"):
        for seed in ("5", "6"):
            assert generate(pipeline, tmp_path / "one.mp4", "--seed", seed, prompt=("--prompt", text)) == 0
            videos.append(written(10))
    for path, frames in zip(made, videos, strict=True):
        assert len(read(path)) == 10 and torch.equal(written(10, path), frames)
    assert (videos[0][9] != videos[1][9]).any() and (videos[0][9] != videos[2][9]).any()


def picture(path, n=1, height=40, width=48):
    """A gradient that moves, as a file; returns frames 0..255."""
    import numpy as np

    rows, columns = np.mgrid[:height, :width]
    frames = [np.stack([(rows * 5 + 9 * i) % 256, columns * 5 % 256, rows * 0 + 90], -1) for i in range(n)]
    frames = [frame.astype("uint8") for frame in frames]
    still = path.suffix == ".png"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("png" if still else "ffv1", rate=1)
        stream.width, stream.height, stream.pix_fmt = width, height, "rgb24" if still else "bgr0"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return torch.stack([torch.from_numpy(frame) for frame in frames])


@pytest.mark.parametrize("name, n, used", [("x.png", 1, 1), ("x.mkv", 7, 5)])
def test_a_video_begins_with_an_image_or_a_video(name, n, used, pipeline, tmp_path, written):
    """As many of its frames as are whole latent frames, cut in the middle to the size asked for."""
    pixels = picture(tmp_path / name, n)[:used, 4:36]  # 40 rows, of which 32 are kept
    assert generate(pipeline, tmp_path / "out.mp4", "--initial", str(tmp_path / name), frames=24) == 0
    frames = (pixels.float() / 127.5 - 1).permute(0, 3, 1, 2)[None]
    vae = tiny_vae()
    with torch.no_grad():
        latents = vae.encode(frames.transpose(1, 2)).latent_dist.mean
    mean, std = (torch.tensor(c)[:, None, None, None] for c in (vae.config.latents_mean, vae.config.latents_std))
    initial = ((latents - mean) / std).transpose(1, 2)
    assert initial.shape == (1, 1 + used // 4, 16, 4, 6)
    torch.testing.assert_close(encode_frames(vae, frames), initial)
    close(written(24), by_hand(pipeline, initial=initial))
    assert len(read(tmp_path / "out.mp4")) == 24


def test_frames_are_scaled_to_cover_the_size(tmp_path):
    picture(tmp_path / "x.png", height=80, width=120)
    (one,) = read_frames(tmp_path / "x.png", 40, 48, 5)
    (whole,) = read_frames(tmp_path / "x.png", 80, 120, 5)
    assert one.shape == (3, 40, 48) and one.abs().max() <= 1
    expected = torch.nn.functional.interpolate(whole[None], (40, 60), mode="bicubic", antialias=True)[0, ..., 6:54]
    torch.testing.assert_close(one, expected.clamp(-1, 1))
    (tmp_path / "x.txt").write_text("no picture")
    with pytest.raises(ValueError, match=r"x\.txt must be an image or a video"):
        read_frames(tmp_path / "x.txt", 40, 48, 5)
    with pytest.raises(ValueError, match=r"frames must be 1 \+ 4 \* n of them, got 4"):
        encode_frames(tiny_vae(), torch.zeros(1, 4, 3, 16, 16))


def test_weights_by_name_and_loras(pipeline, tmp_path, written):
    pytest.importorskip("peft")
    model = from_pretrained(pipeline / "transformer")
    other = {k: torch.zeros_like(x) for k, x in model.state_dict().items()}
    torch.save({"generator": model.state_dict(), "generator_ema": other}, tmp_path / "both.pt")
    more = []
    for index, layer in enumerate(("self_attn.q", "ffn.0")):
        name = f"base_model.model.blocks.0.{layer}"
        state = {f"{name}.lora_A.weight": torch.randn(2, 32), f"{name}.lora_B.weight": torch.randn(32, 2)}
        torch.save({"generator_lora": state}, tmp_path / f"{index}.pt")
        more += ["--lora", str(tmp_path / f"{index}.pt")]
    chosen = ["--weights", str(tmp_path / "both.pt"), "--weights-name", "generator"]
    assert generate(pipeline, tmp_path / "x.mp4", *chosen, *more, "--lora-alpha", "3") == 0

    def adapted(model):
        for index in range(2):
            load_lora(model, tmp_path / f"{index}.pt", alpha=3, adapter=str(index))
        return model

    expected = by_hand(pipeline, frames=10, prepare=adapted)
    close(written(10), expected)
    assert (expected - by_hand(pipeline, frames=10)).abs().max() > 1


def test_compiled_and_by_a_named_backend(pipeline, tmp_path, written, monkeypatch, capsys):
    from rfkernels.backends import reference

    compiled, calls, compile = [], [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda m: compiled.append(m) or compile(m, backend="eager"))
    own = reference.streaming_attention
    monkeypatch.setattr(reference, "streaming_attention", lambda request: calls.append(1) or own(request))
    assert generate(pipeline, tmp_path / "x.mp4", "--compile", "--backend", "reference") == 0
    assert [type(m) for m in compiled] == [CausalWan] and len(calls) == 2 * (2 + 1)  # chunks, passes, one layer
    close(written(10), by_hand(pipeline, frames=10))
    said = capsys.readouterr().out
    assert "10 frames at 16 frames/s, made at" in said and float(said.split()[-2]) > 0


def test_options_that_cannot_be_are_said(pipeline, tmp_path, capsys):
    def fails(message, *arguments, **more):
        assert generate(pipeline, tmp_path / "x.mp4", *arguments, **more) == 2
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error, error
        assert not list(tmp_path.glob("x*"))

    fails("backend must be", "--backend", "fast")
    fails("--cuda-graph needs a CUDA device, got --device cpu", "--cuda-graph", "--device", "cpu")
    fails("--lora must be a file or folder", "--lora", "none.pt")
    fails("--initial must be a file", "--initial", "none.png")
    fails("rising frames from 1 to --frames - 1 = 9", "--switch", "8: a", "--switch", "4: cat")
    fails("rising frames from 1 to --frames - 1 = 9", "--switch", "10: a")
    fails("at most 9, where the last chunk begins, got 12", "--switch", "12: a", frames=20)
    fails("weights must be None", "--weights-name", "generator")
    fails("--samples must be at least 1, got 0", "--samples", "0")
    fails("No such file", prompt=("--prompts", str(tmp_path / "none.txt")))
    (tmp_path / "empty.txt").write_text(" \n")
    fails("--prompts must hold a prompt in each line", prompt=("--prompts", str(tmp_path / "empty.txt")))
    fails("--switch goes with --prompt", "--switch", "4: cat", prompt=("--prompts", str(tmp_path / "empty.txt")))
    picture(tmp_path / "long.mkv", 12)
    fails("--frames must be more than the frames of --initial", "--initial", str(tmp_path / "long.mkv"))
    for given in ("rain", "x: rain", "-3: rain", "4:"):
        with pytest.raises(SystemExit):
            generate(pipeline, tmp_path / "x.mp4", f"--switch={given}")
        assert 'must be "FRAME: PROMPT"' in capsys.readouterr().err
