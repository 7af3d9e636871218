"""Every layout of weights on disk, round and back; and what is refused."""

import argparse
import copy
import json
import re

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


WRAPPED = {
    "compiled": ("_orig_mod.", ""),
    "DDP of compiled": ("module._orig_mod.", ""),
    "FSDP": ("model._fsdp_wrapped_module.", "_fsdp_wrapped_module."),  # as Self-Forcing's trainer writes
    "all": (
        "module.model._orig_mod._fsdp_wrapped_module.",
        "_fsdp_wrapped_module._checkpoint_wrapped_module._orig_mod.",
    ),
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_names_of_wrappers_are_taken_out_wherever_they_are(kind, tmp_path):
    model = small(CPU, torch.float32)
    outside, inside = WRAPPED[kind]
    state = {outside + re.sub(r"^(blocks\.\d+\.)", rf"\1{inside}", k): x for k, x in model.state_dict().items()}
    torch.save({"generator_ema": state}, tmp_path / "model.pt")
    assert same(load_checkpoint(blank(model), tmp_path / "model.pt"), model)
    save_file({k: x.contiguous() for k, x in state.items()}, tmp_path / "model.safetensors")
    assert same(load_checkpoint(blank(model), tmp_path / "model.safetensors"), model)


def wrapped_in_many_ways(model):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    yield torch.compile(copy.deepcopy(model), backend="eager")
    blocks = copy.deepcopy(model)
    blocks.blocks[0] = torch.compile(checkpoint_wrapper(blocks.blocks[0]), backend="eager")
    yield torch.nn.DataParallel(blocks)


def test_wrapped_models_save_and_load_plain_weights(tmp_path):
    model = small(CPU, torch.float32)
    save_checkpoint(model, tmp_path / "plain")
    for index, wrapped in enumerate(wrapped_in_many_ways(model)):
        save_checkpoint(wrapped, tmp_path / str(index))
        assert same(from_pretrained(tmp_path / str(index)), model)
        for p in wrapped.parameters():
            torch.nn.init.zeros_(p)
        assert same(load_checkpoint(wrapped, tmp_path / "plain"), model)


def test_lora_is_merged_when_saved_and_left_when_loaded(tmp_path):
    peft = pytest.importorskip("peft")
    model = small(CPU, torch.float32)
    save_checkpoint(model, tmp_path / "plain")
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["q", "patch_embedding"], init_lora_weights=False)
    adapted = peft.get_peft_model(copy.deepcopy(model), config)
    before = copy.deepcopy(adapted)
    assert same(load_checkpoint(adapted, tmp_path / "plain"), before)
    save_checkpoint(adapted, tmp_path / "merged")
    merged = adapted.merge_and_unload()
    for name, x in from_pretrained(tmp_path / "merged").state_dict().items():
        torch.testing.assert_close(x, merged.state_dict()[name])
    with before.disable_adapter():
        save_checkpoint(before, tmp_path / "off")
    assert same(from_pretrained(tmp_path / "off"), model)


def test_sharded_models_save_and_load_plain_weights(tmp_path):
    import torch.distributed as dist

    model = small(CPU, torch.float32)
    save_checkpoint(model, tmp_path / "plain")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        sharded = rf.training.shard(blank(model), dist.device_mesh.init_device_mesh("cpu", (1,)))
        load_checkpoint(sharded, tmp_path / "plain")
        save_checkpoint(sharded, tmp_path / "saved")
    finally:
        dist.destroy_process_group()
    assert same(from_pretrained(tmp_path / "saved"), model)


def test_offloaded_weights_are_not_saved(tmp_path):
    with pytest.raises(ValueError, match=r"model must hold its weights.*offloading"):
        save_checkpoint(small(CPU).to("meta"), tmp_path)


TI2V = dict(_class_name="WanModel", dim=3072, eps=1e-6, ffn_dim=14336, freq_dim=256, in_dim=48, model_type="ti2v",
            num_heads=24, num_layers=30, out_dim=48, text_len=512)  # fmt: skip
DIFFUSERS = dict(_class_name="WanTransformer3DModel", num_attention_heads=2, attention_head_dim=24, num_layers=2,
                 ffn_dim=64, freq_dim=32, text_dim=16, in_channels=16, out_channels=16, image_dim=None,
                 added_kv_proj_dim=None, pos_embed_seq_len=None, qk_norm="rms_norm_across_heads")  # fmt: skip


def read(folder, **given):
    (folder / "config.json").write_text(json.dumps(given))
    return rf.models.checkpoints.read_config(folder)


def test_text_to_video_configs_are_read(tmp_path):
    assert read(tmp_path, **TI2V) == rf.models.CausalWanConfig.preset("wan2.2-ti2v-5b")
    assert read(tmp_path, **TI2V | dict(has_image_input=False, seperated_timestep=True)).in_channels == 48
    assert read(tmp_path, **DIFFUSERS).head_dim == 24
    assert read(tmp_path, **DIFFUSERS | dict(in_channels=48, out_channels=48)).out_channels == 48


