"""Triton kernels for the emulator's tests, compiled ahead of time: no GPU and no driver is needed for the PTX."""

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rfkernels.backends.triton.tiles import COPIES_ARE_FENCED


@triton.jit
def add_kernel(x, y, out, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    tl.store(out + offsets, tl.load(x + offsets, mask=mask) + tl.load(y + offsets, mask=mask), mask=mask)


@triton.jit
def softmax_kernel(x, out, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    offsets = tl.arange(0, BLOCK)
    mask = offsets < columns
    values = tl.load(x + row * columns + offsets, mask=mask, other=float("-inf")).to(tl.float32)
    values = tl.exp(values - tl.max(values, axis=0))
    tl.store(out + row * columns + offsets, values / tl.sum(values, axis=0), mask=mask)


@triton.jit
def matmul_kernel(
    a, b, c, M, N, K, sam, sak, sbk, sbn, scm, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ACC: tl.constexpr
):
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    inner = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), dtype=ACC)
    for k in range(0, K, BK):
        left = tl.load(
            a + rows[:, None] * sam + (k + inner)[None, :] * sak,
            mask=(rows[:, None] < M) & (k + inner[None, :] < K),
            other=0.0,
        )
        right = tl.load(
            b + (k + inner)[:, None] * sbk + columns[None, :] * sbn,
            mask=(k + inner[:, None] < K) & (columns[None, :] < N),
            other=0.0,
        )
        acc = tl.dot(left, right, acc, input_precision="tf32", out_dtype=ACC)
    mask = (rows[:, None] < M) & (columns[None, :] < N)
    tl.store(c + rows[:, None] * scm + columns[None, :], acc.to(c.dtype.element_ty), mask=mask)


@triton.jit
def attention_kernel(q, k, v, out, lse, scale, n_q, n_k, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr):
    """One head, rows of D contiguous elements; scale includes log2(e)."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    dims = tl.arange(0, D)
    queries = tl.load(q + rows[:, None] * D + dims[None, :], mask=rows[:, None] < n_q, other=0.0)
    top = tl.full([BM], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BM], dtype=tl.float32)
    acc = tl.zeros([BM, D], dtype=tl.float32)
    for start in range(0, n_k, BN):
        keys = start + tl.arange(0, BN)
        kt = tl.load(k + keys[None, :] * D + dims[:, None], mask=keys[None, :] < n_k, other=0.0)
        scores = tl.dot(queries, kt) * scale
        scores = tl.where(keys[None, :] < n_k, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp2(scores - new_top[:, None])
        factor = tl.exp2(top - new_top)
        total = total * factor + tl.sum(p, 1)
        values = tl.load(v + keys[:, None] * D + dims[None, :], mask=keys[:, None] < n_k, other=0.0)
        acc = tl.dot(p.to(values.dtype), values, acc * factor[:, None])
        top = new_top
    acc = acc / total[:, None]
    tl.store(out + rows[:, None] * D + dims[None, :], acc.to(out.dtype.element_ty), mask=rows[:, None] < n_q)
    tl.store(lse + rows, top + tl.log2(total), mask=rows < n_q)


def compile_ptx(kernel, signature: dict, constants: dict, capability: int, **options):
    """The compiled kernel: ``.asm["ptx"]``, ``.metadata.name``, ``.metadata.shared``, ``.metadata.num_warps``."""
    full = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    constexprs = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    # Pointers from torch are at least 16-byte aligned; the launcher of Triton says so to the compiler, and so do we.
    attrs = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(full) if str(full[name]).startswith("*")}
    source = ASTSource(kernel, full, constexprs, attrs)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def right_stages(capability: int) -> int:
    """3, or where wgmma would read what cp.async wrote without a fence: 1, for which tiles go through registers."""
    return 3 if capability != 90 or COPIES_ARE_FENCED else 1


TYPES = {"fp16": "*fp16", "bf16": "*bf16", "fp32": "*fp32"}


def matmul(dtype: str, capability: int, accumulator=tl.float32, depth: int = 32, **options):
    """matmul_kernel with tiles of 64 x 64 x depth.

    Arguments: a, b, c, M, N, K, strides of a, strides of b, row stride of c.
    """
    signature = dict.fromkeys(("a", "b", "c"), TYPES[dtype])
    signature |= dict.fromkeys(("M", "N", "K", "sam", "sak", "sbk", "sbn", "scm"), "i32")
    constants = {"BM": 64, "BN": 64, "BK": depth, "ACC": accumulator}
    return compile_ptx(matmul_kernel, signature, constants, capability, **options)


def attention(dtype: str, capability: int, num_warps: int = 4, num_stages: int = 3):
    signature = dict.fromkeys(("q", "k", "v", "out"), TYPES[dtype])
    signature |= {"lse": "*fp32", "scale": "fp32", "n_q": "i32", "n_k": "i32"}
    constants = {"BM": 128, "BN": 64, "D": 128}
    return compile_ptx(attention_kernel, signature, constants, capability, num_warps=num_warps, num_stages=num_stages)
