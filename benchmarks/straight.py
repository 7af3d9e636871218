"""The shortest way through the main loop of a kernel's machine code: a tile that needs no mask and no rescaling.

Every detour of such a loop (a mask, a raised shift, the rescaling, a wait that has to be repeated) is a branch around
code or out of the loop, so the way with the fewest instructions is that of an interior tile.
"""

from __future__ import annotations

import re
from collections import Counter

_LINE = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
_TENSOR, _SPECIAL, _COPY = re.compile(r"HG?MMA"), re.compile(r"MUFU"), re.compile(r"LDGSTS")
_WAIT = re.compile(r"WARPGROUP\.DEPBAR")  # for wgmma's products


def instructions(sass: str) -> list[tuple[int, str, bool, int | None]]:
    """Address, opcode, whether it may be passed over, target of a branch: of one kernel by ``cuobjdump -sass``."""
    found = []
    for address, predicate, opcode, rest in _LINE.findall(sass):
        target = re.search(r"0x([0-9a-f]+)", rest) if opcode.startswith("BRA") else None
        conditional = bool(predicate) or bool(re.search(r"\bU?P\d", rest))
        found.append((int(address, 16), opcode, conditional, int(target[1], 16) if target else None))
    return found


def main_loop(code: list, what: re.Pattern = _TENSOR) -> tuple[int, int]:
    """First and last index of the loop of the products, or of another kind of instruction: the innermost that is not a
    detour, with less than half of what the loop around it has.

    Its last instruction may be passed over; a jump back is the end of a detour that was moved out of the loop.
    """
    index = {address: i for i, (address, *_) in enumerate(code)}
    back = [(i, target) for i, (address, _, maybe, target) in enumerate(code) if maybe and target and target < address]
    loops = [(index[target], i) for i, target in back]

    def count(loop: tuple[int, int]) -> int:
        return sum(bool(what.match(opcode)) for _, opcode, *_ in code[loop[0] : loop[1] + 1])

    innermost = [
        a
        for a in loops
        if not any(a != b and a[0] <= b[0] and b[1] <= a[1] and 2 * count(b) >= count(a) for b in loops)
    ]
    return max(innermost, key=count)


def shortest_way(code: list, what: re.Pattern = _TENSOR) -> list[str]:
    """Opcodes of one turn of a loop: of the ways with the most products (or copies), the one with the fewest."""
    begin, end = main_loop(code, what)
    index = {address: i for i, (address, *_) in enumerate(code)}
    # Products from here on, less than 0; instructions from here on; which is next.
    ways: dict[int, tuple[int, int, int | None]] = {end: (0, 1, None)}
    for i in range(end - 1, begin - 1, -1):
        _, opcode, conditional, target = code[i]
        following = [] if target is not None and not conditional else [i + 1]
        if target is not None:
            following.append(index[target])
        here = bool(what.match(opcode))
        known = [(ways[n][0] - here, ways[n][1] + 1, n) for n in following if i < n <= end and n in ways]
        if known:
            ways[i] = min(known)
    way, at = [], begin
    while at is not None:
        way.append(code[at][1])
        at = ways[at][2]
    return way


def row(sass: str, scores: int) -> dict:
    """Instructions of a consumer's warp for one tile, and beside the products per score; those of producers apart.

    overlapped: of the special ones (the softmax's exponentials), those between the start of the last products and the
    last wait for products: they run beside the tensor cores. scores: that a thread of a consumer forms in a tile. A
    kernel with as many warps of producers as half its consumers.
    """
    code = instructions(sass)
    way = shortest_way(code)
    started = max((i for i, x in enumerate(way) if _TENSOR.match(x)), default=0)
    waited = max((i for i, x in enumerate(way) if _WAIT.match(x)), default=0)
    overlapped = sum(bool(_SPECIAL.match(x)) for x in way[started:waited])
    counts = Counter("tensor" if _TENSOR.match(x) else "special" if _SPECIAL.match(x) else "other" for x in way)
    copies = shortest_way(code, _COPY)
    return {kind: counts[kind] for kind in ("tensor", "special", "other")} | {
        "overlapped": overlapped,
        "per_score": round((len(way) - counts["tensor"]) / scores, 2),
        "copies_per_score": round(len(copies) / 2 / scores, 2),
    }
