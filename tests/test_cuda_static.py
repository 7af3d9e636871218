"""What nvcc makes of the CUDA kernels, without a GPU: against the checked-in baseline, without stack and spills."""

import json

import pytest
from ptx.compile import find_nvcc

report = pytest.importorskip("benchmarks.cuda_report", reason="needs the source tree")


def check(arch: int, head_dims: tuple[int, ...], dtypes: tuple[str, ...] = report.DTYPES) -> None:
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc: the CUDA kernels cannot be compiled")
    baseline, key = json.loads(report.BASELINE.read_text()), report.toolchain(nvcc, arch)
    if key not in baseline:
        pytest.skip(f"the baseline knows {sorted(baseline)}, not {key}")
    known = {row["kernel"]: row for row in baseline[key]}
    rows = report.report(nvcc, arch, head_dims, dtypes)
    assert rows
    for row in rows:
        assert report.faults(row, arch) is None, f"{row['kernel']}: {report.faults(row, arch)}"
        assert known.get(row["kernel"]) == row


def test_kernels_of_sm_80():
    """head_dim 64 and 128 in bfloat16, forward and backward, the cache's and the loss's kernels."""
    check(80, (64, 128), ("bf16",))


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", report.HEAD_DIMS)
@pytest.mark.parametrize("arch", report.ARCHITECTURES)
def test_every_kernel(arch, head_dim):
    check(arch, (head_dim,))


def test_faults_are_seen():
    row = {"kernel": "rf_attention_forward_bf16_d128", "stack": 0, "spill_stores": 0, "spill_loads": 0, "shared": 65568,
           "ctas_asked": 2, "ctas_by_registers": 2}  # fmt: skip
    assert report.faults(row, 80) is None
    for change in ({"stack": 8}, {"spill_loads": 4}, {"ctas_by_registers": 1}, {"shared": 170000}):
        assert report.faults(row | change, 80)


def test_dynamic_shared_memory_must_be_stated():
    entry = """.extern .shared .align 128 .b8 tiles[];
.visible .entry kernel(
	.param .align 8 .b8 kernel_param_0[8]
)
.maxntid 128
{
	mov.b32 %r1, tiles;
	ret;
}
"""
    assert report.launch_bounds(entry.replace("tiles;", "5;")) == {"kernel": (128, 1, 0)}
    stated = entry.replace("\tret;", "\t// dynamic shared memory: 640 bytes\n\tret;")
    assert report.launch_bounds(stated) == {"kernel": (128, 1, 640)}
    with pytest.raises(RuntimeError, match="state_shared_bytes"):
        report.launch_bounds(entry)
