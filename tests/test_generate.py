"""Text to a video file, with tiny random versions of the real VAE, text encoder and tokenizer saved to disk."""

from pathlib import Path

import pytest
import torch
from memory import check_constant, memory

from rfkernels.__main__ import main
from rfkernels.models import CausalWan, CausalWanConfig, StreamingSampler, save_checkpoint
from rfkernels.models.video import StreamingDecoder, encode_prompts

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


def generate(folder, out, *more, frames=10):
    size = ["--height", "32", "--width", "48", "--frames", str(frames), "--device", "cpu", "--steps", "1000", "500"]
    return main(["generate", "--model", str(folder), "--prompt", "a cat walks", "--out", str(out), *size, *more])


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


def long_decoding():
    decoder, seen = StreamingDecoder(tiny_vae()), []
    for index in range(200):
        decoder.decode(torch.randn(1, 1, 16, 1, 1))
        if index in (20, 199):
            seen.append(memory())
    return (seen,)


def test_memory_of_decoding_is_flat_over_200_chunks():
    check_constant(long_decoding)


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
