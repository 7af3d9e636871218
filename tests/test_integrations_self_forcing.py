"""``integrations.self_forcing.patch`` on small models in the style of each family, against what their own code does."""

import copy
import gc
import itertools
import weakref

import forcing_models as theirs
import pytest
import torch
from forcing_infinity import InfinityModel
from forcing_models import TOKENS, CausalWanModel, LongLiveModel, RewardForcingModel, latents, new_cache, run
from torch import nn
from torch._dynamo.testing import CompileCounter

import rfkernels as rf
from rfkernels.integrations.self_forcing import patch

MODELS = [RewardForcingModel, CausalWanModel, LongLiveModel, InfinityModel]
LONGLIVE = [LongLiveModel, InfinityModel]
TOLERANCE = {torch.float64: 1e-13, torch.float32: 4e-6, torch.bfloat16: 2**-6}  # of outputs near 2

families = pytest.mark.parametrize("family", MODELS, ids=lambda cls: cls.__name__)
longlive = pytest.mark.parametrize("family", LONGLIVE, ids=lambda cls: cls.__name__)


class Pair:
    """A model, and a copy of it that is patched; each with a cache of its own."""

    def __init__(self, family, dtype=torch.float64, batch=1, frames=9, local=9, sink=3, **options):
        torch.manual_seed(1)
        self.dtype, self.batch, self.frames = dtype, batch, frames
        self.old = family(local, sink).to(dtype).requires_grad_(False)
        self.new = copy.deepcopy(self.old)
        self.undo = patch(self.new, **options)
        self.allocate()

    def allocate(self):
        self.caches = [new_cache(self.batch, self.frames, self.dtype) for _ in range(2)]

    def reset(self):
        """As their pipelines do before a second video: new indices, the same tensors."""
        for layer in itertools.chain(*self.caches):
            layer.update({f"{name}_end_index": torch.tensor([0]) for name in ("global", "local")})

    def outputs(self, start, frames=3, seed=0, **switch):
        x = latents(frames, seed, self.batch, self.dtype)
        return [
            run(model, x, cache, start, **switch)
            for model, cache in zip((self.old, self.new), self.caches, strict=True)
        ]

    def same(self, *args, **switch):
        old, new = self.outputs(*args, **switch)
        torch.testing.assert_close(new, old, atol=TOLERANCE[self.dtype], rtol=0)

    def video(self, chunks, seed=0, first=0, passes=2, sizes=None):
        start = first
        for chunk, frames in enumerate(sizes or [3] * chunks):
            for step in range(passes):
                self.same(start, frames, seed + 100 * chunk + step)
            start += frames


@families
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_same_numbers_and_again_after_undo(family, dtype):
    pair = Pair(family, dtype, batch=2)
    pair.video(7)
    assert rf_cache(pair).sink_dtype == dtype
    pair.undo()
    assert type(pair.new) is family and pair.new.state_dict().keys() == pair.old.state_dict().keys()
    pair.reset()
    pair.video(2)
    assert "_rfkernels" not in pair.new.__dict__
    assert torch.equal(*pair.outputs(6))  # their own code on either side


def rf_cache(pair):
    (stream,) = pair.new._rfkernels.streams.values()
    return stream.cache


@families
def test_another_rule_gives_other_numbers(family):
    """What the comparisons above would notice."""
    for options in ({"alpha": 0.5}, {"sink_positions": "absolute" if family in MODELS[::3] else "before_window"}):
        pair = Pair(family, **options)
        for start in range(0, 15, 3):
            old, new = pair.outputs(start)
        assert (old - new).abs().max() > 1e-6


def test_averages_in_float32_when_asked():
    pair = Pair(RewardForcingModel, torch.bfloat16, sink_dtype=None)
    pair.outputs(0)
    assert rf_cache(pair).sink_dtype == torch.float32 and rf_cache(pair).alpha == 0.999


@families
def test_second_video_by_new_indices_by_zeroed_ones_and_by_another_cache(family):
    pair = Pair(family)
    pair.video(4)
    pair.reset()
    pair.video(4, seed=7)
    for layer in itertools.chain(*pair.caches):
        for x in layer.values():
            x.zero_()
    pair.video(4, seed=8)
    pair.allocate()
    pair.video(4, seed=9)


