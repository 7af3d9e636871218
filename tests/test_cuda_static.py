"""What nvcc makes of the CUDA kernels, without a GPU: against the checked-in baseline, without stack and spills."""

import json

import pytest
from ptx.compile import find_nvcc

report = pytest.importorskip("benchmarks.cuda_report", reason="needs the source tree")


@pytest.fixture(scope="module")
def nvcc() -> str:
    return find_nvcc() or pytest.skip("no nvcc: the CUDA kernels cannot be compiled")


def check(nvcc: str, arch: int, make_rows) -> None:
    baseline, key = json.loads(report.BASELINE.read_text()), report.toolchain(nvcc, arch)
    if key not in baseline:
        pytest.skip(f"the baseline knows {sorted(baseline)}, not {key}")
    known = {row["kernel"]: row for row in baseline[key]}
    rows = list(make_rows())
    assert rows
    for row in rows:
        assert report.faults(row, arch) is None, f"{row['kernel']}: {report.faults(row, arch)}"
        assert known.get(row["kernel"]) == row


def test_kernels_of_sm_80(nvcc):
    """head_dim 64 and 128 in bfloat16, forward and backward, the cache's and the loss's kernels."""
    check(nvcc, 80, lambda: report.report(nvcc, 80, (64, 128), ("bf16",)))


def test_the_forward_of_hopper(nvcc):
    check(
        nvcc,
        90,
        lambda: report.kernels(nvcc, report.CUDA / "attention" / "sm90" / "instances" / "forward_bf16_d128.cu", 90),
    )


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", report.HEAD_DIMS)
@pytest.mark.parametrize("arch", report.ARCHITECTURES)
def test_every_kernel(nvcc, arch, head_dim):
    check(nvcc, arch, lambda: report.report(nvcc, arch, (head_dim,)))


def test_faults_are_seen():
    row = {"kernel": "rf_attention_forward_bf16_d128", "stack": 0, "spill_stores": 0, "spill_loads": 0, "shared": 65568,
           "ctas_asked": 2, "ctas_by_registers": 2}  # fmt: skip
    assert report.faults(row, 80) is None
    for change in ({"stack": 8}, {"spill_loads": 4}, {"ctas_by_registers": 1}, {"shared": 170000}):
        assert report.faults(row | change, 80)
    loop = {"special": 64, "overlapped": 64}
    assert report.faults(row | {"loop": loop}, 90) is None
    assert "10 of 64 exponentials" in report.faults(row | {"loop": loop | {"overlapped": 10}}, 90)


SERIALISED = """
#include "{csrc}/cuda/attention/sm90/wgmma.h"
using namespace rfkernels::cuda;
extern "C" __global__ void __launch_bounds__(128) serialised(float* out) {{
  float c[8][4] = {{}};
  start_products();
  Wgmma<Half, 64>::shared(c, 0, 0, 1);
  {between}
  Wgmma<Half, 64>::shared(c, 0, 0, 1);
  commit_products();
  wait_products<0>(c);
  for (int i = 0; i < 8; ++i) out[threadIdx.x * 8 + i] = c[i][0];
}}
"""


@pytest.mark.parametrize("between, serialised", [("", False), ("c[0][0] += 1.0f;", True)], ids=["clean", "touched"])
def test_serialised_products_are_an_error(nvcc, tmp_path, between, serialised):
    """ptxas only notes that products run one by one, where something touches their registers in between."""
    source = tmp_path / "sm90" / "kernel.cu"
    source.parent.mkdir()
    source.write_text(SERIALISED.format(csrc=report.ROOT / "csrc", between=between))
    if serialised:
        with pytest.raises(RuntimeError, match="Potential Performance Loss"):
            list(report.kernels(nvcc, source, 90))
    else:
        assert [row["kernel"] for row in report.kernels(nvcc, source, 90)] == ["serialised"]


# A loop with a detour around two instructions, one that was moved out of it, and a loop that copies.
SASS = """
        /*0000*/                   MOV R1, c[0x0] ;                /* 0x0 */
        /*0010*/                   HGMMA.64x64x16.F32 R24, gdesc[UR4], R24 ;
        /*0020*/              @!P0 BRA 0x0090 ;
        /*0030*/              @P1  BRA P2, 0x0060 ;
        /*0040*/                   FMUL R1, R1, R2 ;
        /*0050*/                   FMUL R1, R1, R2 ;
        /*0060*/                   MUFU.EX2 R1, R1 ;
        /*0070*/              @P3  BRA 0x0010 ;
        /*0080*/                   EXIT ;
        /*0090*/              @!P0 BRA 0x0090 ;
        /*00a0*/                   BRA 0x0030 ;
        /*00b0*/                   LDGSTS.E.BYPASS.128 [R2], [R4.64] ;
        /*00c0*/              @P0  BRA 0x00b0 ;
"""


def test_the_shortest_way_through_a_loop():
    found = report.straight.row(SASS, 2)
    assert found == {
        "tensor": 1, "special": 1, "other": 3, "overlapped": 0, "per_score": 2.0, "copies_per_score": 0.5,
    }  # fmt: skip
    waiting = SASS.replace("/*0060*/                   MUFU.EX2 R1, R1", "/*0060*/                   {}")
    for before, after, overlapped in (("MUFU.EX2 R1, R1", "WARPGROUP.DEPBAR.LE gsb0, 0x0", 1),
                                      ("WARPGROUP.DEPBAR.LE gsb0, 0x0", "MUFU.EX2 R1, R1", 0)):  # fmt: skip
        text = waiting.format(f"{before} ;\n        /*0068*/                   {after}")
        assert report.straight.row(text, 2)["overlapped"] == overlapped


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
