"""The ctypes mirror of csrc/cuda/attention/params.h, and launches of the attention kernels on the emulator."""

from __future__ import annotations

import ctypes
from ctypes import c_bool, c_float, c_int32, c_int64, c_void_p

import torch

from rfkernels.contract.geometry import WindowMask
from rfkernels.rope import RopeTables

TYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
SHORT = {torch.float16: "fp16", torch.bfloat16: "bf16"}
INSTANCES = {"sm80": "attention/sm80/instances", "sm90": "attention/sm90/instances"}
TILE_ROWS = 128
USES = {"prefix": 0, "chunk": 1, "window": 2}


class Rows(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("batch", c_int64), ("token", c_int64), ("head", c_int64)]

    @classmethod
    def of(cls, x: torch.Tensor | None) -> Rows:
        if x is None:
            return cls()
        assert x.stride(3) == 1 and x.data_ptr() % 16 == 0
        return cls(x.data_ptr(), x.stride(0), x.stride(1), x.stride(2))


class QueryRope(ctypes.Structure):
    _fields_ = [("frame_turns", c_void_p), ("spatial", c_void_p), ("frame_pairs", c_int32), ("half_split", c_int32)]


class Mask(ctypes.Structure):
    _fields_ = [(n, c_int64) for n in ("sink_tokens", "window_tokens", "chunk_tokens", "first_chunk_tokens")]
    _fields_ += [("own_chunk", c_bool)]


class AttentionProblem(ctypes.Structure):
    _fields_ = [(n, Rows) for n in ("q", "k", "v", "own_k", "own_v")] + [
        ("num_frames", c_void_p), ("rope", QueryRope), ("mask", Mask), ("frame_tokens", c_int64), ("capacity", c_int64),
        *((n, c_int32) for n in ("batch", "queries", "keys", "heads", "kv_heads", "use", "q_type")), ("scale", c_float),
    ]  # fmt: skip


class ForwardParams(ctypes.Structure):
    _fields_ = [("problem", AttentionProblem)]
    _fields_ += [(n, c_void_p) for n in ("out", "lse", "parts", "part_lse")]
    _fields_ += [(n, c_int32) for n in ("whole", "shares", "row_blocks")]


class MergeParams(ctypes.Structure):
    _fields_ = [(n, c_void_p) for n in ("parts", "part_lse", "out", "lse")]
    _fields_ += [(n, c_int32) for n in ("whole", "shares", "row_blocks", "queries", "heads", "head_dim")]


def problem(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    own_k: torch.Tensor | None = None,
    own_v: torch.Tensor | None = None,
    num_frames: torch.Tensor | None = None,
    rope: RopeTables | None = None,
    mask: WindowMask | None = None,
    frame_tokens: int = 1,
    capacity: int = 0,
    scale: float = 1.0,
) -> tuple[AttentionProblem, dict[str, torch.Tensor]]:
    """The struct, and the tensors that it points to by name."""
    use = "window" if mask is not None else "prefix" if own_k is None else "chunk"
    tensors = {"q": q, "k": k, "v": v, "own_k": own_k, "own_v": own_v, "num_frames": num_frames}
    tables = QueryRope()
    if rope is not None:
        tensors |= {"frame_turns": rope.frame_turns, "spatial": rope.spatial}
        pairs = rope.frame_turns.shape[0]
        tables = QueryRope(rope.frame_turns.data_ptr(), rope.spatial.data_ptr(), pairs, rope.half_split)
        frame_tokens = rope.frame_tokens
    struct = AttentionProblem(
        *(Rows.of(x) for x in (q, k, v, own_k, own_v)), None if num_frames is None else num_frames.data_ptr(), tables,
        Mask(*(mask or (0, 0, 1, 1, True))), frame_tokens, capacity, q.shape[0], q.shape[1], k.shape[1], q.shape[2],
        k.shape[2], USES[use], TYPES[q.dtype], scale,
    )  # fmt: skip
    return struct, {name: x for name, x in tensors.items() if x is not None}


