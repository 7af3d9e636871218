"""What the attention forward for sm_90a executes at head_dim 128 in bfloat16; that each synchronisation is needed."""

import re

import pytest
import torch
from ptx import emulator

import rfkernels as rf
from cuda.conftest import cuda_ptx
from cuda.launch import INSTANCES, forward
from cuda.test_forward_counts import KEYS, QUERIES, launch
from rfkernels.contract.geometry import WindowMask

NAME, HEAD_DIM, TILE_KEYS = f"{INSTANCES['sm90']}/forward_bf16_d128", 128, 128


@pytest.fixture(scope="module")
def counts(emulated_module):
    torch.manual_seed(0)
    return launch(emulated_module, hopper=True)[2]


def test_tensor_operations(counts):
    """A multiplication and an addition for each of QK^T and PV, all by wgmma, nothing twice."""
    assert counts.tensor_operations == 2 * 2 * QUERIES * KEYS * HEAD_DIM == 67108864
    products = {name: executed for name, _, _, _, executed, *_ in counts.instructions if "mma" in name.split(".")[0]}
    assert set(products) == {f"wgmma.{what}" for what in ("mma_async.sync.aligned.m64n128k16.f32.bf16.bf16",
                             "fence.sync.aligned", "commit_group.sync.aligned", "wait_group.sync.aligned")}  # fmt: skip


def test_no_bank_conflicts_in_the_copies(counts):
    copies = [row for row in counts.instructions if row[0].startswith("cp.async.cg")]
    assert sum(row[4] for row in copies) == 2 * KEYS * HEAD_DIM * 2 // 16 // 32  # all of K and V, 16 bytes a thread
    assert sum(row[6] for row in copies) == 0


def test_global_memory_traffic(counts):
    """Within 3 % of Q, K and V once a block, and the output with its normalisers."""
    read, written = 2 * HEAD_DIM * (QUERIES + 2 * KEYS), 2 * HEAD_DIM * QUERIES + 4 * QUERIES
    assert read <= counts.global_load_bytes <= 1.03 * read
    assert counts.global_store_bytes == written


def two_segments(emulated_module, module, seed=0):
    """Three tiles of a window, then two of sinks outside it, which meet the queries in another rotation."""
    keys = 6 * TILE_KEYS  # one is in neither: evicted
    q, k, v = (torch.randn(1, n, 1, HEAD_DIM) for n in (QUERIES, keys, keys))
    k *= torch.linspace(0.1, 8.0, keys)[:, None, None]  # so that shifts are raised in later tiles too
    q, k, v = (x.bfloat16() for x in (q, k, v))
    rope = rf.Rope3D(HEAD_DIM, 8, 16).tables("cpu", torch.bfloat16)
    mask = WindowMask(2 * TILE_KEYS, 3 * TILE_KEYS, QUERIES, QUERIES, True)
    return forward(emulated_module, q, k, v, mask=mask, rope=rope, scale=0.1, hopper=True, module=module, seed=seed)


# In the order of the text: what stands there, which are needed, what is found without one.
SYNCHRONISATIONS = {
    "init": (r"\bbar\.sync\s+0;", 1, {"shared-hazard", "mbarrier"}),
    "queries": (r"\bbar\.sync\s+1,", 3, {"shared-hazard", "uninitialised", "in-flight"}),
    "proxy": (r"fence\.proxy\.async", 4, {"proxy-fence"}),
    "fence": (r"wgmma\.fence", 4, {"wgmma-fence"}),
    "commit": (r"wgmma\.commit_group", 4, {"in-flight"}),
    "wait": (r"wgmma\.wait_group", 5, {"in-flight"}),
    "full or empty": (r"mbarrier\.try_wait", 5, {"shared-hazard", "in-flight", "mbarrier"}),
    "release": (r"mbarrier\.arrive\.shared", 4, {"mbarrier"}),
    "copied": (r"cp\.async\.mbarrier\.arrive", 2, {"mbarrier", "in-flight"}),
}  # fmt: skip
# The fence of the waiting threads covers the queries too; scores and output are in one fence's reach within the loop.
# Both stand there for what a GPU or its assembler might make of the code in between.
COVERED_BY_OTHERS = {("proxy", 0), ("fence", 2)}


@pytest.mark.parametrize("what", SYNCHRONISATIONS)
def test_a_planted_defect_is_caught(emulated_module, what):
    pattern, count, kinds = SYNCHRONISATIONS[what]
    emulated_module(NAME)  # skips where nothing can be compiled
    lines = cuda_ptx(NAME).splitlines()
    places = [i for i, line in enumerate(lines) if re.search(pattern, line)]
    assert len(places) == count
    torch.manual_seed(0)
    for index, place in enumerate(places):
        if (what, index) in COVERED_BY_OTHERS:
            continue
        rest = place + (2 if what == "full or empty" else 1)  # the branch back too
        damaged = emulator.Module("\n".join(lines[:place] + [""] * (rest - place) + lines[rest:]))
        with pytest.raises(emulator.PTXError) as caught:
            two_segments(emulated_module, damaged)
        assert caught.value.kind in kinds, f"{what} {index}: {caught.value}"
