"""The small model: its clips, what is measured of them, its training command, and the weights that are shipped."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("skimage", reason="the small model's clips need scikit-image: pip install rfkernels[demo]")

from rfkernels import __main__
from rfkernels.tools.tiny import clips, evaluate, metrics, phases, presets, streams


def panned(speed, motion="pan right", frames=8):
    conditions = [clips.Condition.named(photo, motion) for photo in clips.PHOTOS]
    made = [clips.clip(c, frames, np.random.default_rng(5), speed)[0] for c in conditions]
    return (torch.stack(made) + 1) / 2, conditions


# --- clips ------------------------------------------------------------------------------------------------------------


def test_clips_depend_on_their_key_alone():
    (first, conditions), (again, same) = clips.batch(3, 4, 1, 2), clips.batch(3, 4, 1, 2)
    assert torch.equal(first, again) and conditions == same
    assert not torch.equal(first, clips.batch(3, 4, 1, 3)[0])
    assert first.shape == (3, 4, 3, clips.SIZE, clips.SIZE)
    assert first.abs().max() <= 1 and first.std() > 0.1


def test_a_still_camera_does_not_move():
    still, _ = panned(1.0, "still")
    assert torch.equal(still[:, 0], still[:, -1])


def test_a_pan_of_one_pixel_shifts_the_picture_by_one():
    right, _ = panned(1.0)
    torch.testing.assert_close(right[:, 0, :, :, 2:-1], right[:, 1, :, :, 1:-2], atol=1e-5, rtol=0)


def test_context_tells_conditions_apart():
    every = [clips.Condition(p, m) for p in range(len(clips.PHOTOS)) for m in range(len(clips.MOTIONS))]
    tokens = clips.context([*every, None])
    assert len(tokens.flatten(1).unique(dim=0)) == len(every) + 1
    assert not tokens[-1].any()


def test_unknown_conditions_are_named():
    with pytest.raises(ValueError, match=r"photo must be one of .*astronaut.*got 'dog'"):
        clips.Condition.named("dog", "still")
    with pytest.raises(ValueError, match="motion must be one of"):
        clips.Condition.named("coffee", "jump")
    with pytest.raises(ValueError, match="motion"):
        clips.Condition(0, 99)


# --- metrics and reward -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("motion", ("pan right", "pan up"))
@pytest.mark.parametrize("speed", (0.0, *clips.SPEEDS, 1.0, 2.3))
def test_displacement_is_that_of_the_camera(speed, motion):
    frames, _ = panned(speed, motion)
    assert metrics.displacement(frames).median().item() == pytest.approx(speed, abs=0.12)


def test_a_flat_picture_does_not_move():
    assert not metrics.displacement(torch.full((1, 4, 3, clips.SIZE, clips.SIZE), 0.2)).any()


def test_displacement_of_parts_in_a_turn_and_a_zoom():
    for motion in ("turn", "zoom"):
        slow, fast = (metrics.displacement(panned(speed, motion)[0]).mean() for speed in (0.4, 2.4))
        assert fast > 2 * slow


def test_the_reward_rises_with_speed_and_ignores_a_still_camera():
    rewards = [metrics.reward(*panned(speed)) for speed in (0.4, 1.2, 3.2)]
    assert (rewards[1] > rewards[0]).all() and (rewards[2] > rewards[1]).all()
    assert not metrics.reward(*panned(1.0, "still")).any()
    assert max(r.abs().max() for r in rewards) <= 2


def test_flicker_sees_brightness_and_not_motion():
    frames, _ = panned(1.0)
    blinking = frames * torch.tensor([1.0, 0.8]).repeat(4)[:, None, None, None]
    assert (metrics.flicker(blinking) > 5 * metrics.flicker(frames)).all()


def test_drift_sees_a_picture_that_blurs():
    frames, _ = panned(0.0, frames=8)
    blurred = torch.nn.functional.avg_pool2d(frames[:, 4:].flatten(0, 1), 3, 1, 1, count_include_pad=False).unflatten(
        0, (-1, 4)
    )
    assert metrics.drift(frames, 4).max() < 1e-4
    assert metrics.drift(torch.cat([frames[:, :4], blurred], 1), 4).min() > 0.3
    assert (metrics.sharpness(blurred) < metrics.sharpness(frames[:, :4])).all()


def test_fidelity_knows_the_photographs():
    frames, conditions = panned(0.8)
    photos = [c.photo for c in conditions]
    assert metrics.fidelity(frames, photos).mean() > 0.9
    assert metrics.fidelity(frames, photos[1:] + photos[:1]).mean() < 0.1


def test_a_black_picture_and_noise_are_of_no_photograph():
    photos = list(range(len(clips.PHOTOS)))
    for frames in (torch.zeros(5, 2, 3, clips.SIZE, clips.SIZE), torch.rand(5, 2, 3, clips.SIZE, clips.SIZE)):
        assert not metrics.fidelity(frames, photos).any()


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Every phase of the preset of seconds, by the command."""
    folder = tmp_path_factory.mktemp("run")
    assert __main__.main(["train", "--preset", "seconds", "--out", str(folder)]) == 0
    return folder


