"""The demo runs, and what it reports about its caches is true of them."""

import math

import pytest
import torch

pytest.importorskip("skimage", reason="the demo needs scikit-image: pip install rfkernels[demo]")
pytest.importorskip("matplotlib", reason="the demo needs matplotlib: pip install rfkernels[demo]")

from rfkernels import __main__, demo

FRAMES = 40  # the last chunk is one frame


@pytest.fixture(scope="module")
def results():
    found = demo.compare(demo.video(FRAMES))
    return {(r.name, r.dtype, r.averaging): r for r in found}


def test_every_figure_is_finite(results):
    for r in results.values():
        numbers = [*r.mass, *r.moved, *r.exact, *r.error, r.deviation, r.frames_per_second, r.nbytes]
        assert all(map(math.isfinite, numbers))
        assert len(r.mass) == len(r.moved) == math.ceil(FRAMES / demo.CHUNK)
        assert all(0 <= m <= 1 + 1e-5 for m in r.mass)
        assert r.frames_per_second > 0


def test_outputs_agree_with_the_float64_reference(results):
    for r in results.values():
        if r.dtype == "float32":
            assert 0 < r.deviation < 2e-5
        else:  # keys, values and outputs rounded to 8 bits; a bfloat16 average also lags behind
            assert 1e-4 < r.deviation < (0.05 if r.averaging == "float32" else 1.0)


def test_attention_mass(results):
    assert set(results["no sink", "float32", "-"].mass) == {0.0}
    static = results["static sink", "float32", "-"].mass
    assert static[0] == pytest.approx(1, abs=1e-5)  # the first chunk is the sink
    assert all(0.01 < m < 0.9 for m in static[1:])


def test_how_far_sinks_move(results):
    assert set(results["static sink", "float32", "-"].moved) == {0.0}
    for alpha in ("0.99", "0.999"):
        ema = results[f"EMA {alpha}", "float32", "float32"]
        assert ema.moved[-1] > 1e-3
        assert ema.moved[-1] == pytest.approx(ema.exact[-1], rel=1e-4)
        assert max(ema.error) < 1e-6
    wide, half = (results["EMA 0.999", "bfloat16", averaging] for averaging in ("float32", "bfloat16"))
    start = half.moved[0]  # rounding the first frames to bfloat16
    assert half.moved[-1] - start < 0.6 * wide.moved[-1]
    assert half.error[-1] > 100 * wide.error[-1]


def test_cache_bytes(results):
    window = 9 * demo.TOKENS * demo.HEADS * demo.HEAD_DIM * 2  # k and v of nine frames
    accumulators = window // 3
    assert results["no sink", "float32", "-"].nbytes == 4 * window + 8
    assert results["EMA 0.999", "bfloat16", "float32"].nbytes == 2 * window + 4 * accumulators + 8


def test_a_sink_turns_back_into_its_picture():
    clip = demo.video(1)
    _, v = demo.embed(clip)
    torch.testing.assert_close(demo.picture(v[0]).float(), (clip[0].permute(1, 2, 0) + 1) / 2, atol=1e-5, rtol=0)


def test_command_line(tmp_path, capsys):
    assert __main__.main(["demo", "--out", str(tmp_path / "new"), "--frames", "14"]) == 0
    assert (tmp_path / "new" / "demo.png").stat().st_size > 20_000
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("no sink", "static sink", "EMA 0.999", "demo.png"))
    assert __main__.main(["demo", "--out", str(tmp_path), "--frames", "0"]) == 2


def test_a_missing_package_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "skimage", None)
    assert __main__.main(["demo", "--out", str(tmp_path)]) == 1
    assert "pip install rfkernels[demo]" in capsys.readouterr().err


def test_table_without_rich(results, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "rich.box", None)
    demo.print_table(demo.table(list(results.values())))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(demo.VARIANTS)
    assert max(map(len, lines)) <= 100
