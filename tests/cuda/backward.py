"""The ctypes mirror of csrc/cuda/attention/backward_params.h, and the attention backward on the emulator."""

from __future__ import annotations

import ctypes
import os
import subprocess
from ctypes import c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch

from cuda.launch import INSTANCES, SHORT, TYPES, AttentionProblem, Rows, problem

ROOT = Path(__file__).parents[2]


class DeltaParams(ctypes.Structure):
    _fields_ = [("out", Rows), ("grad_out", Rows), ("lse", c_void_p), ("grad_lse", c_void_p)]
    _fields_ += [(n, c_int64) for n in ("lse_batch", "lse_head", "lse_token")] + [("row_terms", c_void_p)]
    _fields_ += [(n, c_int32) for n in ("batch", "queries", "heads", "head_dim")]


class BackwardParams(ctypes.Structure):
    _fields_ = [("problem", AttentionProblem), ("sink_q", Rows), ("grad_out", Rows), ("row_terms", c_void_p)]
    _fields_ += [(n, c_void_p) for n in ("grad_q", "grad_k", "grad_v")]
    _fields_ += [(n, c_int32) for n in ("grad_q_type", "grad_k_type", "grad_v_type")]


class Launch(ctypes.Structure):
    _fields_ = [("blocks", c_int64), ("threads", c_int32), ("shared_bytes", c_int32)]


@cache
def plan() -> ctypes.CDLL:
    """The host's launch plan, compiled as it is."""
    library = ROOT / "build" / f"attention_plan.{os.getpid()}.so"
    library.parent.mkdir(exist_ok=True)
    compiler, source = os.environ.get("CXX", "g++"), Path(__file__).with_name("plan.cpp")
    try:
        subprocess.run([compiler, "-std=c++17", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
        loaded = ctypes.CDLL(str(library))
    finally:
        library.unlink(missing_ok=True)
    assert loaded.delta_params_bytes() == ctypes.sizeof(DeltaParams)
    assert loaded.backward_params_bytes() == ctypes.sizeof(BackwardParams)
    return loaded


def backward(cuda_module, grad_out, grad_lse, out, lse, q, sink_q, k, v, *, types, seed: int = 0, **options):
    """Gradients in ``types`` of q, k, v (kChunk: of own_k, own_v), and the counts of the grad_q and grad_kv launches.

    q, sink_q, k, own_k: rotated, in the dtype of v.
    """
    struct, tensors = problem(q, k, v, **options)
    batch, queries, heads, head_dim = q.shape
    row_terms = torch.empty(batch, heads, queries, 2)
    own = options.get("own_k", k)
    grads = {
        name: torch.empty(x.shape, dtype=dtype)
        for name, x, dtype in zip(("grad_q", "grad_k", "grad_v"), (q, own, own), types, strict=True)
    }

    def launch(module: str, entry: str, params, plan_name: str, plan_args: tuple, tensors: dict, poison: list):
        launch = Launch()
        getattr(plan(), plan_name)(ctypes.byref(params), *plan_args, ctypes.byref(launch))
        counts = cuda_module(module).launch(
            entry, (launch.blocks,), (launch.threads,), [bytes(params)], launch.shared_bytes, seed, tensors=tensors,
            poison=poison,
        )  # fmt: skip
        assert counts.unwritten == dict.fromkeys(poison, 0)
        return counts

    params = DeltaParams(
        Rows.of(out), Rows.of(grad_out), lse.data_ptr(), grad_lse.data_ptr(), *grad_lse.stride(), row_terms.data_ptr(),
        batch, queries, heads, head_dim,
    )  # fmt: skip
    given = {"out": out, "grad_out": grad_out, "lse": lse, "grad_lse": grad_lse, "row_terms": row_terms}
    short = SHORT[v.dtype]
    launch("attention/delta", f"rf_attention_delta_{short}", params, "delta_plan", (), given, ["row_terms"])

    params = BackwardParams(
        struct, Rows.of(sink_q), Rows.of(grad_out), row_terms.data_ptr(), *(x.data_ptr() for x in grads.values()),
        *(TYPES[dtype] for dtype in types),
    )  # fmt: skip
    tensors |= {"sink_q": sink_q, "grad_out": grad_out, "row_terms": row_terms} | grads
    tensors = {name: x for name, x in tensors.items() if x is not None}
    counts = [
        launch(
            f"{INSTANCES['sm80']}/backward_{short}_d{head_dim}", f"rf_attention_{name}_{short}_d{head_dim}", params,
            f"{name}_plan", (head_dim,), tensors, written,
        )
        for name, written in (("grad_q", ["grad_q"]), ("grad_kv", ["grad_k", "grad_v"]))
    ]  # fmt: skip
    return tuple(grads.values()), counts
