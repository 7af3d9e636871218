"""Benchmarks: what the cases claim, that nothing wrong is timed, that a slowdown shows. Nothing here asserts a time."""

import json
import math
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from benchmarks import cases, gate, operations, report, runner, streaming, timing
from benchmarks.cases import CASES, Latent, Sequence, Stream
from benchmarks.contenders import FLOOR, Bench, Contender, Options
from benchmarks.counter import BelowOps
from rfkernels.__main__ import main
from rfkernels.backends import UnservedError
from rfkernels.contract.geometry import WindowMask

CPU = torch.device("cpu")
TINY = Stream("tiny", rows=2, columns=3, heads=4, kv_heads=2, head_dim=16, layers=2, dtype=torch.float32)
CEILINGS = {"float32": {"TFLOP/s": 1e-3}, "bfloat16": {"TFLOP/s": 1e-3}, "copy": {"GB/s": 1.0}}


# --- cases ------------------------------------------------------------------------------------------------------------


def test_the_papers_numbers():
    """0.40 TFLOP for a pass of a layer, 0.17 GB for begin_chunk's layer."""
    paper = CASES["paper"]
    assert paper.attention().flops == pytest.approx(4 * 4680 * 14040 * 1536, rel=1e-3)
    assert paper.begin_chunk().bytes / 30 == pytest.approx(0.17e9, rel=0.02)


@pytest.mark.parametrize("shape", [(40, 12, 4, 4), (37, 5, 3, 1), (64, 64, 0, 8), (50, 8, 11, 4), (9, 20, 2, 3)])
def test_visible_pairs_are_those_of_the_mask(shape):
    tokens, window, sink, chunk = shape
    i, j = torch.arange(tokens)[:, None], torch.arange(tokens)
    mask = WindowMask(sink, window, chunk, chunk).visible(i, j)
    assert Sequence("x", tokens, window, sink, chunk).visible == mask.sum().item()


def test_flops_of_an_attention_are_those_of_its_products():
    """Counted from the matrix products that the reference dispatches."""
    counted = []

    class Products(BelowOps):
        def other(self, func, args, kwargs):
            if func is torch.ops.aten.bmm.default:
                counted.append(2 * math.prod(args[0].shape) * args[1].shape[-1])
            return super().other(func, args, kwargs)

    bench = streaming.attention(TINY, Options(CPU, compiled=False))
    reference = bench.contenders["rfkernels reference"]
    with reference.around(), Products():
        reference.call()
    rotations = 3 * TINY.queries * (TINY.heads + TINY.kv_heads) * TINY.head_dim
    assert bench.work.flops == sum(counted) + rotations


def test_bytes_are_those_of_the_tensors_an_operation_needs():
    bench = operations.redmd(Latent("small", (1, 2, 3, 4, 4), masked=True), Options(CPU))
    elements = 2 * 3 * 4 * 4
    assert bench.work.bytes == elements * (4 * 5 + 1)
    s = streaming.Streaming(TINY, Options(CPU), 1)
    cache, (q, k, v) = s.cache(), s.inputs[0]
    past = cache[0].k[:, TINY.queries :].nbytes * 2
    assert TINY.attention().bytes == 2 * q.nbytes + 2 * (k.nbytes + v.nbytes) + past
    assert TINY.write().bytes == 2 * (k.nbytes + v.nbytes)
    accumulators = cache.sink_k[0].nbytes + cache.sink_v[0].nbytes
    image = 2 * cache[0].k[:, : TINY.sink * TINY.frame_tokens].nbytes
    assert TINY.begin_chunk().bytes == TINY.layers * (k.nbytes + v.nbytes + 2 * accumulators + image)


# --- the gate ---------------------------------------------------------------------------------------------------------

SMALL = {
    "streams": replace(TINY, name="tiny"),
    "one frame": replace(TINY, frames=1, sink=2, window=4),
    "long": replace(TINY, frames=4, sink=3, window=6),  # more frames leave than the sink has
}


@pytest.mark.parametrize("operation", [n for n, (kind, _) in operations.OPERATIONS.items() if kind is Stream])
@pytest.mark.parametrize("case", SMALL.values(), ids=SMALL)
def test_every_contender_of_a_stream_passes_the_gate(operation, case):
    check_all(operations.OPERATIONS[operation][1](case, Options(CPU, compiled=False)))


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("rope", [None, (2, 3)])
def test_every_contender_of_a_sequence_passes_the_gate(train, rope):
    case = Sequence("x", 48, 12, 6, 6, heads=4, kv_heads=2, head_dim=16, rope=rope, dtype=torch.float32)
    check_all(operations.sequence_attention(case, Options(CPU, compiled=False), train))