@pytest.mark.parametrize(
    "changes, found",
    [
        (dict(in_channels=36), "36 input channels for 16"),  # diffusers' Wan2.2-I2V: nothing else tells
        (dict(in_dim=36, out_dim=16), "36 input channels for 16"),
        (dict(in_channels=36, out_channels=None), "36 input channels"),
        (dict(model_type="i2v"), "model_type='i2v'"),
        (dict(model_type="flf2v"), "model_type='flf2v'"),
        (dict(model_type="s2v"), "model_type='s2v'"),
        (dict(image_dim=1280), "image_dim=1280"),
        (dict(has_image_input=True), "has_image_input"),
        (dict(pos_embed_seq_len=514), "pos_embed_seq_len"),
        (dict(_class_name="WanVACETransformer3DModel"), "VACE"),
        (dict(vace_layers=[0, 5]), "vace_layers"),
        (dict(qk_norm="layer_norm"), "qk_norm"),
        (dict(window_size=[8, 8]), "window_size"),
    ],
)
def test_other_architectures_are_refused_at_once(changes, found, tmp_path):
    given = DIFFUSERS | changes
    given = {k: v for k, v in given.items() if not (k == "out_channels" and v is None)}
    with pytest.raises(ValueError, match=rf"config\.json must .*{found}"):
        read(tmp_path, **given)


def test_a_model_of_more_input_channels_is_refused():
    with pytest.raises(ValueError, match=r"in_channels must equal out_channels=16.*got 36"):
        rf.models.CausalWanConfig(in_channels=36)


def test_a_pipeline_of_two_transformers_is_not_half_read(tmp_path):
    """Wan2.2-T2V-A14B: one for high and one for low noise."""
    model = small(CPU, torch.float32)
    for name in ("transformer", "transformer_2"):
        save_checkpoint(model, tmp_path / name)
    for call in (lambda: from_pretrained(tmp_path), lambda: load_checkpoint(model, tmp_path)):
        with pytest.raises(ValueError, match=r"holds two.*transformer or .*transformer_2"):
            call()
    assert same(from_pretrained(tmp_path / "transformer_2"), model)


def stored(state, file):
    contiguous = {k: x.contiguous() for k, x in state.items()}
    save_file(contiguous, file) if file.suffix == ".safetensors" else torch.save(contiguous, file)
    return file


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model.", "module.model.diffusion_model."])
def test_names_of_other_programs_before_the_keys(prefix, suffix, tmp_path):
    model = small(CPU, torch.float32)
    file = stored({prefix + k: x for k, x in model.state_dict().items()}, tmp_path / f"model{suffix}")
    assert same(load_checkpoint(blank(model), file), model)


def test_the_pickle_format_before_torch_1_6(tmp_path):
    """It cannot be mapped; it is still read with weights_only."""
    model, file = small(CPU, torch.float32), tmp_path / "old.pth"
    torch.save({"generator": model.state_dict()}, file, _use_new_zipfile_serialization=False)
    assert same(load_checkpoint(blank(model), file), model)
    torch.save({"generator": model.state_dict(), "x": Danger()}, file, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"old\.pth must be .*also holds .*system"):
        load_checkpoint(model, file)


class Danger:
    """Runs a command when it is unpickled by a loader that trusts the file."""

    def __reduce__(self):
        import os

        return os.system, ("exit 1",)


@pytest.mark.parametrize("zipped", [True, False])
def test_arguments_of_a_training_run_beside_the_weights(zipped, tmp_path):
    model, file = small(CPU, torch.float32), tmp_path / "run.pt"
    arguments = argparse.Namespace(lr=1e-4, steps=[1000, 500], name="run")
    held = {"model": model.state_dict(), "args": arguments}
    torch.save(held, file, _use_new_zipfile_serialization=zipped)
    assert same(load_checkpoint(blank(model), file), model)
    arguments.optimizer = Danger()
    torch.save(held, file, _use_new_zipfile_serialization=zipped)
    target = blank(model)
    with pytest.raises(ValueError, match=r"run\.pt must be .*namespaces: it also holds .*system.*save its state dict"):
        load_checkpoint(target, file)
    assert all((p == 7).all() for p in target.parameters())


def test_weights_by_name_of_a_file_that_holds_one_state_dict(tmp_path):
    model = small(CPU, torch.float32)
    files = [stored(model.state_dict(), tmp_path / f"model{suffix}") for suffix in (".pt", ".safetensors")]
    save_checkpoint(model, tmp_path / "folder")
    for path in (*files, tmp_path / "folder"):
        with pytest.raises(ValueError, match=r"weights must be None for .*one state dict.*got 'generator'"):
            load_checkpoint(model, path, weights="generator")
    torch.save({"generator": small(CPU, torch.float32).state_dict(), "generator_ema": model.state_dict()}, files[0])
    loaded = from_pretrained(tmp_path / "folder", checkpoint=files[0], weights="generator_ema")
    assert same(loaded, model)
    assert not same(from_pretrained(tmp_path / "folder", checkpoint=files[0], weights="generator"), model)


