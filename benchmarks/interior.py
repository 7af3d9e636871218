"""The attention forward's main loop: machine instructions beside counts of the PTX emulator, without a GPU.

``python -m benchmarks.cuda_report --interior``. One block of 128 queries over 1024 keys, every tile seen whole, runs on
the emulator (tests/ptx), which counts how often each basic block of the PTX runs. What counts is the machine code that
ptxas made of that PTX: a sum over its loop's basic blocks, instructions times how often the block runs.

Which block of the machine code is which? Instructions that ptxas neither adds nor drops (products, copies to shared
memory, exponentials, votes, ...) are *landmarks*: both sides have them, with the source line and the line that called
it. A block of the machine code runs as often as the PTX blocks of its landmarks; where a line stands in several PTX
blocks that run differently often, their order decides. The others follow from the flow, since a block runs as often as
it is entered and left; where the flow leaves a choice (the mask's blocks), a block runs as often as all PTX
instructions of its lines do. The flow must hold at every block, and landmarks must add up to what the emulator counted;
where anything contradicts or stays open, `Unclear` says what.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.aot import TOOLS

TESTS = Path(__file__).parents[1] / "tests"
BASELINE = Path(__file__).parent / "cuda_interior.json"
QUERIES, KEYS = 128, 1024

# A landmark's opcode in PTX and in the machine code.
LANDMARKS = {
    "product": (r"mma\.", r"HMMA"),
    "operands": (r"ldmatrix", r"LDSM"),
    "copy": (r"cp\.async\.c[ag]", r"LDGSTS"),
    "commit": (r"cp\.async\.commit", r"LDGDEPBAR"),
    "wait": (r"cp\.async\.wait", r"DEPBAR"),
    "barrier": (r"bar(rier)?\.sync", r"BAR\."),
    "exponential": (r"ex2\.", r"MUFU\.EX2"),
    "pack": (r"cvt\.rn\.(bf16|f16)x2\.f32", r"F2FP"),
    "vote": (r"vote", r"VOTE\."),
    "shuffle": (r"shfl", r"SHFL"),
}
_MEMORY, _BARRIER = re.compile(r"LD|ST|ATOM|RED\b"), re.compile(r"BAR|DEPBAR|WARPSYNC|LDGDEPBAR")


class Unclear(RuntimeError):
    """The machine code cannot be matched with the counts."""


@dataclass(frozen=True)
class Instruction:
    opcode: str
    predicated: bool
    where: tuple  # (file, line) of the source, and of the call that brought it there
    landmark: str | None


@dataclass
class Block:
    instructions: list[Instruction] = field(default_factory=list)
    successors: list[int | None] = field(default_factory=list)  # None: leaves the kernel
    executed: int | None = None

    def lines(self, landmark: str | None = None) -> set[tuple]:
        """Lines of instructions that run whenever the block does: all, or those of one kind of landmark."""
        return {i.where for i in self.instructions if not i.predicated and landmark in (None, i.landmark)}


def _landmark(opcode: str, side: int) -> str | None:
    return next((name for name, patterns in LANDMARKS.items() if re.match(patterns[side], opcode)), None)


# --- the two sides ----------------------------------------------------------------------------------------------------


def _linked(blocks: list[Block], targets: list[list[str]], falls: list[bool], labels: dict[str, int]) -> list[Block]:
    for i, block in enumerate(blocks):
        block.successors = [labels[target] for target in targets[i]]
        if falls[i]:
            block.successors.append(i + 1 if i + 1 < len(blocks) else None)
        elif not targets[i]:
            block.successors.append(None)
    return blocks


def machine_code(text: str, kernel: str) -> list[Block]:
    """Basic blocks of a kernel in the output of ``nvdisasm -c -gi``."""
    found = re.search(rf"^\.text\.{kernel}:$(.*?)(?=^\s*//-+ \.|\Z)", text, re.S | re.M)
    if not found:
        raise Unclear(f"the disassembly has no {kernel}")
    blocks, targets, falls, labels = [], [], [], {}
    where, fresh = [], True
    for line in found[1].splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(blocks)
            fresh = True
        elif at := re.match(r'\s*//## File "(?:[^"]*/)?([^"/]+)", line (\d+)', line):
            if not where or where[-1] is None:
                where = []
            where.append((at[1], int(at[2])))
            if "inlined at" not in line:
                where.append(None)  # the chain ends here
        elif code := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", line):
            if fresh:
                blocks.append(Block())
                targets.append([])
                falls.append(True)
                fresh = False
            predicate, opcode, rest = code[1], code[2], code[3]
            chain = tuple(x for x in where if x)[:2]
            blocks[-1].instructions.append(Instruction(opcode, bool(predicate), chain, _landmark(opcode, 1)))
            target = re.search(r"\(\s*(\.L_x_\d+)\)", rest)
            if re.match(r"BRA|EXIT|RET|CALL", opcode):
                if target:
                    targets[-1].append(target[1])
                returns = opcode.startswith("CALL") and not target  # of a subroutine; to a label it is a jump
                falls[-1] = bool(predicate or returns or ".DIV" in opcode or re.search(r"\bU?P\d", rest))
                fresh = True
    return _linked(blocks, targets, falls, labels)


def _sources(ptx: str) -> list[tuple]:
    """Of every line of PTX: where its code comes from."""
    files = dict(re.findall(r'^\s*\.file\s+(\d+)\s+"(?:[^"]*/)?([^"/]+)"', ptx, re.M))
    found, where = [], ()
    for line in ptx.splitlines():
        if at := re.match(r"\s*\.loc\s+(\d+) (\d+) \d+(?:.*inlined_at (\d+) (\d+))?", line):
            where = ((files[at[1]], int(at[2])),)
            if at[3]:
                where += ((files[at[3]], int(at[4])),)
        found.append(where)
    return found


def counted(ptx: str, rows: Sequence[tuple]) -> list[Block]:
    """Basic blocks of the PTX that the emulator ran, from its rows of instructions."""
    text, sources = ptx.splitlines(), _sources(ptx)
    blocks, targets, falls, labels = [], [], [], {}
    fresh = True
    for name, _category, line, _source, executed, _lanes, _conflicts, opcode, label in rows:
        if fresh or label:
            if label:
                labels[label] = len(blocks)
            blocks.append(Block(executed=executed))
            targets.append([])
            falls.append(True)
        predicate = text[line - 1].strip().startswith("@")
        blocks[-1].instructions.append(Instruction(name, predicate, sources[line - 1], _landmark(name, 0)))
        fresh = opcode in ("bra", "ret", "exit")
        if fresh:
            if opcode == "bra":
                targets[-1].append(re.search(r"bra(?:\.uni)?\s+([\w$]+)", text[line - 1])[1])
            falls[-1] = predicate
    return _linked(blocks, targets, falls, labels)


def loop(blocks: list[Block]) -> list[int]:
    """The innermost loop that holds every product: indices of its blocks, the first of which is where it is entered.

    Raises:
        Unclear: there is none.
    """
    products = {i for i, block in enumerate(blocks) if any(x.landmark == "product" for x in block.instructions)}
    predecessors = defaultdict(list)
    for i, block in enumerate(blocks):
        for successor in block.successors:
            predecessors[successor].append(i)
    bodies = []
    for i, block in enumerate(blocks):
        for header in block.successors:
            if header is None or header > i:
                continue
            body, open_ = {header}, [i]
            while open_:
                at = open_.pop()
                if at not in body:
                    body.add(at)
                    open_ += predecessors[at]
            if products <= body:
                bodies.append([header, *sorted(body - {header})])
    if not products or not bodies:
        raise Unclear("no loop holds the products")
    return min(bodies, key=len)


# --- the match --------------------------------------------------------------------------------------------------------


def _votes(machine: list[Block], ptx: list[Block]) -> list[dict]:
    """For each block of the machine code: by landmark and line, how often it runs.

    ptxas now and then gives an instruction its neighbour's line: for a block that nothing else says anything about,
    its landmarks alone speak (line None), where as many blocks have one on both sides.
    """
    votes: list[dict] = [{} for _ in machine]

    def vote(landmark: str, line: tuple | None, here: list[int], there: list[int], heard: list[int]) -> None:
        if len(set(there)) == 1:
            there = there[:1] * len(here)
        if len(here) == len(there):
            for i, executed in zip(here, there, strict=True):
                if i in heard:
                    votes[i][landmark, line] = executed

    for landmark in LANDMARKS:
        for line in set().union(*(block.lines(landmark) for block in machine)):
            here = [i for i, block in enumerate(machine) if line in block.lines(landmark)]
            there = [b.executed for b in ptx if any(x.where == line and x.landmark == landmark for x in b.instructions)]
            vote(landmark, line, here, there, here)
    silent = [i for i, said in enumerate(votes) if not said]
    for landmark in LANDMARKS:
        here = [i for i, block in enumerate(machine) if block.lines(landmark)]
        vote(landmark, None, here, [b.executed for b in ptx if b.lines(landmark)], silent)
    return votes


def _by_lines(block: Block, ptx: list[Block]) -> int | None:
    """How often a block without landmarks runs, if all PTX instructions of its lines run equally often."""
    lines = block.lines()
    executed = {b.executed for b in ptx if lines & {x.where for x in b.instructions}}
    return executed.pop() if len(executed) == 1 else None


def _flow(machine: list[Block], body: list[int], counts: dict[int, int | None], entered: int, guess: Callable) -> None:
    """Fills in what follows from the others: a block runs as often as it is entered and left. Where nothing follows any
    more, ``guess`` may set another count.

    Raises:
        Unclear: a block does not, or remains open.
    """
    edges = [(i, s if s in counts else None) for i in body for s in machine[i].successors]
    flow: dict[int, int | None] = dict.fromkeys(range(len(edges)))
    changed = True
    while changed or guess(counts):
        changed = False
        for i in body:
            sides = [
                ([e for e, (_, to) in enumerate(edges) if to == i], entered if i == body[0] else 0),
                ([e for e, (source, _) in enumerate(edges) if source == i], 0),
            ]
            for side, more in sides:
                open_ = [e for e in side if flow[e] is None]
                known = more + sum(flow[e] for e in side if flow[e] is not None)
                if not open_ and counts[i] is None:
                    counts[i], changed = known, True
                elif not open_ and counts[i] != known:
                    raise Unclear(f"block {i} runs {counts[i]} times and is entered or left {known} times")
                elif len(open_) == 1 and counts[i] is not None:
                    flow[open_[0]], changed = counts[i] - known, True
                elif open_ and counts[i] == known:
                    flow |= dict.fromkeys(open_, 0)
                    changed = True
    if negative := [edges[e] for e, x in flow.items() if x is not None and x < 0]:
        raise Unclear(f"edges taken less than never: {negative}")
    if unknown := [i for i in body if counts[i] is None]:
        raise Unclear(f"nothing says how often blocks {unknown} run")


def block_counts(machine: list[Block], ptx: list[Block]) -> dict[int, int]:
    """How often each block of the machine code's main loop runs.

    Raises:
        Unclear: as the module's text says.
    """
    body, ptx_body = loop(machine), loop(ptx)
    inside = [ptx[i] for i in ptx_body]
    votes = _votes([machine[i] for i in body], inside)
    counts: dict[int, int | None] = {}
    for i, said in zip(body, votes, strict=True):
        if len(set(said.values())) > 1:
            raise Unclear(f"block {i} of the machine code: its landmarks run differently often: {said}")
        counts[i] = next(iter(said.values())) if said else None

    def by_lines(counts: dict[int, int | None]) -> bool:
        for i in body:
            if counts[i] is None:
                counts[i] = _by_lines(machine[i], inside)
                if counts[i] is not None:
                    return True
        return False

    _flow(machine, body, counts, ptx[0].executed, by_lines)  # every warp enters once: a prefix is one segment
    for landmark in LANDMARKS:
        if any(x.predicated for i in body for x in machine[i].instructions if x.landmark == landmark):
            continue
        ours = sum(counts[i] * sum(x.landmark == landmark for x in machine[i].instructions) for i in body)
        theirs = sum(b.executed * sum(x.landmark == landmark for x in b.instructions) for b in inside)
        if ours != theirs:
            raise Unclear(f"{landmark}: {ours} by the machine code's blocks, {theirs} counted")
    return counts


# --- the figure -------------------------------------------------------------------------------------------------------


def compiled(nvcc: str, flags: Sequence[str], source: Path, arch: int) -> tuple[str, str]:
    """PTX and disassembly of one compilation, both with source lines."""
    with tempfile.TemporaryDirectory() as folder:
        gencode = f"-gencode=arch=compute_{arch},code=sm_{arch}"
        keep = ["-lineinfo", "-keep", f"-keep-dir={folder}", "-cubin", str(source), "-o", f"{folder}/out.cubin"]
        done = subprocess.run([nvcc, *flags, gencode, *keep], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"nvcc failed on {source}:\n{done.stderr}")
        (ptx,) = (path.read_text() for path in Path(folder).glob("*.ptx"))
        command = [str(TOOLS / "nvdisasm"), "-c", "-gi", f"{folder}/out.cubin"]
        return ptx, subprocess.run(command, capture_output=True, text=True, check=True).stdout


def inputs(head_dim: int, rising: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v of one head. Rising: the scores of every tile pass those before it by 11 binary digits or more."""
    torch.manual_seed(0)
    q = torch.randn(1, QUERIES, 1, head_dim).bfloat16()
    k, v = (torch.randn(1, KEYS, 1, head_dim).bfloat16() for _ in range(2))
    if rising:
        q, k = torch.ones_like(q), (1.0 + torch.arange(KEYS) // 32)[None, :, None, None].expand_as(k).bfloat16()
    return q, k, v


def emulate(ptx, head_dim: int, keys: int, rising: bool):
    """out, lse and counts of one block of queries that sees every key.

    ptx: text, or a module of the emulator, which is in tests/.
    """
    if str(TESTS) not in sys.path:
        sys.path.insert(0, str(TESTS))
    from ptx import emulator

    # By path: the name `cuda` may belong to NVIDIA's package by now.
    spec = importlib.util.spec_from_file_location("attention_launch", TESTS / "cuda" / "launch.py")
    launch = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(launch)
    q, k, v = inputs(head_dim, rising)
    frames = torch.tensor([KEYS // QUERIES])
    return launch.forward(
        None, q, k, v, num_frames=frames, frame_tokens=QUERIES, capacity=KEYS // QUERIES, scale=head_dim**-0.5,
        keys=keys, module=emulator.Module(ptx) if isinstance(ptx, str) else ptx,
    )  # fmt: skip


def mix(machine: list[Block], counts: dict[int, int]) -> dict[str, float]:
    """Instructions for a thread's scores of one tile by kind, and those beside the products per score."""
    kinds: Counter[str] = Counter()
    for i, executed in counts.items():
        for x in machine[i].instructions:
            kind = (
                "tensor" if x.landmark == "product" else "special" if x.opcode.startswith("MUFU") else
                "barrier" if _BARRIER.match(x.opcode) else "memory" if _MEMORY.match(x.opcode) else
                "idle" if x.opcode == "NOP" else "other"
            )  # fmt: skip
            kinds[kind] += executed
    turns = max(counts.values())
    per_score = (sum(kinds.values()) - kinds["tensor"]) * 32 / (QUERIES * KEYS)
    order = ("tensor", "memory", "special", "barrier", "idle", "other")
    return {kind: round(kinds[kind] / turns, 1) for kind in order} | {"per_score": round(per_score, 2)}


def row(kernel: str, head_dim: int, ptx: str, disassembly: str) -> dict:
    """The figures of one kernel: on random inputs, and on inputs that ask for a rescaling in every tile.

    Raises:
        Unclear: the machine code's blocks cannot be matched with those that the emulator counted.
    """
    machine, found = machine_code(disassembly, kernel), {}
    keys = 32 if kernel.endswith("_k32") or head_dim > 128 else 64
    for name, rising in (("loop", False), ("rescaled", True)):
        rows = emulate(ptx, head_dim, keys, rising)[2].instructions
        found[name] = mix(machine, block_counts(machine, counted(ptx, rows)))
    return {"kernel": kernel, "tile": [QUERIES, keys], "warps": 8 if head_dim > 128 else 4} | found


def show(rows: list[dict]) -> None:
    for r in rows:
        loop, rescaled = r["loop"], r["rescaled"]["per_score"]
        kinds = " ".join(f"{kind} {count}" for kind, count in loop.items() if kind != "per_score")
        print(
            f"{r['kernel']:34s} {loop['per_score']:5.2f} a score, {rescaled:5.2f} with every tile rescaled; "
            f"of one tile of {r['tile'][1]} keys: {kinds}"
        )
