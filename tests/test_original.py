"""An original Wan folder: its text encoder and VAE in transformers' and diffusers' classes, and a video from it."""

import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from test_generate import generate, pipeline, tiny_text, tiny_vae, written  # noqa: F401

from rfkernels.models import original

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")


def encoder_weights(layers=2, width=16, heads=2, hidden=24, vocabulary=8, buckets=32):
    shapes = {"token_embedding.weight": (vocabulary, width), "norm.weight": (width,)}
    for i in range(layers):
        block = {f"attn.{x}.weight": (width, width) for x in "qkvo"} | {f"norm{n}.weight": (width,) for n in (1, 2)}
        block |= {"pos_embedding.embedding.weight": (buckets, heads), "ffn.gate.0.weight": (hidden, width),
                  "ffn.fc1.weight": (hidden, width), "ffn.fc2.weight": (width, hidden)}  # fmt: skip
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    return {name: torch.randn(shape) * 0.5 for name, shape in shapes.items()}


def encoded(weights, ids, mask):
    """Wan's text encoder written out: T5 without a scale, with relative positions in every block and gated GELU."""

    def norm(x, w):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * w

    x, n = weights["token_embedding.weight"][ids], ids.shape[1]
    heads = weights["blocks.0.pos_embedding.embedding.weight"].shape[1]
    distance = torch.arange(n)[None] - torch.arange(n)[:, None]  # key - query
    far = 8 + (torch.log(distance.abs().clamp(min=1) / 8) / math.log(128 / 8) * 8).long()
    bucket = torch.where(distance.abs() < 8, distance.abs(), far.clamp(max=15)) + 16 * (distance > 0)
    for i in range(1 + max(int(k.split(".")[1]) for k in weights if k.startswith("blocks."))):
        w = {k.removeprefix(f"blocks.{i}."): v for k, v in weights.items() if k.startswith(f"blocks.{i}.")}
        y = norm(x, w["norm1.weight"])
        q, k, v = (F.linear(y, w[f"attn.{p}.weight"]).unflatten(-1, (heads, -1)).transpose(1, 2) for p in "qkv")
        scores = q @ k.transpose(-1, -2) + w["pos_embedding.embedding.weight"][bucket].permute(2, 0, 1)
        scores = scores.masked_fill(~mask[:, None, None].bool(), -1e9)
        x = x + F.linear((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), w["attn.o.weight"])
        y = norm(x, w["norm2.weight"])
        gate = F.gelu(F.linear(y, w["ffn.gate.0.weight"]), approximate="tanh")
        x = x + F.linear(gate * F.linear(y, w["ffn.fc1.weight"]), w["ffn.fc2.weight"])
    return norm(x, weights["norm.weight"])


def test_text_encoder(tmp_path):
    file, weights = tmp_path / original.TEXT_ENCODER, encoder_weights()
    torch.save(weights, file)
    ids, mask = torch.randint(0, 8, (2, 40)), torch.ones(2, 40, dtype=torch.long)
    mask[1, 30:] = 0
    encoder = original.text_encoder(file, torch.float64)
    with torch.no_grad():
        got = encoder(ids, attention_mask=mask).last_hidden_state
    expected = encoded({k: x.double() for k, x in weights.items()}, ids, mask)
    # transformers forms its softmax in float32.
    torch.testing.assert_close(got * mask[..., None], expected * mask[..., None], rtol=1e-4, atol=1e-4)
    half = original.text_encoder(file, torch.float16)
    assert {p.dtype for n, p in half.named_parameters() if ".wo." in n} == {torch.float32}
    assert half.shared.weight.dtype == torch.float16
    for state, said in (
        ({"x": torch.ones(1)}, "must be an original Wan text encoder, a state dict with token_embedding"),
        ({k: x for k, x in weights.items() if "pos_embedding" not in k}, "it lacks .*relative_attention_bias"),
        (weights | {"blocks.0.extra.weight": torch.ones(1)}, "does not fit UMT5EncoderModel"),
    ):
        torch.save(state, file)
        with pytest.raises(ValueError, match=said):
            original.text_encoder(file, torch.float32)