@pytest.mark.parametrize("masked", [False, True])
def test_every_contender_of_the_loss_passes_the_gate(masked):
    check_all(operations.redmd(Latent("x", (1, 3, 4, 5, 6), masked), Options(CPU)))


def check_all(bench: Bench):
    assert any(name.startswith("rfkernels") for name in bench.contenders)
    for name, contender in bench.contenders.items():
        with contender.around(), torch.no_grad():
            assert gate.wrong(contender.read(contender.call()), bench.exact, bench.plain) is None, name


@pytest.fixture
def planted(monkeypatch):
    """An operation of three contenders: the floor, one that a clock sees as slow as one likes, and a wrong one."""

    out = torch.ones(4)

    def bench(case, options):
        contenders = {
            FLOOR: Contender(lambda: out, lambda r: {"out": r}),
            "rfkernels sdpa": Contender(lambda: out.clone(), lambda r: {"out": r}),
            "wrong": Contender(lambda: pytest.fail("timed") if timed else out + 1e-3, lambda r: {"out": r}),
        }
        return Bench(cases.Work(1e9, 1e6), contenders, {"out": out.double()}, {"out": out})

    timed = []

    def interleaved(calls, timer, *rest):
        timed.append(1)
        times = timing.interleaved(calls, timer, seconds=0, least=9)
        timed.clear()
        return times

    monkeypatch.setitem(operations.OPERATIONS, "planted", (Stream, bench))
    monkeypatch.setattr(runner, "interleaved", interleaved)


class FakeClock:
    """Every call of clone costs the given seconds, anything else 1."""

    def __init__(self, seconds):
        self.now, self.seconds = 0.0, seconds

    def measure(self, function):
        value = 1.0 if function() is function() else self.seconds
        return lambda: value

    def end_round(self):
        pass


def planted_run(seconds):
    rows = runner.measure("planted", TINY, Options(CPU), FakeClock(seconds), CEILINGS, 1.0)
    return {"format": report.FORMAT, "environment": {"commit": str(seconds)}, "rows": rows}


def test_a_wrong_result_is_not_timed(planted):
    rows = {row["contender"]: row for row in planted_run(1.0)["rows"]}
    assert rows["wrong"]["gate"] == "red" and "off by" in rows["wrong"]["skipped"] and "seconds" not in rows["wrong"]
    assert rows["rfkernels sdpa"]["gate"] == "green" and rows["rfkernels sdpa"]["tflops"] == pytest.approx(1e-3)


class CompilingClock:
    """Any call costs 1 second, but for the first one of ``compiles``: 1000."""

    def __init__(self):
        self.calls = 0

    def compiles(self):
        self.calls += 1
        return torch.ones(4)

    def measure(self, function):
        before = self.calls
        function()
        value = 1000.0 if (before, self.calls) == (0, 1) else 1.0
        return lambda: value

    def end_round(self):
        pass


def test_a_compilation_is_not_held_against_a_contender(planted, monkeypatch):
    """The first call of each is for the gate; which of them are too slow to time is found by a second one."""
    clock, out = CompilingClock(), torch.ones(4)
    contenders = {
        FLOOR: Contender(lambda: out, lambda r: {"out": r}),
        "rfkernels triton": Contender(clock.compiles, lambda r: {"out": r}),
    }
    bench = Bench(cases.Work(1e9, 1e6), contenders, {"out": out}, {})
    monkeypatch.setitem(operations.OPERATIONS, "planted", (Stream, lambda case, options: bench))
    rows = runner.measure("planted", TINY, Options(CPU), clock, CEILINGS, 1.0)
    assert all("seconds" in row for row in rows), rows


@pytest.mark.parametrize(
    "who, error, gate_says",
    [
        ("SDPA cudnn", RuntimeError("No available kernel"), None),
        ("rfkernels cuda", UnservedError("head_dim 48"), None),
        ("rfkernels cuda", RuntimeError("illegal address"), "red"),
    ],
)
def test_who_does_not_serve_a_shape_is_not_red(planted, monkeypatch, who, error, gate_says):
    def fail():
        raise error

    out = torch.ones(4)
    contenders = {FLOOR: Contender(lambda: out, lambda r: {"out": r}), who: Contender(fail, lambda r: {"out": r})}
    bench = Bench(cases.Work(1e9, 1e6), contenders, {"out": out}, {})
    monkeypatch.setitem(operations.OPERATIONS, "planted", (Stream, lambda case, options: bench))
    rows = {r["contender"]: r for r in runner.measure("planted", TINY, Options(CPU), FakeClock(1), CEILINGS, 1.0)}
    assert "seconds" in rows[FLOOR] and rows[who].get("gate") == gate_says
    assert str(error) in rows[who]["skipped"] and ("not served" in rows[who]["skipped"]) == (gate_says is None)


