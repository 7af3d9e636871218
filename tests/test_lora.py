"""LoRA files of every layout, against weights merged by hand; and what is refused."""

import json

import pytest
import torch
from safetensors.torch import save_file
from test_checkpoints import blank
from test_model import inputs, small

from rfkernels.models import from_pretrained, load_checkpoint, load_lora, save_checkpoint

peft = pytest.importorskip("peft")
CPU = torch.device("cpu")
RANK = 3
LAYERS = [f"blocks.{i}.{part}" for i in range(2) for part in ("self_attn.q", "cross_attn.o", "ffn.2")]


def adapter(model, layers=LAYERS, rank=RANK):
    """(A, B) by layer."""
    weights = dict(model.named_parameters())
    shapes = {name: weights[f"{name}.weight"].shape for name in layers}
    return {
        name: (torch.randn(rank, *shape[1:]), torch.randn(shape[0], rank, *[1] * (len(shape) - 2)))
        for name, shape in shapes.items()
    }


def merged(model, lora, scaling):
    state = model.state_dict()
    for name, (a, b) in lora.items():
        x = state[f"{name}.weight"].double()
        state[f"{name}.weight"] = (x + scaling * (b.double().flatten(1) @ a.double().flatten(1)).view(x.shape)).float()
    other = blank(model)
    other.load_state_dict(state)
    return other


def check(got, expected):
    latents, _, context, times = inputs(CPU, torch.float32, frames=2)
    with torch.no_grad():
        out, want = got(latents, times, context), expected(latents, times, context)
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-4)
    return out


def diffusers_name(name):
    for own, other in ((".self_attn.", ".attn1."), (".cross_attn.", ".attn2."), (".ffn.2", ".ffn.net.2")):
        name = name.replace(own, other)
    return name.replace(".q", ".to_q").replace(".o", ".to_out.0")


def keys(lora, prefix, down="lora_A", up="lora_B", rename=lambda name: name, alpha=None):
    state = {}
    for name, (a, b) in lora.items():
        base = prefix + rename(name)
        state |= {f"{base}.{down}.weight": a, f"{base}.{up}.weight": b}
        if alpha is not None:
            state[f"{base}.alpha"] = torch.tensor(float(alpha))
    return state


LAYOUTS = {
    "peft": dict(prefix="base_model.model."),
    "peft, with the adapter's name": dict(prefix="base_model.model.", down="lora_A.default", up="lora_B.default"),
    "bare": dict(prefix=""),
    "of a trainer's module": dict(prefix="model._fsdp_wrapped_module.base_model.model."),
    "ComfyUI": dict(prefix="diffusion_model.", down="lora_down", up="lora_up", alpha=6),
    "ComfyUI, PEFT's parts": dict(prefix="diffusion_model."),
    "underscores": dict(prefix="lora_unet_", down="lora_down", up="lora_up", alpha=6,
                        rename=lambda name: name.replace(".", "_")),
    "diffusers": dict(prefix="transformer.", rename=diffusers_name),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, tmp_path):
    model = small(CPU, torch.float32)
    lora, options = adapter(model), LAYOUTS[layout]
    save_file(keys(lora, **options), tmp_path / "lora.safetensors")
    expected = merged(model, lora, options.get("alpha", RANK) / RANK)
    before = [p.detach().clone() for p in model.parameters()]
    plain = check(model, model)
    assert load_lora(model, tmp_path / "lora.safetensors") is model
    assert (check(model, expected) - plain).abs().max() > 0.1
    named = {name.replace("base_layer.", ""): p for name, p in model.named_parameters() if "lora_" not in name}
    assert all(torch.equal(p, own) for p, own in zip(named.values(), before, strict=True))
    save_checkpoint(model, tmp_path / "merged")
    check(from_pretrained(tmp_path / "merged"), expected)


@pytest.mark.parametrize("name", ["generator_lora", None])
def test_longlive(name, tmp_path):
    """A .pt with the critic's beside it, written by PEFT; every linear layer of a block. Rank and alpha are in the
    run's configuration."""
    model = small(CPU, torch.float32)
    layers = [n for n, m in model.named_modules() if n.startswith("blocks.") and isinstance(m, torch.nn.Linear)]
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=layers, init_lora_weights=False)
    trained = peft.get_peft_model(small(CPU, torch.float32), config)
    trained.base_model.model.load_state_dict(
        {k: model.state_dict()[k.replace("base_layer.", "")] for k in trained.base_model.model.state_dict()
         if "lora_" not in k}, strict=False,
    )  # fmt: skip
    state = peft.get_peft_model_state_dict(trained)
    held = {name: state, "critic_lora": {}, "step": 1} if name else state
    torch.save(held, tmp_path / "lora.pt")
    with pytest.raises(ValueError, match=r"load_lora\(model, path\)"):
        load_checkpoint(model, tmp_path / "lora.pt") if name is None else load_checkpoint(
            model, tmp_path / "lora.pt", weights=name
        )
    check(load_lora(model, tmp_path / "lora.pt", alpha=8), trained)