def forward(cuda_module, q, k, v, *, whole: int | None = None, shares: int = 1, keys: int = 0, hopper: bool = False,
            seed: int = 0, module=None, **options):  # fmt: skip
    """out, lse and the counts of the forward kernel; the keys of tiles from ``whole`` on are shared and merged.

    keys: 32 for the kernel of small multiprocessors at head_dim 128; hopper: the kernel for sm_90a.
    """
    struct, tensors = problem(q, k, v, **options)
    batch, queries, heads, head_dim = q.shape
    name = f"{SHORT[v.dtype]}_d{head_dim}"
    if hopper:
        entry, threads, tile_keys = f"rf_attention_forward_hopper_{name}", 384, 64 if head_dim == 256 else 128
        shared_bytes = 2 * head_dim * (TILE_ROWS + 4 * tile_keys) + 64
    else:
        small = head_dim == 128 and keys == 32
        tile_keys = 32 if small or head_dim == 256 else 64
        entry, threads = f"rf_attention_forward_{name}" + ("_k32" if small else ""), 256 if head_dim == 256 else 128
        shared_bytes = 2 * head_dim * (TILE_ROWS + 2 * tile_keys) + 32
    row_blocks = -(-queries // TILE_ROWS)
    row_tiles = row_blocks * heads * batch
    whole = (row_tiles if shares == 1 else 0) if whole is None else whole
    results = {"out": torch.empty(q.shape, dtype=v.dtype), "lse": torch.empty(batch, heads, queries)}
    tail = {
        "parts": torch.empty(row_tiles - whole, shares, TILE_ROWS, head_dim),
        "part_lse": torch.empty(row_tiles - whole, shares, TILE_ROWS),
    }
    params = ForwardParams(struct, *(x.data_ptr() for x in (results | tail).values()), whole, shares, row_blocks)
    module = module or cuda_module(f"{INSTANCES['sm90' if hopper else 'sm80']}/forward_{name}")
    written = results | (tail if whole < row_tiles else {})
    counts = module.launch(
        entry, (whole + (row_tiles - whole) * shares,), (threads,), [bytes(params)], shared_bytes, seed,
        tensors=tensors | written, poison=list(written),
    )  # fmt: skip
    rows = merged_rows(whole, row_blocks, heads, batch, queries)
    left = {name: bytes_of(x) * rows // (batch * queries * heads) for name, x in results.items()}
    assert counts.unwritten == {name: left.get(name, 0) for name in written}
    if whole < row_tiles:
        merge(cuda_module, tail, results, whole)
    return *results.values(), counts


def merged_rows(whole: int, row_blocks: int, heads: int, batch: int, queries: int) -> int:
    """Rows of the tiles after the first ``whole`` ones."""
    last = queries - (row_blocks - 1) * TILE_ROWS
    return sum(
        last if i % row_blocks == row_blocks - 1 else TILE_ROWS for i in range(whole, row_blocks * heads * batch)
    )


def merge(cuda_module, tail: dict[str, torch.Tensor], results: dict[str, torch.Tensor], whole: int) -> None:
    """Joins the parts into ``results``, of which everything else stays as it is."""
    batch, queries, heads, head_dim = results["out"].shape
    joined = {name: torch.empty_like(x) for name, x in results.items()}
    tensors, row_blocks = tail | joined, -(-queries // TILE_ROWS)
    shares = tail["parts"].shape[1]
    params = MergeParams(*(x.data_ptr() for x in tensors.values()), whole, shares, row_blocks, queries, heads, head_dim)
    counts = cuda_module("attention/merge").launch(
        f"rf_attention_merge_{SHORT[results['out'].dtype]}", (len(tail["parts"]) * TILE_ROWS // 8,), (256,),
        [bytes(params)], tensors=tensors, poison=list(joined),
    )  # fmt: skip
    rows = merged_rows(whole, row_blocks, heads, batch, queries)
    for name, x in results.items():
        assert counts.unwritten[name] == bytes_of(x) - bytes_of(x) * rows // (batch * queries * heads)
        x.copy_(x.where(~x.isnan(), joined[name]))


def bytes_of(x: torch.Tensor) -> int:
    return x.numel() * x.element_size()
