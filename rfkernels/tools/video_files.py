"""Video files by PyAV: written chunk by chunk, and read as the start of another one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from .outputs import finished

if TYPE_CHECKING:
    from av.container import OutputContainer
    from av.video.stream import VideoStream


def open_video(path: Path, fps: int) -> tuple[OutputContainer, VideoStream]:
    """PyAV's container and stream of a video file, which comes to be with its first frame."""
    import av

    try:
        container = av.open(str(path), "w")
        stream = container.add_stream("libx264", rate=fps)
    except ValueError as error:
        raise ValueError(f"out must end in a video format such as .mp4, got {path}") from error
    stream.pix_fmt = "yuv420p"
    return container, stream


def write_video(path: Path, chunks: Iterator[torch.Tensor], fps: int, frames: int | None = None) -> None:
    """Writes chunks ``[n, 3, H, W]`` in -1..1 as they come, at most ``frames`` frames; the format is the suffix's.

    Until all are written the file has another name (`partial_path`); it can be played, and stays after an error.

    Raises:
        ValueError: a suffix that stands for no format that holds H.264.
    """
    left = math.inf if frames is None else frames
    with finished(path) as partial:
        container, stream = open_video(partial, fps)
        with container:
            try:
                for chunk in chunks:
                    pixels = ((chunk.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
                    left -= _encode_frames(container, stream, pixels.permute(0, 2, 3, 1).cpu(), left)
                    if left <= 0:
                        break
            finally:  # also of what was stopped: the encoder still holds frames
                if stream.codec_context.is_open:
                    container.mux(stream.encode())


def _encode_frames(container: OutputContainer, stream: VideoStream, pixels: torch.Tensor, limit: float) -> int:
    """Encodes uint8 ``[n, H, W, 3]``, at most ``limit`` of them; returns n."""
    import av

    if not stream.codec_context.is_open:
        stream.height, stream.width = pixels.shape[1:3]
    for image in pixels[: int(min(len(pixels), limit))].numpy():
        container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
    return len(pixels)


def read_frames(path: Path, height: int, width: int, limit: int) -> torch.Tensor:
    """The first frames of an image or video, at most ``limit``: ``[n, 3, height, width]`` in -1..1, scaled to
    cover that size and cut to it in the middle.

    Raises:
        ValueError: a file that holds no pictures.
    """
    import av

    frames: list[torch.Tensor] = []
    try:
        with av.open(str(path)) as container:
            for frame in container.decode(video=0):
                pixels = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)[None].float() / 127.5 - 1
                frames.append(_covering(pixels, height, width)[0])
                if len(frames) == limit:
                    break
    except (av.error.FFmpegError, IndexError) as error:
        raise ValueError(f"{path} must be an image or a video, got a file that cannot be decoded: {error}") from error
    if not frames:
        raise ValueError(f"{path} must be an image or a video, got a file without pictures")
    return torch.stack(frames)


def _covering(pixels: torch.Tensor, height: int, width: int) -> torch.Tensor:
    old_height, old_width = pixels.shape[-2:]
    scale = max(height / old_height, width / old_width)
    size = max(height, round(old_height * scale)), max(width, round(old_width * scale))
    if size != (old_height, old_width):
        pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(-1, 1)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return pixels[..., top : top + height, left : left + width]