def test_the_command_leaves_all_it_promises(trained):
    run = json.loads((trained / "run.json").read_text())
    assert list(run["phases"]) == ["teacher", "trajectories", "ode", "dmd", "redmd", "export", "evaluate"]
    assert all(phase["seconds"] >= 0 and phase["commit"] for phase in run["phases"].values())
    steps = [json.loads(line)["step"] for line in (trained / "teacher" / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(presets.PRESETS["seconds"].teacher_steps))
    assert "Re-DMD, EMA 0.99" in (trained / "evaluation.md").read_text()
    for name, source in (("training.json", "run.json"), ("evaluation.json", "evaluation.json")):
        assert (trained / "export" / name).read_text() == (trained / source).read_text()
    model = streams.load(trained / "export")
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_finished_command_does_nothing(trained, capsys):
    before = (trained / "run.json").read_text()
    assert __main__.main(["train", "--preset", "seconds", "--out", str(trained)]) == 0
    assert capsys.readouterr().out == "" and (trained / "run.json").read_text() == before


def weights(folder):
    return load_file(folder / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("name", ("teacher", "ode", "redmd"))
def test_resumption_is_bitwise(trained, tmp_path, name):
    """Stopped after 3 steps, of which the checkpoint has 2: the third is taken again."""
    preset = presets.PRESETS["seconds"]
    for need in ("teacher", "trajectories", "ode"):
        (tmp_path / need).symlink_to(trained / need) if need != name else None
    functions = {
        "teacher": phases.teacher, "ode": phases.ode,
        "redmd": lambda *a, **o: phases.student(*a, "redmd", preset.beta, **o),
    }  # fmt: skip
    steps = 4 if name == "teacher" else 3
    assert functions[name](preset, tmp_path, stop_after=steps - 1, report=lambda text: None) is None
    assert functions[name](preset, tmp_path, report=lambda text: None) is not None
    own, whole = weights(tmp_path / name), weights(trained / name)
    assert all(torch.equal(own[key], whole[key]) for key in whole)
    logs = [
        [json.loads(line) for line in (f / name / "log.jsonl").read_text().splitlines()] for f in (tmp_path, trained)
    ]
    for mine, theirs in zip(*logs, strict=True):
        assert {**mine, "seconds": 0} == {**theirs, "seconds": 0}


def test_beta_is_all_that_tells_the_students_apart(trained):
    dmd, redmd = (weights(trained / name) for name in ("dmd", "redmd"))
    assert any(not torch.equal(dmd[key], redmd[key]) for key in dmd)


def test_errors_of_the_command(trained, tmp_path, capsys):
    cases = {
        ("--preset", "huge"): "preset must be one of ['seconds', 'tiny'], got 'huge'",
        ("--preset", "seconds", "--phase", "ode"): "--phase ode needs teacher, trajectories",
        ("--preset", "seconds", "--threads", "0"): "--threads must be at least 1, got 0",
    }
    for arguments, message in cases.items():
        assert __main__.main(["train", "--out", str(tmp_path / "new"), *arguments]) == 2
        assert message in capsys.readouterr().err
    assert __main__.main(["train", "--preset", "tiny", "--out", str(trained)]) == 2
    assert "another preset, 'seconds'" in capsys.readouterr().err


def test_a_stopped_command_says_that_it_goes_on(tmp_path, capsys, monkeypatch):
    step = phases.descend
    calls = []

    def stopped(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(phases, "descend", stopped)
    command = ["train", "--preset", "seconds", "--phase", "teacher", "--out", str(tmp_path)]
    assert __main__.main(command) == 130
    error = capsys.readouterr().err
    assert "the same command goes on" in error and "Traceback" not in error
    assert __main__.main(command) == 0
    assert list(json.loads((tmp_path / "run.json").read_text())["phases"]) == ["teacher"]


def test_an_output_that_cannot_be_written(capsys):
    assert __main__.main(["train", "--preset", "seconds", "--out", "/proc/x"]) == 2
    error = capsys.readouterr().err
    assert "--out must be a folder that can be written, got /proc/x" in error and error.count("\n") == 1


def test_a_table_marks_what_differs():
    row = {name: [1.0, 2, 3, 4] for name in evaluate.METRICS}
    more = {name: [1.5, 2.6, 3.4, 4.5] for name in evaluate.METRICS}
    rows = {"Re-DMD, EMA 0.99": {"8": row}, "DMD, EMA 0.99": {"8": more}}
    lines = evaluate.table({"conditions": ["a"] * 4, "frames": [8], "rows": rows}).splitlines()
    assert "2.500 ± 0.645 |" in lines[4] and "*" not in lines[4]
    assert "3.000 ± 0.634 *" in lines[5]


# --- what is shipped --------------------------------------------------------------------------------------------------


def test_the_shipped_student_streams():
    folder = streams.shipped()
    assert sum(path.stat().st_size for path in folder.rglob("*.safetensors")) < 8e6
    assert "phases" in json.loads((folder / "training.json").read_text())
    conditions = streams.moving_conditions(4)
    frames = streams.stream(streams.load(), conditions, 24, streams.SINKS[3]).frames
    assert frames.shape == (4, 24, 3, clips.SIZE, clips.SIZE)
    found = streams.measure(frames, conditions, 8)
    noise = metrics.sharpness(torch.rand(1, 4, 3, clips.SIZE, clips.SIZE))
    assert found["sharpness"].max() < noise.mean() - 0.5  # pictures, not noise
    assert found["fidelity"].mean() > 0.5  # of five photographs: 0.2 by chance