def wan_name(name):
    """Wan's name of a weight of diffusers' AutoencoderKLWan with its default blocks."""
    side, _, rest = name.partition(".")
    if side in ("quant_conv", "post_quant_conv"):
        return {"quant_conv": "conv1", "post_quant_conv": "conv2"}[side] + "." + rest
    where, *more = rest.split(".")
    if where in ("conv_in", "norm_out", "conv_out"):
        return f"{side}.{ {'conv_in': 'conv1', 'norm_out': 'head.0', 'conv_out': 'head.2'}[where] }.{more[-1]}"
    if where == "mid_block":
        kind, index, *parts = more
        place = f"{side}.middle.{2 * int(index) if kind == 'resnets' else 1}"
    elif where == "down_blocks":
        index, *parts = more
        place, kind = f"{side}.downsamples.{index}", "resnets"
    else:
        level, kind, index, *parts = more
        place = f"{side}.upsamples.{4 * int(level) + (3 if kind == 'upsamplers' else int(index))}"
    inner = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6",
             "conv_shortcut": "shortcut"}  # fmt: skip
    if kind == "resnets":
        parts[0] = inner.get(parts[0], parts[0])
    return ".".join([place, *parts])


def original_vae(file, base_dim=4):
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(base_dim=base_dim).eval()
    for p in vae.parameters():
        torch.nn.init.normal_(p, std=0.3)
    torch.save({wan_name(name): x for name, x in vae.state_dict().items()}, file)
    return vae


def test_vae(tmp_path):
    file = tmp_path / original.VAE
    expected = original_vae(file)
    names = torch.load(file).keys()
    assert {"conv2.bias", "encoder.downsamples.3.shortcut.weight", "decoder.upsamples.4.residual.2.weight",
            "decoder.middle.1.to_qkv.weight", "decoder.upsamples.7.time_conv.bias", "decoder.head.0.gamma",
            "decoder.upsamples.14.residual.6.bias", "encoder.downsamples.5.resample.1.weight"} <= names  # fmt: skip
    got = original.vae(file)
    frames, latents = torch.rand(1, 3, 5, 16, 16) * 2 - 1, torch.randn(1, 16, 2, 2, 2)
    with torch.no_grad():
        assert torch.equal(got.encode(frames).latent_dist.mean, expected.encode(frames).latent_dist.mean)
        assert torch.equal(got.decode(latents).sample, expected.decode(latents).sample)
    state = torch.load(file)
    for changes, said in (
        ({"encoder.conv1.weight": torch.zeros(8, 12, 3, 3, 3)}, "must be Wan 2.1's VAE, got another"),
        ({"more": torch.ones(1)}, "does not fit AutoencoderKLWan"),
    ):
        torch.save(state | changes, file)
        with pytest.raises(ValueError, match=said):
            original.vae(file)


def test_a_video_from_an_original_folder(pipeline, tmp_path, written, capsys):  # noqa: F811
    """config.json and weights at the top, the two .pth files, google/umt5-xxl: the same frames as from their twins in
    diffusers' and transformers' layouts."""
    for file in (pipeline / "transformer").iterdir():
        shutil.copy(file, tmp_path)
    torch.save(encoder_weights(), tmp_path / original.TEXT_ENCODER)
    shutil.copytree(pipeline / "tokenizer", tmp_path / original.TOKENIZER)
    assert generate(tmp_path, tmp_path / "x.mp4") == 2
    assert "it lacks vae" in capsys.readouterr().err
    original_vae(tmp_path / original.VAE).save_pretrained(tmp_path / "twins" / "vae")
    original.text_encoder(tmp_path / original.TEXT_ENCODER, torch.float32).save_pretrained(tmp_path / "twins" / "text")
    assert generate(tmp_path, tmp_path / "x.mp4") == 0
    got = written(10)
    assert got.std() > 1
    twins = ["--vae", str(tmp_path / "twins" / "vae"), "--text-encoder", str(tmp_path / "twins" / "text")]
    assert generate(pipeline, tmp_path / "x.mp4", *twins) == 0
    assert torch.equal(written(10), got)