@pytest.mark.parametrize(
    "got, why",
    [
        ({}, "nothing to compare"),
        ({"other": torch.ones(2)}, "nothing to compare"),
        ({"out": torch.ones(3)}, "shape"),
        ({"out": torch.tensor([1.0, math.nan])}, "off by nan"),
        ({"out": torch.tensor([1.0, 1.1])}, "off by 0.1"),
    ],
)
def test_the_gate_says_what_is_wrong(got, why):
    exact = {"out": torch.ones(2, dtype=torch.float64)}
    assert why in gate.wrong(got, exact, {"out": torch.ones(2)})


# --- timing and comparison --------------------------------------------------------------------------------------------


def test_rounds_interleave_and_slow_functions_sit_out():
    order, now = [], [0.0]

    def function(name, seconds):
        def call():
            order.append(name)
            now[0] += seconds

        return call

    clock = timing.CpuTimer(lambda: now[0])
    functions = {"a": function("a", 1.0), "b": function("b", 2.0), "slow": function("slow", 9.0)}
    times = timing.interleaved(functions, clock, seconds=0, least=4, clock=lambda: now[0])
    assert order[:6] == ["a", "b", "slow"] * 2 and order[6:11] == ["a", "b", "slow", "a", "b"]
    assert times == {"a": [1.0] * 4, "b": [2.0] * 4, "slow": [9.0, None, 9.0, None]}
    assert timing.ratio(times, "slow", "b") == (4.5, 4.5, 4.5)
    assert timing.stats([5.0, 1.0, 2.0, 3.0, 4.0]) == (3.0, 2.0, 4.0)


def test_a_planted_slowdown_shows_in_the_comparison(planted, tmp_path, capsys):
    paths = []
    for seconds in (1.0, 1.3, 1.3):
        paths.append(str(tmp_path / f"{len(paths)}.json"))
        report.save(paths[-1], planted_run(seconds))
    changes = {r["contender"]: r for r in report.compare(*(report.load(path) for path in paths[:2]))}
    assert changes["rfkernels sdpa"]["change"] == "slower" and changes[FLOOR]["change"] == "same"
    assert changes["rfkernels sdpa"]["to_floor"] == [1.0, 1.3]
    assert main(["bench", "--compare", *paths[:2]]) == 0
    said = capsys.readouterr().out
    assert "slower" in said and "1 slower, 0 faster, 1 same" in said and "1.0  ->  1.3" in said
    assert main(["bench", "--compare", *paths[1:]]) == 0
    assert "0 slower, 0 faster, 2 same" in capsys.readouterr().out


def test_rows_that_only_one_run_has_are_named(planted):
    a = planted_run(1.0)
    b = {"rows": [row for row in a["rows"] if row["contender"] == FLOOR]}
    assert {r["change"] for r in report.compare(a, b)} == {"same", "only in the first"}
    assert {r["change"] for r in report.compare(b, a)} == {"same", "only in the second"}


class FakeCuda:
    """What `CudaTimer` asks of torch.cuda, on a list of what it did. A failed capture leaves its stream current."""

    def __init__(self, captures=True):
        self.log, self.captures, self.current = [], captures, self.Stream()

    def is_available(self):
        return True

    def get_device_properties(self, device):
        return type("Properties", (), {"L2_cache_size": 64})()

    def Event(self, enable_timing):
        cuda = self

        class Event:
            def record(self):
                cuda.log.append("event")

            def elapsed_time(self, other):
                return 2.0  # milliseconds

        return Event()

    def synchronize(self):
        self.log.append("synchronize")

    def Stream(self):
        return type("Stream", (), {"wait_stream": lambda self, other: None})()

    def current_stream(self):
        return self.current

    def set_stream(self, stream):
        self.current = stream

    def stream(self, stream):
        return timing.contextlib.nullcontext()

    def CUDAGraph(self):
        return type("Graph", (), {"replay": lambda graph: self.log.append("replay")})()

    def graph(self, graph):
        if not self.captures:
            self.current = self.Stream()
            raise RuntimeError("cannot capture\nmore")
        return timing.contextlib.nullcontext()


def test_the_cuda_timer_brackets_the_call_and_waits_once_a_round():
    cuda = FakeCuda()
    timer = timing.CudaTimer(CPU, cuda=cuda)
    timer._dirt = type("Dirt", (), {"zero_": lambda self: cuda.log.append("flush")})()
    value = timer.measure(lambda: cuda.log.append("call"))
    timer.end_round()
    assert cuda.log == ["flush", "event", "call", "event", "synchronize"] and value() == 0.002


