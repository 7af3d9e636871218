"""Transformers, caches, latents and passes of diffusers' Wan that the integration refuses, and how it says so."""

import pytest
import torch

import rfkernels as rf
from rfkernels.integrations.diffusers import DiffusersWan, patch
from rfkernels.models import StreamingSampler

diffusers = pytest.importorskip("diffusers")

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


def test_a_samplers_graphs_are_for_causal_wan(their_tiny):
    with pytest.raises(ValueError, match="cuda_graph needs a CausalWan, got a DiffusersWan"):
        StreamingSampler(DiffusersWan(their_tiny), [1000], 5.0, height=4, width=6, cuda_graph=True)