@families
def test_two_caches_for_guidance(family):
    pair = Pair(family)
    positive = pair.caches
    pair.allocate()
    negative = pair.caches
    for start in range(0, 15, 3):
        for step in range(3):
            for pair.caches, text in ((positive, 1), (negative, 2)):
                pair.same(start, seed=step, text=text)
    assert len(pair.new._rfkernels.streams) == 2


@families
def test_a_cache_that_is_dropped_is_freed(family):
    pair = Pair(family)
    pair.outputs(0)
    kept = weakref.ref(rf_cache(pair))
    assert pair.caches[1][0]["k"].data_ptr() == kept().k[0].data_ptr()
    pair.allocate()
    gc.collect()
    assert kept() is None and not pair.new._rfkernels.streams


@pytest.mark.parametrize("family", [CausalWanModel, LongLiveModel, InfinityModel], ids=lambda cls: cls.__name__)
def test_another_length_of_chunks(family):
    """As with a first image: 1, 3, 3, ...; and a video that changes its chunks. Their sinks must be whole at once."""
    Pair(family, sink=1).video(0, sizes=[1, 3, 3, 3, 3, 3])
    Pair(family).video(0, sizes=[4, 2, 3, 1, 2, 3, 4, 2])


def test_reward_forcing_with_other_chunks_warns():
    pair = Pair(RewardForcingModel)
    x = latents(2, 0)
    with pytest.warns(UserWarning, match="2 frames are evicted"):
        for start in range(0, 14, 2):
            run(pair.new, x, pair.caches[1], start)


@pytest.mark.parametrize("family", MODELS, ids=lambda cls: cls.__name__)
def test_unlimited_attention(family):
    """``local_attn_size`` -1: a cache of the whole video, and an error where it ends."""
    pair = Pair(family, local=-1, frames=12)
    pair.video(4)
    with pytest.raises(ValueError, match="at most 12 frames"):
        run(pair.new, latents(3, 0), pair.caches[1], 12)
    pair.reset()
    pair.video(3, seed=3)


@families
def test_a_training_cache_larger_than_the_window(family):
    """The sink is not averaged before the cache is full; Self-Forcing does not see it then."""
    pair = Pair(family, frames=21)
    pair.video(7)
    if family in (RewardForcingModel, InfinityModel):
        with pytest.raises(ValueError, match="at most 21 frames"):
            run(pair.new, latents(3, 0), pair.caches[1], 21)
    else:
        pair.video(3, first=21)


@families
def test_recache_of_the_window(family):
    pair = Pair(family)
    pair.video(6)
    pair.same(12, 6, text=1)
    pair.video(3, first=18, seed=5)
    pair.same(25, 2, text=2)


@families
@pytest.mark.parametrize("chunks", [2, 3, 6], ids=lambda n: f"{3 * n}-frames")
def test_recache_of_sink_and_window(family, chunks):
    """A prompt switch of LongLive: zeroed tensors, then the newest S + W frames anew, the sink included."""
    pair = Pair(family)
    switch = {"sink_recache_after_switch": True} if family in LONGLIVE else {}
    pair.video(chunks)
    for repeat in range(2):
        for layer in itertools.chain(*pair.caches):
            layer["k"].zero_(), layer["v"].zero_()
        end = 3 * chunks + 12 * repeat
        frames = min(9, end)
        pair.same(end - frames, frames, text=1 + repeat, **switch)
        pair.video(4, first=end, seed=50)


@longlive
@pytest.mark.parametrize("frames", [9, 21], ids=["inference", "training"])
def test_recache_that_spares_the_sink(family, frames):
    """``global_sink``: the newest frames anew, of which the first are not kept."""
    pair = Pair(family, frames=frames)
    pair.video(6)
    count = 9 if frames == 9 else 14
    pair.same(18 - count, count, text=1)
    if frames == 9:
        pair.same(9, 9, text=2, sink_recache_after_switch=True)
        pair.same(9, 9, text=3)
    pair.video(1, first=18, seed=50)