@pytest.mark.parametrize("captures", [True, False])
def test_the_cuda_timer_replays_a_graph_or_says_why_not(captures):
    cuda = FakeCuda(captures)
    timer, stream = timing.CudaTimer(CPU, graph=True, cuda=cuda), cuda.current
    cuda.log.clear()

    def call():
        cuda.log.append("call")

    timer.measure(call)
    timer.measure(call)
    timed = [x for x in cuda.log if x != "event"][-1]
    assert timed == ("replay" if captures else "call")
    assert timer.not_captured == ({} if captures else {call: "cannot capture"})
    assert cuda.current is stream, "later calls belong where they would have been"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_cuda_timer_refuses_without_a_device():
    with pytest.raises(RuntimeError, match="needs a CUDA device"):
        timing.CudaTimer(CPU)


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "expression, keeps",
    [
        ("attention", True),
        ("attention and paper", True),
        ("attention and not paper", False),
        ("(write or attention) and bfloat16", True),
        ("quarter or half", False),
    ],
)
def test_expressions(expression, keeps):
    assert runner.matches(expression, "attention/paper/bfloat16") is keeps


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["-k", "nothing-like-it"], "chooses nothing"),
        (["-k", "and and"], "cannot be read"),
        (["-k", "paper (half)"], "cannot be read"),
        (["e2e", "--preset", "huge"], "--preset must be one of"),
        (["e2e", "--chunks", "0"], "--chunks must be at least 1"),
        (["model", "--device", "cpu", "--cuda-graph"], "--cuda-graph is for operations, and for e2e on a GPU"),
        (["--seconds", "0"], "--seconds must be positive"),
        (["--threads", "0"], "--threads must be at least 1"),
        (["--compare", "missing.json", "missing.json"], "missing.json cannot be read"),
        (["--compare", __file__, __file__], "is not JSON"),
    ],
)
def test_errors_name_the_argument(arguments, message, capsys):
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_json_of_something_else_is_refused(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"rows": []}))
    with pytest.raises(ValueError, match="not a run saved by bench"):
        report.load(path)


def test_a_case_too_large_for_the_memory_is_said_and_passed_over(monkeypatch, capsys):
    def too_large(case, options):
        raise torch.OutOfMemoryError("no")

    monkeypatch.setitem(operations.OPERATIONS, "planted", (Stream, too_large))
    rows = runner.measure("planted", TINY, Options(CPU), FakeClock(1.0), CEILINGS, 1.0)
    report.show_rows(Console(), rows)
    assert "planted/tiny/float32: not enough memory" in capsys.readouterr().out


def test_a_run_end_to_end(monkeypatch, tmp_path, capsys):
    """The command itself, on cases small enough for a test: tables, JSON, a picture, and a comparison with itself."""
    monkeypatch.setattr(runner, "CASES", {"tiny": TINY, "loss": Latent("loss", (1, 2, 3, 4, 4))})
    path, picture = tmp_path / "run.json", tmp_path / "run.png"
    threads = torch.get_num_threads()
    expression = "float32 and not chunk_attention and (begin_chunk or attention/ or redmd)"
    code = main(
        ["bench", "-k", expression, "--seconds", "0.01", "--no-compile", "--device", "cpu", "--threads", str(threads),
         "--json", str(path), "--plot", str(picture)]
    )  # fmt: skip
    said = capsys.readouterr().out
    assert code == 0 and "attention/tiny/float32" in said and "% of floor" in said and "not installed" in said
    run = report.load(path)
    timed = [row for row in run["rows"] if "seconds" in row]
    assert {row["operation"] for row in timed} == {"begin_chunk", "attention", "redmd"}
    assert {"rfkernels sdpa", "usual", FLOOR} <= {row["contender"] for row in timed}
    assert all(row["gate"] == "green" and row["percent"] > 0 for row in timed)
    assert {"commit", "torch", "threads", "cpu"} <= set(run["environment"]) and run["ceilings"]["copy"]["GB/s"] > 0
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert {row["change"] for row in report.compare(run, run)} == {"same"}


def test_the_default_choice_for_a_cpu_and_the_quick_one():
    names = {runner.label(*one) for one in runner.select(CPU)}
    assert names == set(runner.ON_CPU) and set(runner.QUICK) <= names and set(runner.COMPILED) <= names
    assert [runner.label(*one) for one in runner.select(CPU, quick=True)] == list(runner.QUICK)
    assert all(
        not hasattr(case, "layers") or case.layers <= cases.CPU_LAYERS for _, case in runner.select(CPU, "paper")
    )
