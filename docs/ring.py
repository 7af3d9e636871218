"""Draws docs/ring.svg, the picture of docs/semantics.md: where frames lie in the cache, and which sink takes which."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from rfkernels.contract.geometry import CacheGeometry

SIDE, GAP, LEFT, TOP = 52, 44, 120, 58
COLOURS = {"sink": "#f4d58d", "window": "#a9cbe8", "open": "#7fb285", "empty": "#ffffff"}


def box(x: float, y: float, colour: str, text: str, small: str = "") -> str:
    middle, size = x + SIDE / 2, 15 if len(text) < 5 else 12
    return (
        f'<rect x="{x}" y="{y}" width="{SIDE}" height="{SIDE}" fill="{COLOURS[colour]}" stroke="#333"/>'
        f'<text x="{middle}" y="{y + 30}" text-anchor="middle" font-size="{size}">{text}</text>'
        f'<text x="{middle}" y="{y + 46}" text-anchor="middle" font-size="9" fill="#444">{small}</text>'
    )


def row(geometry: CacheGeometry, frames: int, chunk: int, y: float) -> list[str]:
    """The buffer when the newest ``chunk`` of ``frames`` frames are open."""
    held = {geometry.slot(g): g for g in range(frames)}
    evicted = geometry.evicted_frames(frames)
    parts = [f'<text x="8" y="{y + 24}" font-size="13">N = {frames}</text>']
    parts.append(f'<text x="8" y="{y + 41}" font-size="10" fill="#444">{evicted} evicted</text>')
    for slot in range(geometry.capacity):
        x = LEFT + slot * SIDE + (16 if slot >= geometry.sink_frames else 0)
        if slot not in held:
            parts.append(box(x, y, "empty", "-"))
        elif slot < geometry.sink_frames:
            gone = range(geometry.sink_frames, geometry.sink_frames + evicted)
            fused = [g for g in gone if geometry.fuse_slot(g) == slot]
            position = f"at {geometry.sink_position(slot, frames, True)}"
            parts.append(box(x, y, "sink", "+".join(map(str, [slot, *fused])), position))
        else:
            frame = held[slot]
            parts.append(box(x, y, "open" if frame >= frames - chunk else "window", str(frame), f"at {frame}"))
    return parts


def picture(geometry: CacheGeometry, chunk: int, counts: list[int]) -> str:
    width = LEFT + geometry.capacity * SIDE + 30
    height = TOP + len(counts) * (SIDE + GAP) + 6
    parts = [f'<rect width="{width}" height="{height}" fill="#fff"/>']
    for x, text in ((LEFT, "sinks"), (LEFT + geometry.sink_frames * SIDE + 16, "ring of window frames")):
        parts.append(f'<text x="{x}" y="46" font-size="13">{text}</text>')
    legend = (("sink", "sink: frames fused"), ("window", "window"), ("open", "open chunk"))
    for index, (colour, text) in enumerate(legend):
        x = LEFT + index * 150
        parts.append(f'<rect x="{x}" y="10" width="14" height="14" fill="{COLOURS[colour]}" stroke="#333"/>')
        parts.append(f'<text x="{x + 20}" y="22" font-size="12">{text}</text>')
    for index, frames in enumerate(counts):
        parts += row(geometry, frames, chunk, TOP + index * (SIDE + GAP))
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'font-family="sans-serif">\n{body}\n</svg>\n'
    )


if __name__ == "__main__":
    geometry = CacheGeometry(sink_frames=3, window_frames=6, frame_tokens=1)
    Path(__file__).with_name("ring.svg").write_text(picture(geometry, 3, [6, 9, 12, 15]))
