"""The demo streams the shipped model and writes what it says."""

import math

import pytest
import torch

pytest.importorskip("skimage", reason="the demo needs scikit-image: pip install rfkernels[demo]")
pytest.importorskip("matplotlib", reason="the demo needs matplotlib: pip install rfkernels[demo]")
pytest.importorskip("tqdm", reason="the demo needs tqdm: pip install rfkernels[demo]")

from PIL import Image

from rfkernels import __main__
from rfkernels.tools import demo, outputs
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


def test_stopped(tmp_path, capsys, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo.streams, "stream", stop)
    assert __main__.main(["demo", "--out", str(tmp_path), "--device", "cpu"]) == 130
    error = capsys.readouterr().err
    assert "stopped" in error and str(tmp_path) in error and "Traceback" not in error
    assert not list(tmp_path.iterdir())


def test_a_file_has_its_name_when_it_is_finished(tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt), outputs.finished(tmp_path / "video.gif") as path:
        path.write_text("half")
        raise KeyboardInterrupt
    assert path.suffix == ".gif" and [p.name for p in tmp_path.iterdir()] == ["video.partial.gif"]
    with outputs.finished(tmp_path / "video.gif") as path:
        path.write_text("whole")
    assert [p.name for p in tmp_path.iterdir()] == ["video.gif"]


def test_errors_before_anything_is_streamed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo.streams, "stream", lambda *_, **__: pytest.fail("streamed"))
    (tmp_path / "file").write_text("")
    for arguments, message in {
        ("--out", "/proc/x"): "--out must be a folder that can be written, got /proc/x",
        ("--out", str(tmp_path / "file")): "--out must be a folder",
        ("--out", str(tmp_path / "file" / "x")): "--out must be a folder",
        ("--out", str(tmp_path), "--device", "cuda:99"): "--device must be one that is here",
        ("--out", str(tmp_path), "--device", "meta"): "--device must be one that is here",
        ("--out", str(tmp_path), "--device", "gpu"): "--device must be one that is here",
    }.items():
        assert __main__.main(["demo", *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        __main__.main(["--version"])
    assert stopped.value.code == 0 and capsys.readouterr().out == f"rfkernels {__main__.rf.__version__}\n"


def test_errors(tmp_path, capsys, monkeypatch):
    assert __main__.main(["demo", "--out", str(tmp_path), "--frames", "1"]) == 2
    assert "--frames must be at least" in capsys.readouterr().err
    assert __main__.main(["demo", "--out", str(tmp_path), "--seed", "-1"]) == 2
    assert __main__.main(["demo", "--out", str(tmp_path), "--model", str(tmp_path)]) == 2
    assert "config.json" in capsys.readouterr().err
    find = demo.importlib.util.find_spec
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None if name == "tqdm" else find(name))
    assert __main__.main(["demo", "--out", str(tmp_path)]) == 1
    assert 'pip install "rfkernels[demo]"' in capsys.readouterr().err