class Wrapper(nn.Module):
    """As WanDiffusionWrapper."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)


@pytest.mark.parametrize("family", [RewardForcingModel, LongLiveModel])
def test_lora_by_peft_before_and_after(family):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q", "k", "v", "o"], init_lora_weights=False)
    for patch_first in (False, True):
        pair = Pair(family)
        pair.undo()
        torch.manual_seed(2)
        pair.old = Wrapper(peft.get_peft_model(pair.old, config))
        torch.manual_seed(2)
        if patch_first:
            patch(pair.new)
            pair.new = Wrapper(peft.get_peft_model(pair.new, config))
        else:
            pair.new = Wrapper(peft.get_peft_model(pair.new, config))
            patch(pair.new)
        pair.video(5)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@families
def test_gradients(family, checkpointing):
    """Training: passes without gradient, one with, then the clean one; backward after the next chunks."""
    pair = Pair(family, frames=21)
    losses = []
    for model in (pair.old, pair.new):
        model.requires_grad_(True)
    pair.new.gradient_checkpointing = checkpointing
    pasts = []
    for chunk in range(6):
        with torch.no_grad():
            pair.same(3 * chunk, seed=chunk)
        pasts.append(copy.deepcopy(pair.caches[0]))
        x = latents(3, 100 + chunk)
        losses.append(run(pair.new, x, pair.caches[1], 3 * chunk).square().mean())
        with torch.no_grad():
            pair.same(3 * chunk, seed=200 + chunk)
    sum(losses).backward()
    for chunk, past in enumerate(pasts):  # theirs, where nothing is written before the gradient is taken
        run(pair.old, latents(3, 100 + chunk), past, 3 * chunk).square().mean().backward()
    for (name, old), new in zip(pair.old.named_parameters(), pair.new.parameters(), strict=True):
        torch.testing.assert_close(new.grad, old.grad, atol=1e-12, rtol=1e-9, msg=name)


def test_passes_without_a_cache_are_theirs():
    pair = Pair(CausalWanModel)
    t = torch.zeros(1, 3, dtype=torch.float64)
    old, new = (m(latents(3, 0), t=t, context=theirs.prompt(0)) for m in (pair.old, pair.new))
    assert torch.equal(old, new)


@families
def test_a_copy_of_a_patched_model_has_caches_of_its_own(family):
    pair = Pair(family)
    pair.video(2)
    other = copy.deepcopy(pair.new)
    assert not other._rfkernels.streams
    pair.old, pair.new = copy.deepcopy(pair.old), other
    pair.allocate()
    pair.video(5)


def test_dicts_and_lists_that_are_copied_on_the_way():
    """As FSDP does with the arguments of the root; the tensors stay."""
    pair = Pair(RewardForcingModel)
    for start in range(0, 15, 3):
        x = latents(3, start)
        old = run(pair.old, x, pair.caches[0], start)
        torch.testing.assert_close(run(pair.new, x, [dict(d) for d in pair.caches[1]], start), old, atol=1e-13, rtol=0)


def test_inference_mode():
    with torch.inference_mode():
        pair = Pair(RewardForcingModel)
        pair.video(5)
        pair.reset()
        pair.video(5)


def test_another_rotary_table():
    pair = Pair(RewardForcingModel)
    pair.old.freqs = pair.new.freqs = theirs.rope_table(theta=500.0)
    pair.video(5)
    pair.old.freqs = pair.new.freqs = pair.new.freqs.roll(1, 0)
    pair.allocate()
    with pytest.raises(ValueError, match="same angle"):
        run(pair.new, latents(3, 0), pair.caches[1], 0)
    assert pair.caches[1][0]["k"].shape == (1, 9 * TOKENS, theirs.HEADS, theirs.HEAD_DIM)


@families
def test_what_cannot_go_on_is_an_error_and_changes_nothing(family):
    pair = Pair(family)
    x = latents(3, 0)
    with pytest.raises(ValueError, match="must be 0 in the first pass"):
        run(pair.new, x, pair.caches[1], 3)
    pair.video(5)
    for start in (18, 9):
        with pytest.raises(ValueError, match="must be at most frame 15"):
            run(pair.new, x, pair.caches[1], start)
    with pytest.raises(ValueError, match="recache"):
        switch = {"sink_recache_after_switch": True} if family in LONGLIVE else {}
        run(pair.new, latents(8, 0), pair.caches[1], 7, **switch)
    with pytest.raises(ValueError, match="whole frames"):
        pair.new(x, t=None, context=None, kv_cache=pair.caches[1], current_start=15 * TOKENS + 1)
    with pytest.raises(ValueError, match="allocate another"):
        run(pair.new, x[..., :4], pair.caches[1], 0)
    pair.video(2, first=15, seed=4)
    pair.caches[1][0]["global_end_index"].zero_()
    with pytest.raises(ValueError, match="indices are reset"):
        run(pair.new, x, pair.caches[1], 21)


@pytest.mark.parametrize("entry", [{"pinned_len": torch.tensor([0])}, {"k": [torch.zeros(1)]}], ids=["pinned", "list"])
def test_caches_of_longlive_2_are_refused(entry):
    pair = Pair(LongLiveModel)
    pair.caches[1][1].update(entry)
    with pytest.raises(ValueError, match="cannot be represented"):
        run(pair.new, latents(3, 0), pair.caches[1], 0)


def test_models_of_others_are_refused():
    class Pinned(theirs.LongLiveAttention):
        def __init__(self, *args):
            super().__init__(*args)
            self.global_sink_size = 0

    class Anchored(theirs.SelfForcingAttention):
        def forward(self, x, seq_lens, grid_sizes, freqs, block_mask, kv_cache=None, anchors=None):
            return x

    for attention, named in ((Pinned, "global_sink_size"), (Anchored, "anchors")):
        with pytest.raises(ValueError, match=named):
            patch(CausalWanModel(attention=attention))
    with pytest.raises(ValueError, match="module with blocks, got 0"):
        patch(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="model must be a module"):
        patch("model")
    model = CausalWanModel()
    model.forward = model.forward
    with pytest.raises(ValueError, match="hook"):
        patch(model)
    assert type(model) is CausalWanModel


def test_arguments():
    model = RewardForcingModel()
    with pytest.raises(ValueError, match="sink_positions"):
        patch(model, sink_positions="behind")
    undo = patch(model, alpha=2.0)
    with pytest.raises(ValueError, match="patched already"):
        patch(model)
    cache = new_cache(dtype=torch.float32)
    with pytest.raises(ValueError, match="alpha"):  # when the cache is made; theirs is as it was
        run(model, latents(3, 0, dtype=torch.float32), cache, 0)
    assert cache[1]["v"].shape[1] == 9 * TOKENS
    undo()
    patch(model)


def test_undo_in_reverse_order_only():
    model = CausalWanModel()
    undo = patch(model)
    cls = type(model)
    model.__class__ = type("Sharded", (cls,), {})
    with pytest.raises(RuntimeError, match="undo that first"):
        undo()
    model.__class__ = cls
    undo()
    assert type(model) is CausalWanModel


def test_imported_at_first_use():
    assert rf.integrations.self_forcing.patch is patch


@pytest.mark.parametrize(
    "family", [RewardForcingModel, *(pytest.param(cls, marks=pytest.mark.slow) for cls in MODELS[1:])]
)
def test_under_torch_compile(family):
    """With the clock outside the graphs; nothing is compiled anew from chunk to chunk once the cache is full."""
    pair = Pair(family, torch.float32)
    counter = CompileCounter()
    torch._dynamo.reset()
    pair.new.compile(backend=counter)
    with torch.no_grad():
        pair.video(4)
        compiled = counter.frame_count
        pair.video(3, first=12, seed=5)
    assert compiled and counter.frame_count == compiled


@pytest.fixture
def one_process():
    dist = pytest.importorskip("torch.distributed")
    if not dist.is_available():
        pytest.skip("torch.distributed is not built in")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def fsdp1(model):
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    policy = ModuleWrapPolicy({theirs.Block})
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu"))


def fsdp2(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    for module in [*model.blocks, model]:
        fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wrap", [fsdp1, fsdp2, nn.parallel.DistributedDataParallel], ids=["FSDP1", "FSDP2", "DDP"])
@pytest.mark.parametrize("patch_first", [True, False], ids=["patch first", "wrap first"])
def test_sharded_and_replicated(one_process, wrap, patch_first):
    pair = Pair(RewardForcingModel)
    pair.undo()
    pair.new.requires_grad_(True)
    if patch_first:
        patch(pair.new)
    pair.new = wrap(pair.new)
    if not patch_first:
        patch(pair.new)
    for chunk in range(5):
        with torch.no_grad():
            pair.same(3 * chunk, seed=chunk)
        run(pair.new, latents(3, 50 + chunk), pair.caches[1], 3 * chunk).square().mean().backward()
        with torch.no_grad():
            pair.same(3 * chunk, seed=100 + chunk)
