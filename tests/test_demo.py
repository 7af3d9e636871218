"""The demo streams the shipped model and writes what it says."""

import math

import pytest
import torch

pytest.importorskip("skimage", reason="the demo needs scikit-image: pip install rfkernels[demo]")
pytest.importorskip("matplotlib", reason="the demo needs matplotlib: pip install rfkernels[demo]")
pytest.importorskip("tqdm", reason="the demo needs tqdm: pip install rfkernels[demo]")

from PIL import Image

from rfkernels import __main__, demo
from rfkernels.tools.tiny import clips


def test_command_line(tmp_path, capsys):
    folder = tmp_path / "new"
    assert __main__.main(["demo", "--out", str(folder), "--frames", "14", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert all(text in printed for text in (*demo.SHOWN, "backend sdpa on cpu", "frames/s", "cache bytes"))
    video = Image.open(folder / "video.gif")
    assert video.n_frames == 14
    assert video.size == (3 * clips.SIZE * demo.SCALE, 2 * clips.SIZE * demo.SCALE)
    for name in ("contact_sheet.png", "sinks.png"):
        picture = torch.tensor(list(Image.open(folder / name).convert("L").getdata()), dtype=torch.float32)
        assert picture.std() > 10
    rows = [line.split() for line in printed.splitlines() if line.startswith(demo.SHOWN)]
    assert len(rows) == 3
    assert all(math.isfinite(float(x)) for row in rows for x in row if x.replace(".", "", 1).isdigit())


def test_tiles():
    videos = torch.arange(4.0)[:, None, None, None, None].expand(4, 2, 3, 5, 6) / 255
    tiled = demo.tiles(videos, columns=3)
    assert tiled.shape == (2, 10, 18, 3) and tiled.dtype == torch.uint8
    assert tiled[1, 0, 17, 0] == 2 and tiled[1, 9, 0, 0] == 3 and tiled[1, 9, 17, 0] == 0


def test_errors(tmp_path, capsys, monkeypatch):
    assert __main__.main(["demo", "--out", str(tmp_path), "--frames", "1"]) == 2
    assert "--frames must be at least" in capsys.readouterr().err
    assert __main__.main(["demo", "--out", str(tmp_path), "--seed", "-1"]) == 2
    assert __main__.main(["demo", "--out", str(tmp_path), "--model", str(tmp_path)]) == 2
    assert "config.json" in capsys.readouterr().err
    find = demo.importlib.util.find_spec
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None if name == "tqdm" else find(name))
    assert __main__.main(["demo", "--out", str(tmp_path)]) == 1
    assert "pip install rfkernels[demo]" in capsys.readouterr().err
