"""Kernels compiled by nvcc and by Triton, executed and compared with numpy; their counts."""

import struct
import time

import numpy as np
import pytest
import torch


def test_vector_add(ptx, sample):
    a, b, out = torch.randn(1000), torch.randn(1000), torch.empty(1000)
    arguments = {"a": a, "b": b, "out": out, "n": 1000}
    result = ptx.Module(sample("basic")).launch("vector_add", (8,), (128,), arguments, poison=["out"])
    np.testing.assert_array_equal(out.numpy(), a.numpy() + b.numpy())
    assert result.unwritten == {"out": 0}
    assert (result.global_load_bytes, result.global_store_bytes) == (8000, 4000)
    assert (result.global_load_sectors, result.global_store_sectors) == (250, 125)


@pytest.mark.parametrize("seed", range(3))
def test_reduction(ptx, sample, seed):
    x, total = torch.randn(5000), torch.zeros(1)
    ptx.Module(sample("basic")).launch("reduce_sum", (4,), (256,), {"x": x, "total": total, "n": 5000}, seed=seed)
    assert abs(total.item() - x.double().numpy().sum()) < 1e-3


def test_transpose_and_its_bank_conflicts(ptx, sample):
    x, out = torch.randn(50, 70), torch.empty(70, 50)
    module = ptx.Module(sample("basic"))
    conflicts = []
    for entry in ("transpose", "transpose_conflicts"):
        result = module.launch(entry, (3, 2), (32, 8), {"x": x, "out": out, "rows": 50, "columns": 70}, poison=["out"])
        np.testing.assert_array_equal(out.numpy(), x.numpy().T)
        conflicts.append(result.bank_conflicts)
    # Without padding all words of a column lie in one bank: a read of n lanes takes n turns instead of 1. Row blocks
    # have 32 and 18 active lanes, and every one of the 70 output rows is read in each of both.
    assert conflicts == [0, 70 * (31 + 17)]


def test_struct_argument_local_memory_and_tables(ptx, sample):
    """sinf of large arguments: the slow path with its table in global memory and its array in local memory."""
    x, y = torch.randn(100) * 1e5, torch.empty(100)
    params = struct.pack("<QQdi4x", x.data_ptr(), y.data_ptr(), 1.5, 100)
    ptx.Module(sample("basic")).launch("scaled_sine", (1,), (64,), [params], tensors={"x": x, "y": y}, poison=["y"])
    wide = x.double().numpy()
    np.testing.assert_allclose(y.numpy(), 1.5 * np.sin(wide) + np.exp(-(wide**2)), atol=1e-6)


def test_divergent_loops(ptx, sample):
    start, steps = torch.arange(1, 101, dtype=torch.int32), torch.zeros(100, dtype=torch.int32)
    ptx.Module(sample("basic")).launch("collatz", (1,), (128,), {"start": start, "steps": steps, "n": 100})
    assert steps[26] == 111 and steps[96] == 118 and steps[0] == 0


def test_gemm_with_tensor_cores(ptx, sample):
    torch.manual_seed(0)
    a, b, c = torch.randn(128, 256).bfloat16(), torch.randn(192, 256).bfloat16(), torch.empty(128, 192)
    arguments = {"a": a, "b": b, "c": c, "N": 192, "K": 256}
    module = ptx.Module(sample("gemm"))
    results = [module.launch("gemm_bf16", (3, 2), (128,), arguments, 16384, seed, poison=["c"]) for seed in (0, 1)]
    np.testing.assert_allclose(c.numpy(), a.float().numpy() @ b.float().numpy().T, atol=1e-4)
    result = results[0]
    assert result.tensor_operations == 2 * 128 * 192 * 256
    assert result.bank_conflicts == 0
    assert result.global_load_bytes == 6 * 2 * 64 * 256 * 2 and result.global_store_bytes == 128 * 192 * 4
    assert result.by_opcode()["mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"] == 128 * 192 * 256 // 2048
    # Each block runs its main loop 8 times with 4 warps; the counts do not depend on the order of the warps.
    loop = max(result.basic_blocks(), key=lambda block: block["instructions"] * block["executed"])
    assert loop["executed"] % (6 * 4) == 0
    assert results[0] == results[1]


def test_wrong_launches_are_refused(ptx, sample):
    module = ptx.Module(sample("gemm"))
    with pytest.raises(ptx.PTXError, match="cannot run with 256 threads"):
        module.launch("gemm_bf16", (1,), (256,), [])
    with pytest.raises(ptx.PTXError, match="no entry 'nothing'"):
        module.launch("nothing", (1,), (32,), [])
    with pytest.raises(ptx.PTXError, match="has 8 bytes"):
        module.launch("gemm_bf16", (1,), (128,), [b"1234"])


@pytest.mark.parametrize("capability", [80, 90])
def test_triton_add(ptx, triton_kernels, capability):
    kernel = triton_kernels.compile_ptx(
        triton_kernels.add_kernel, {"x": "*fp32", "y": "*fp32", "out": "*fp32", "n": "i32"}, {"BLOCK": 256}, capability
    )
    x, y, out = torch.randn(1000), torch.randn(1000), torch.empty(1000)
    arguments = {"x": x, "y": y, "out": out, "n": 1000}
    ptx.Module(kernel.asm["ptx"]).launch("add_kernel", (4,), (128,), arguments, poison=["out"])
    np.testing.assert_array_equal(out.numpy(), x.numpy() + y.numpy())


