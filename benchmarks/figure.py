"""Where the time of one chunk of the 1.3B model goes, beside the least that the machine needs for it, and what 60
frames/s ask of each part."""

from __future__ import annotations

from dataclasses import dataclass

from rfkernels.models.config import PRESETS

from .cases import CASES, Work

PRESET = "wan2.1-t2v-1.3b"
PUBLISHED_FPS = 23.1  # one H100 (arXiv 2512.04678)
WANTED_FPS = 60.0
PICTURES = 12  # of a chunk: the VAE makes four of a latent frame

# Phases of `bench model`, a pass each but for the last, and the parts of the budget that they hold.
PHASES = {
    "projections": ("projections (q, k, v, o; cross-attention q, o)",),
    "attention": ("self-attention, window and sink",),
    "cache: write": (),  # within self-attention, which the budget counts whole
    "cross-attention": ("cross-attention to 512 text tokens",),
    "feed-forward": ("feed-forward",),
    "rest": ("patches and head", "norms, modulation, residuals"),
    "cache: begin_chunk, once a chunk": ("begin_chunk",),
}


@dataclass(frozen=True)
class Machine:
    """What it does at most: products of bfloat16 matrices in TFLOP/s, memory in GB/s."""

    name: str
    tflops: float
    gbps: float

    @classmethod
    def measured(cls, run: dict) -> Machine:
        """By the ceilings of a saved benchmark."""
        rows = run["ceilings"]
        return cls(run["environment"].get("gpu", "CPU"), rows["bfloat16"]["TFLOP/s"], rows["copy"]["GB/s"])

    def milliseconds(self, work: Work) -> float:
        return max(work.flops / self.tflops / 1e9, work.bytes / self.gbps / 1e6)


def chunk_budget() -> dict[str, Work]:
    """One chunk of three latent frames of the 1.3B model, all five passes, text already encoded."""
    config, case = PRESETS[PRESET], CASES["paper"]
    tokens, dim, ffn, size = case.queries, config.dim, config.ffn_dim, 2
    activation = tokens * dim * size

    def linear(inputs: int, outputs: int, rows: int = tokens) -> Work:
        return Work(2.0 * rows * inputs * outputs, size * (inputs * outputs + rows * (inputs + outputs)))

    cross = Work(4.0 * tokens * config.text_len * dim, 2 * activation + 2 * config.text_len * dim * size)
    patch = config.in_channels * 4
    layer = {
        "projections (q, k, v, o; cross-attention q, o)": linear(dim, dim).times(6),
        "self-attention, window and sink": case.attention(),
        "cross-attention to 512 text tokens": cross,
        "feed-forward": linear(dim, ffn) + linear(ffn, dim),
    }
    parts = {name: work.times(config.num_layers * case.passes) for name, work in layer.items()}
    parts["begin_chunk"] = case.begin_chunk()
    parts["patches and head"] = (linear(patch, dim) + linear(dim, patch)).times(case.passes)
    # Norms, modulation and residuals, unfused from each other but each one pass: 6 reads and 3 writes of the tokens.
    parts["norms, modulation, residuals"] = Work(0.0, 9.0 * activation).times(config.num_layers * case.passes)
    return parts


def table(machine: Machine, phases: dict | None = None) -> list[str]:
    """The parts of a chunk: their floor, what each may take at 60 frames/s, and, with ``phases``, what it took.

    The time that 60 frames/s leave is shared in proportion to the floors. phases: of `benchmarks.model.phases`.
    """
    budget = chunk_budget()
    floors = {name: machine.milliseconds(work) for name, work in budget.items()}
    total, wanted = sum(floors.values()), 1000 * PICTURES / WANTED_FPS
    lines = [
        f"| part of a chunk | TFLOP | GB | {machine.name} at least, ms | at {WANTED_FPS:.0f} frames/s, ms |"
        + (" measured, ms | must be faster by |" if phases else ""),
        "|---|---|---|---|---|" + ("---|---|" if phases else ""),
    ]
    took_all = 0.0
    for name, parts in PHASES.items():
        if not parts:
            continue
        work = sum((budget[part] for part in parts[1:]), budget[parts[0]])
        floor = sum(floors[part] for part in parts)
        allowed = wanted * floor / total
        cells = [
            ", ".join(parts),
            f"{work.flops / 1e12:.2f}",
            f"{work.bytes / 1e9:.1f}",
            f"{floor:.1f}",
            f"{allowed:.1f}",
        ]
        if phases:
            took = _measured(name, phases)
            took_all += took
            cells += [f"{took:.1f}", f"{took / allowed:.1f} times" if took > allowed else "is fast enough"]
        lines.append("| " + " | ".join(cells) + " |")
    work = sum(budget.values(), Work(0.0, 0.0))
    cells = ["**all**", f"{work.flops / 1e12:.1f}", f"{work.bytes / 1e9:.0f}", f"{total:.0f}", f"{wanted:.0f}"]
    if phases:
        cells += [f"{took_all:.0f}", f"{took_all / wanted:.1f} times" if took_all > wanted else "is fast enough"]
    lines.append("| " + " | ".join(cells) + " |")
    most, published = 1000 * PICTURES / total, 1000 * PICTURES / PUBLISHED_FPS
    lines += [
        "",
        f"{PICTURES} pictures in {total:.0f} ms are {most:.0f} frames/s at the most (computed; decoding not included). "
        f"The published {PUBLISHED_FPS} frames/s on one H100 are {published:.0f} ms a chunk. {WANTED_FPS:.0f} frames/s "
        f"leave {wanted:.0f} ms: every part must run at {100 * total / wanted:.0f} % of its limit.",
    ]
    if phases:
        fps = 1000 * PICTURES / took_all
        lines[-1] += f" Measured, without launches of one pass after another: {took_all:.0f} ms, {fps:.1f} frames/s."
    return lines


def _measured(phase: str, phases: dict) -> float:
    """Milliseconds of a chunk, five passes; the write of K and V belongs to self-attention."""
    once = phase == "cache: begin_chunk, once a chunk"
    took = phases[phase]["median"] + (phases["cache: write"]["median"] if phase == "attention" else 0.0)
    return 1000 * took * (1 if once else CASES["paper"].passes)
