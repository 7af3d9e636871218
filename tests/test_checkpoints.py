"""Every layout of weights on disk, round and back; and what is refused."""

import json

import pytest
import torch
from safetensors.torch import save_file
from test_model import diffusers_model, small

import rfkernels as rf
from rfkernels.models import CausalWan, from_pretrained, load_checkpoint, save_checkpoint

CPU = torch.device("cpu")


def blank(model):
    other = CausalWan(model.config).to(model.dtype)
    for p in other.parameters():
        torch.nn.init.constant_(p, 7.0)
    return other


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_original_wan_folder(tmp_path):
    model = small(CPU, torch.float32)
    save_checkpoint(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["in_dim"] == 4 and config["_class_name"] == "WanModel"
    assert same(load_checkpoint(blank(model), tmp_path), model)
    loaded = from_pretrained(tmp_path)
    assert same(loaded, model) and loaded.config == model.config
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]


@pytest.mark.parametrize("held", ["generator", "generator_ema", "both", "bare"])
def test_pickled_by_a_trainer(held, tmp_path):
    model, other = small(CPU, torch.float32), small(CPU, torch.float32)
    state, wrong = ({f"model.{k}": v for k, v in m.state_dict().items()} for m in (model, other))
    file = tmp_path / "model.pt"
    torch.save(
        {"generator": {"generator": state}, "generator_ema": {"generator_ema": state}, "bare": state,
         "both": {"generator": wrong, "generator_ema": state, "step": 600}}[held],
        file,
    )  # fmt: skip
    assert same(load_checkpoint(blank(model), file), model)
    if held == "both":
        assert same(load_checkpoint(blank(model), file, weights="generator"), other)
        with pytest.raises(ValueError, match="weights must be one of"):
            load_checkpoint(model, file, weights="critic")


@pytest.mark.parametrize("shard_size, pipeline", [("10GB", False), ("20KB", True)])
def test_diffusers_folder(shard_size, pipeline, tmp_path):
    """Written by diffusers, sharded; the folder of a whole pipeline will do."""
    model = small(CPU, torch.float32)
    folder = tmp_path / "transformer" if pipeline else tmp_path
    diffusers_model(model).save_pretrained(folder, max_shard_size=shard_size)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == pipeline
    assert same(load_checkpoint(blank(model), tmp_path), model)
    loaded = from_pretrained(tmp_path)
    assert same(loaded, model) and loaded.config.dim == 48
    if pipeline:
        next(folder.glob("*-00002-of-*")).unlink()
        with pytest.raises(FileNotFoundError, match=r"lacks the shards.*00002"):
            load_checkpoint(model, tmp_path)


def test_what_does_not_fit_is_listed_and_nothing_is_loaded(tmp_path):
    model = small(CPU, torch.float32)
    state = model.state_dict()
    state["blocks.0.ffn.0.weight"] = torch.zeros(3, 48)
    del state["head.head.bias"]
    state["img_emb.proj.0.weight"] = torch.zeros(2)
    file = tmp_path / "weights.safetensors"
    save_file({k: v.contiguous() for k, v in state.items()}, file)
    target = blank(model)
    with pytest.raises(ValueError) as error:
        load_checkpoint(target, file)
    for text in ("1 missing: head.head.bias", "1 unexpected: img_emb.proj.0.weight",
                 "1 of another shape: blocks.0.ffn.0.weight: (3, 48) in the file, (64, 48)"):  # fmt: skip
        assert text in str(error.value)
    assert all((p == 7).all() for p in target.parameters())


def test_other_architectures_and_missing_files(tmp_path):
    model = small(CPU, torch.float32)
    save_checkpoint(model, tmp_path)
    with pytest.raises(ValueError, match=r"missing: blocks.2") as error:
        load_checkpoint(small(CPU, torch.float32, num_layers=3, dim=64), tmp_path)
    assert "more" in str(error.value)
    with pytest.raises(FileNotFoundError):
        load_checkpoint(model, tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        (tmp_path / "empty").mkdir()
        from_pretrained(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match=r"one .safetensors"):
        load_checkpoint(model, tmp_path / "empty")
    torch.save({"optimizer": {"state": 1}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="must hold a state dict"):
        load_checkpoint(model, tmp_path / "other.pt")
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "WanModel", "model_type": "i2v", "dim": 48}))
    with pytest.raises(ValueError, match="text-to-video"):
        rf.models.checkpoints.read_config(tmp_path)
    with torch.device("meta"):
        empty = CausalWan(model.config)
    with pytest.raises(ValueError, match="assign must be True"):
        load_checkpoint(empty, tmp_path)


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_loading_maps_the_file_instead_of_copying_it(kind, tmp_path):
    """With assign the parameters are views of the mapped file: no anonymous memory of the size of the weights."""
    model = small(CPU, torch.float32, ffn_dim=40000)
    nbytes = sum(p.numel() * 4 for p in model.parameters())
    if kind == "pt":
        file = tmp_path / "model.pt"
        torch.save({"generator_ema": model.state_dict()}, file)
    else:
        save_checkpoint(model, tmp_path)
        file = tmp_path
    with torch.device("meta"):
        target = CausalWan(model.config)

    def anonymous():
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

    before = anonymous()
    load_checkpoint(target, file, assign=True)
    assert same(target, model)
    assert anonymous() - before < 0.5 * nbytes
