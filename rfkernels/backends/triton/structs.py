"""The structs that kernels take and device functions hand on. A field that is None is a constant to the compiler.

Fields are tensors and numbers where the host makes a struct, and Triton's values of them inside a kernel.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton.language as tl

NO_LAYERS = tl.constexpr(0)  # below Triton 3.8 a struct that holds None cannot be asked whether it is None


class Strided(NamedTuple):
    """A tensor ``[B, N, H, D]`` (``[L, B, N, H, D]`` where there is a stride of layers), the last stride being 1."""

    data: Any
    sample: Any
    token: Any
    head: Any
    layer: Any = NO_LAYERS


class KeyValues(NamedTuple):
    k: Strided
    v: Strided


class Cache(NamedTuple):
    """As `requests.CacheTensors`: sink_k and sink_v may be None."""

    k: Strided
    v: Strided
    sink_k: Strided | None
    sink_v: Strided | None


class Rope(NamedTuple):
    """As `requests.RopeTables`; pairs of the frame axis, and which elements make a pair, are constants."""

    frame_turns: Any
    spatial: Any
    frame_pairs: Any
    half_split: Any


class Mask(NamedTuple):
    """As `geometry.WindowMask`; own_chunk is a constant."""

    sink_tokens: Any
    window_tokens: Any
    chunk_tokens: Any
    first_chunk_tokens: Any
    own_chunk: Any


class Frames(NamedTuple):
    """seen: int64 [B], the frames of each stream so far, or None. tokens: of a frame. capacity: frames of the cache."""

    seen: Any
    tokens: Any
    capacity: Any


class Incoming(NamedTuple):
    """What the backward sweeps need of each query: the output's gradient; lse, delta and grad_lse ``[B, H, N]``.

    delta: as `backward.delta_kernel` leaves it, which is also where grad_lse may be None.
    """

    grad_out: Strided
    lse: Any
    delta: Any
    grad_lse: Any


# --- within a kernel --------------------------------------------------------------------------------------------------


class Columns(NamedTuple):
    """Where the columns of a tile lie in a head, and which of them exist (the others are padding)."""

    at: Any
    exist: Any


class Tile(NamedTuple):
    """The queries, or keys, of one head that a program owns. first: the token in the tensor that is row 0.

    row: 0, 1, ... in 32 bits; of queries, those past the end repeat the last one.
    """

    sample: Any
    head: Any
    first: Any
    row: Any


class Chunk(NamedTuple):
    """The open chunk of one stream: its first frame's number, and how many of its first tokens do not exist.

    Tokens are missing where a stream is younger than the chunk; then first_frame is negative. before: frames of the
    cache that come before the chunk's own keys (all valid ones, where the chunk's keys are in the cache).
    """

    first_frame: Any
    missing: Any
    before: Any


class Tokens(NamedTuple):
    """The tokens of one head: a pointer to the first, the distance from one to the next, and that to the next head."""

    first: Any
    step: Any
    head: Any


class Bounds(NamedTuple):
    """What a tile sweeps in one segment, keys or queries: [begin, end), of which [start, stop) needs no mask.

    end lies whole tiles after begin, or where nothing more exists. Row r of the tile sees [low[r], high[r]).
    """

    begin: Any
    start: Any
    stop: Any
    end: Any
    low: Any
    high: Any


class Terms(NamedTuple):
    """`Incoming` as loaded for a tile of queries; lse2: in base 2, and +inf where a row sees nothing."""

    grad_out: Any
    lse2: Any
    delta: Any
    grad_lse: Any