@pytest.mark.parametrize("capability", [80, 90])
def test_triton_softmax(ptx, triton_kernels, capability):
    kernel = triton_kernels.compile_ptx(
        triton_kernels.softmax_kernel, {"x": "*fp16", "out": "*fp16", "columns": "i32"}, {"BLOCK": 512}, capability
    )
    x, out = torch.randn(5, 400).half(), torch.empty(5, 400, dtype=torch.float16)
    arguments = {"x": x, "out": out, "columns": 400}
    shared = kernel.metadata.shared
    ptx.Module(kernel.asm["ptx"]).launch("softmax_kernel", (5,), (128,), arguments, shared, poison=["out"])
    wide = np.exp(x.double().numpy())
    np.testing.assert_allclose(out.numpy(), wide / wide.sum(1, keepdims=True), atol=2e-4, rtol=1e-3)


def run_matmul(ptx, kernel, dtype, trans_a=False, trans_b=False, **options):
    torch.manual_seed(0)
    M, N, K = 100, 88, 136
    a = torch.randn(K, M).to(dtype).T if trans_a else torch.randn(M, K).to(dtype)
    b = torch.randn(N, K).to(dtype).T if trans_b else torch.randn(K, N).to(dtype)
    c = torch.empty(M, N, dtype=dtype)
    arguments = {"a": a, "b": b, "c": c, "M": M, "N": N, "K": K, "sam": a.stride(0), "sak": a.stride(1)}
    arguments |= {"sbk": b.stride(0), "sbn": b.stride(1), "scm": N}
    module = ptx.Module(kernel.asm["ptx"])
    module.launch("matmul_kernel", (2, 2), (128,), arguments, kernel.metadata.shared, poison=["c"], **options)
    if dtype == torch.float32:  # the tensor cores read 19 bits of a float
        a, b = ((x.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32) for x in (a, b))
    unit = torch.finfo(dtype).eps
    wide = a.double().numpy() @ b.double().numpy()
    np.testing.assert_allclose(c.double().numpy(), wide, rtol=unit, atol=1e-5 + unit / 8)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("name", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)]
)
def test_triton_matmul(ptx, triton_kernels, capability, name, dtype):
    kernel = triton_kernels.matmul(name, capability, num_stages=triton_kernels.right_stages(capability))
    assert ("wgmma" in kernel.asm["ptx"]) == (capability == 90)
    for trans_a, trans_b in [(False, False), (True, True)]:
        run_matmul(ptx, kernel, dtype, trans_a, trans_b)


# Rows of 32, 64 and 128 bytes in shared memory, which is how wgmma's swizzles are called; fp32 only where A and B are
# K-major, other layouts Triton brings into that form.
@pytest.mark.parametrize("depth", [16, 32, 64])
@pytest.mark.parametrize(("trans_a", "trans_b"), [(False, False), (False, True), (True, False), (True, True)])
def test_wgmma_swizzles_and_transposes(ptx, triton_kernels, depth, trans_a, trans_b):
    kernel = triton_kernels.matmul("bf16", 90, depth=depth)
    assert "wgmma" in kernel.asm["ptx"]
    run_matmul(ptx, kernel, torch.bfloat16, trans_a, trans_b)


def test_triton_half_accumulators_are_read_before_the_wait(ptx, triton_kernels):
    kernel = triton_kernels.matmul("fp16", 90, accumulator=triton_kernels.tl.float16)
    with pytest.raises(ptx.PTXError) as caught:
        run_matmul(ptx, kernel, torch.float16)
    assert caught.value.kind == "in-flight" and caught.value.source.startswith("triton_kernels.py:")
    # Sums rounded to a half at each of nine steps: compared with a wide tolerance.
    a, b, c = torch.randn(64, 136).half(), torch.randn(136, 64).half(), torch.empty(64, 64, dtype=torch.float16)
    ptx.Module(kernel.asm["ptx"]).launch(
        "matmul_kernel",
        (1, 1),
        (128,),
        [a, b, c, 64, 64, 136, 136, 1, 64, 1, 64],
        kernel.metadata.shared,
        serialised_accumulators=True,
    )
    np.testing.assert_allclose(c.float().numpy(), a.float().numpy() @ b.float().numpy(), atol=0.1)


@pytest.mark.parametrize(("capability", "warps"), [(80, 4), (90, 4), (90, 8)])
def test_attention_tile_within_a_second(ptx, triton_kernels, capability, warps):
    kernel = triton_kernels.attention("bf16", capability, warps, triton_kernels.right_stages(capability))
    torch.manual_seed(0)
    q, k, v = (torch.randn(n, 128).bfloat16() for n in (128, 1024, 1024))
    out, lse = torch.empty(128, 128, dtype=torch.bfloat16), torch.empty(128)
    scale = 128**-0.5
    arguments = {"q": q, "k": k, "v": v, "out": out, "lse": lse, "scale": scale / np.log(2), "n_q": 128, "n_k": 1024}
    module = ptx.Module(kernel.asm["ptx"])
    seconds = []
    for _ in range(2):
        start = time.process_time()
        result = module.launch(
            "attention_kernel", (1,), (32 * warps,), arguments, kernel.metadata.shared, poison=["out", "lse"]
        )
        seconds.append(time.process_time() - start)
    scores = q.double().numpy() @ k.double().numpy().T * scale
    wide = np.exp(scores)
    np.testing.assert_allclose(out.double().numpy(), wide / wide.sum(1, keepdims=True) @ v.double().numpy(), atol=2e-3)
    np.testing.assert_allclose(lse.numpy() * np.log(2), np.log(wide.sum(1)), atol=1e-4)
    assert result.tensor_operations == 4 * 128 * 1024 * 128
    assert min(seconds) < 1.0, f"{min(seconds):.2f} s"