@pytest.mark.parametrize("rslora", [False, True])
def test_a_folder_of_peft_with_its_configuration(rslora, tmp_path):
    model = small(CPU, torch.float32)
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q", "ffn.0"], init_lora_weights=False, use_rslora=rslora,
        alpha_pattern={"cross_attn.q": 3}, rank_pattern={"blocks.1.self_attn.q": 2},
    )  # fmt: skip
    base = blank(model)
    base.load_state_dict(model.state_dict())
    trained = peft.get_peft_model(base, config)
    trained.save_pretrained(tmp_path)
    check(load_lora(model, tmp_path), trained)
    with pytest.raises(ValueError, match=r"alpha must be what .* says, \d for blocks.*got 5"):
        load_lora(small(CPU, torch.float32), tmp_path, alpha=5)


def test_several_add_up_and_strength_scales(tmp_path):
    model = small(CPU, torch.float32)
    first, second = adapter(model), adapter(model, [*LAYERS[:2], "patch_embedding", "head.head"], rank=2)
    for name, lora in (("a", first), ("b", second)):
        torch.save(keys(lora, ""), tmp_path / f"{name}.pt")
    expected = merged(merged(model, first, 1), second, -0.5)
    load_lora(model, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"adapter must be a new name, the model has \['default'\]"):
        load_lora(model, tmp_path / "b.pt")
    load_lora(model, tmp_path / "b.pt", strength=-0.5, adapter="second")
    check(model, expected)


def test_what_is_refused_leaves_the_model(tmp_path):
    model = small(CPU, torch.float32)
    lora = adapter(model)
    good = keys(lora, "diffusion_model.")

    def refused(state, *said, **more):
        torch.save(state, tmp_path / "lora.pt")
        with pytest.raises(ValueError) as error:
            load_lora(model, tmp_path / "lora.pt", **more)
        assert all(text in str(error.value) for text in said), error.value
        assert not any("lora" in name for name, _ in model.named_parameters())

    refused(good | {"diffusion_model.blocks.0.norm3.diff": torch.ones(48)}, "1 no part of a plain LoRA", "norm3.diff")
    refused(good | {"diffusion_model.blocks.0.self_attn.q.dora_scale": torch.ones(48)}, "dora_scale")
    refused(keys(adapter(small(CPU, torch.float32, num_layers=3), ["blocks.2.ffn.0"]), ""), "2 of no layer", "blocks.2")
    refused(keys(adapter(small(CPU, torch.float32, ffn_dim=32), ["blocks.0.ffn.0"]), ""), "1 of another shape",
            "(32, 3) @ (3, 48) in the file, (64, 48) in the model")  # fmt: skip
    refused({k: x for k, x in good.items() if "0.ffn.2.lora_A" not in k}, "1 incomplete: blocks.0.ffn.2 has B alone")
    refused(model.state_dict(), "no part of a plain LoRA", "more")
    refused({"step": 1}, "must hold a state dict, or one as generator_lora")
    refused(good | {f"diffusion_model.{LAYERS[0]}.alpha": torch.tensor(1.0)}, "alpha must be what", alpha=3)
    with pytest.raises(FileNotFoundError):
        load_lora(model, tmp_path / "none.pt")
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors"):
        load_lora(model, tmp_path / "folder")
    (tmp_path / "folder" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "use_dora": True}))
    save_file(keys(lora, ""), tmp_path / "folder" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="of a plain LoRA, got use_dora"):
        load_lora(model, tmp_path / "folder")
    with pytest.raises(ValueError, match="must hold its weights whole"):
        load_lora(small(CPU).to("meta"), tmp_path / "lora.pt")


def test_a_compiled_model_takes_a_lora(tmp_path):
    model = small(CPU, torch.float32)
    lora = adapter(model)
    torch.save(keys(lora, ""), tmp_path / "lora.pt")
    expected = merged(model, lora, 1)
    model.blocks[0] = torch.compile(model.blocks[0], backend="eager")
    compiled = torch.compile(model, backend="eager")
    check(load_lora(compiled, tmp_path / "lora.pt"), expected)