def in_fp8(state, scheme):
    """(what a file holds, what its weights mean): the matrices of blocks in fp8, in the layout of a program."""
    file, meant = {}, dict(state)
    for name, x in state.items():
        file[name] = x
        if not (name.startswith("blocks.") and name.endswith(".weight") and x.dim() == 2):
            continue
        base = name.removesuffix(".weight")
        dtype = torch.float8_e5m2 if scheme == "plain" else torch.float8_e4m3fn
        scale = x.abs().amax(1, keepdim=True) / 448 if scheme == "rows" else x.abs().max() / 448
        if scheme == "plain":
            scale = torch.tensor(1.0)
        file[name] = (x / scale).to(dtype)
        meant[name] = file[name].double() * scale.double()
        if scheme == "ComfyUI, older":
            file |= {f"{base}.scale_weight": scale.reshape(1), f"{base}.scale_input": torch.ones(1)}
        elif scheme != "plain":
            file |= {f"{base}.weight_scale": scale.clone(), f"{base}.input_scale": torch.ones(())}
        if scheme == "ComfyUI, newer":
            said = json.dumps({"format": "float8_e4m3fn"}).encode()
            file[f"{base}.comfy_quant"] = torch.tensor(list(said), dtype=torch.uint8)
    if scheme == "ComfyUI, older":
        file["scaled_fp8"] = torch.zeros(2).to(torch.float8_e4m3fn)
    return file, meant


@pytest.mark.parametrize("scheme", ["ComfyUI, older", "ComfyUI, newer", "rows", "plain"])
def test_fp8_is_dequantised(scheme, tmp_path):
    model = small(CPU, torch.float32)
    held, meant = in_fp8(model.state_dict(), scheme)
    file = stored({f"model.diffusion_model.{k}": x for k, x in held.items()}, tmp_path / "fp8.safetensors")
    loaded = load_checkpoint(blank(model).double(), file).state_dict()
    for name, x in meant.items():  # the product is formed in float32
        torch.testing.assert_close(loaded[name], x.double(), rtol=1e-7, atol=0)
    (tmp_path / "config.json").write_text(json.dumps(DIFFUSERS | dict(in_channels=4, out_channels=4)))
    assigned = from_pretrained(tmp_path, checkpoint=file)
    assert {p.dtype for p in assigned.parameters()} == {torch.float32}
    assert all(torch.equal(x, meant[name].float()) for name, x in assigned.state_dict().items())
    half = stored({k: x.bfloat16() if x.dtype == torch.float32 and x.dim() > 1 else x for k, x in held.items()},
                  tmp_path / "half.pt")  # fmt: skip
    assert from_pretrained(tmp_path, checkpoint=half).blocks[0].ffn[0].weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda s: {"blocks.0.ffn.0.weight": s["blocks.0.ffn.0.weight"].to(torch.int8)}, "torch.int8"),
        (lambda s: {"blocks.0.ffn.0.weight_scale_2": torch.ones(())}, "weight_scale_2"),
        (lambda s: {"blocks.1.ffn.0.weight_scale": torch.ones(())}, r"blocks\.1\.ffn\.0\.weight_scale"),
        (lambda s: {"blocks.0.ffn.0.comfy_quant": torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)},
         "says 'nvfp4'"),
        (lambda s: {"blocks.0.ffn.0.weight": s["blocks.0.ffn.0.weight"].to(torch.float8_e4m3fn),
                    "blocks.0.ffn.0.weight_scale": torch.ones(64, 3)}, "one scale for a weight or one for each row"),
    ],
)  # fmt: skip
def test_other_quantisations_are_refused_by_name(change, said, tmp_path):
    model = small(CPU, torch.float32)
    state = model.state_dict()
    file = stored(state | change(state), tmp_path / "model.safetensors")
    target = blank(model)
    with pytest.raises(ValueError, match=rf"model\.safetensors must h.*{said}"):
        load_checkpoint(target, file)
    assert all((p == 7).all() for p in target.parameters())


@pytest.mark.parametrize("kind", ["wan", "diffusers", "checkpoint"])
def test_text_dim_is_read_from_the_weights_where_the_config_lacks_it(kind, tmp_path):
    """Original Wan's config.json has none."""
    model = small(CPU, torch.float32, text_dim=24)
    if kind == "diffusers":
        diffusers_model(model).save_pretrained(tmp_path)
    else:
        save_checkpoint(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["text_dim"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = None
    if kind == "checkpoint":
        checkpoint = stored(model.state_dict(), tmp_path / "model.pt")
        (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    loaded = from_pretrained(tmp_path, checkpoint=checkpoint)
    assert loaded.config.text_dim == 24 and same(loaded, model)
