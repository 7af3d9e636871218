"""What the attention forward executes in bfloat16, counted by the emulator; defects that it finds."""

import re

import pytest
import torch
from ptx import emulator

from cuda.conftest import cuda_ptx
from cuda.launch import INSTANCES, forward

NAME, QUERIES, KEYS = f"{INSTANCES['sm80']}/forward_bf16_d128", 128, 1024


def launch(emulated_module, keys: int = KEYS, head_dim: int = 128, **options):
    """One block of queries over the full prefix, every tile seen by every row."""
    q = torch.randn(1, QUERIES, 1, head_dim).bfloat16()
    k, v = (torch.randn(1, keys, 1, head_dim).bfloat16() for _ in range(2))
    frames = keys // QUERIES
    return forward(
        emulated_module, q, k, v, num_frames=torch.tensor([frames]), frame_tokens=QUERIES, capacity=frames,
        scale=head_dim**-0.5, **options,
    )  # fmt: skip


@pytest.fixture(scope="module", params=(64, 96, 128, 256))
def head_dim(request):
    return request.param


@pytest.fixture(scope="module")
def counts(emulated_module, head_dim):
    torch.manual_seed(0)
    return launch(emulated_module, head_dim=head_dim)[2]


def test_tensor_operations(counts, head_dim):
    """A multiplication and an addition for each of QK^T and PV, nothing masked, nothing twice."""
    assert counts.tensor_operations == 2 * 2 * QUERIES * KEYS * head_dim
    assert head_dim != 128 or counts.tensor_operations == 67108864


def main_loop(counts) -> list:
    """Rows of the PTX from the first wait for copies, the loop's first step, to the last product, its last one."""
    begin = min(row[2] for row in counts.instructions if row[0].startswith("cp.async.wait_group"))
    end = max(row[2] for row in counts.instructions if row[0].startswith("mma."))
    return [row for row in counts.instructions if begin <= row[2] <= end]


def test_no_bank_conflicts_in_the_main_loop(counts, head_dim):
    """The copies, every ldmatrix, and what the loop keeps in shared memory; q's tile is filled and emptied outside."""
    loop = main_loop(counts)
    warps, tile_keys = (4, 64) if head_dim <= 128 else (8, 32)
    turns = warps * KEYS // tile_keys  # of the loop, all warps
    copies = tile_keys * head_dim // 8 // (32 * warps)  # of a warp, for a tile
    assert {row[4] for row in loop if row[0].startswith(("mma.", "ldmatrix"))} == {turns}
    assert sum(row[4] for row in loop if row[0].startswith("cp.async.cg")) == (2 * turns - warps) * copies
    assert sum(row[6] for row in loop) == 0


def test_global_memory_traffic(counts, head_dim):
    """Within 3 % of Q, K and V once a block, and the output with its normalisers."""
    read, written = 2 * head_dim * (QUERIES + 2 * KEYS), 2 * head_dim * QUERIES + 4 * QUERIES
    assert read <= counts.global_load_bytes <= 1.03 * read
    assert counts.global_store_bytes == written


@pytest.fixture(scope="module")
def ptx_text(emulated_module):  # which skips where nothing can be compiled
    return cuda_ptx(NAME)


def entry_lines(text: str, pattern: str) -> tuple[list[str], list[int]]:
    """All lines, and which of those of the 64-key kernel match."""
    lines = text.splitlines()
    begin = next(i for i, line in enumerate(lines) if re.search(r"\.entry rf_attention_forward_bf16_d128\(", line))
    end = next(i for i in range(begin, len(lines)) if lines[i] == "}")
    return lines, [i for i in range(begin, end) if re.search(pattern, lines[i])]


@pytest.mark.parametrize(
    "pattern, kinds",
    [(r"cp\.async\.wait_group", {"in-flight"}), (r"\bbar\.sync", {"shared-hazard", "in-flight", "uninitialised"})],
    ids=["wait", "barrier"],
)
def test_a_planted_defect_is_caught(emulated_module, ptx_text, pattern, kinds):
    """Each wait for copies and each barrier of the main loop is needed: without it the checker objects."""
    lines, places = entry_lines(ptx_text, pattern)
    in_loop = places if "wait" in pattern else places[-2:]  # the first barrier is between segments: a prefix has one
    assert len(in_loop) == 2
    for place in in_loop:
        damaged = emulator.Module("\n".join("" if i == place else line for i, line in enumerate(lines)))
        with pytest.raises(emulator.PTXError) as caught:
            launch(emulated_module, 256, module=damaged)
        assert caught.value.kind in kinds
