"""What the benchmarks say without timing operations: counted, computed, and the model's own clock."""

import pytest
import torch
from patched import serving

from benchmarks import bounds, counter, figure, host, model, report, timing
from benchmarks.cases import Stream
from benchmarks.counter import BelowOps
from rfkernels import EMASinkCache
from rfkernels.__main__ import main
from rfkernels.backends import library
from rfkernels.models import CausalWan, CausalWanConfig

CPU = torch.device("cpu")


# --- the counter ------------------------------------------------------------------------------------------------------

COUNTED = Stream("counted", rows=2, columns=3, heads=2, kv_heads=2, head_dim=32, layers=2, passes=2)


@pytest.mark.parametrize("make", [counter.usual_chunk, counter.our_chunk])
def test_fake_and_real_counts_agree(make, monkeypatch):
    """Without the flag that a full cache needs no mask, which is for devices only."""
    monkeypatch.setattr(EMASinkCache, "full", property(lambda self: False, lambda self, full: None), raising=False)
    fake, real = (counter.count(make, COUNTED, device) for device in ("cuda", "cpu"))
    assert fake.launches > 20
    assert fake == real


def test_the_usual_chunk_reads_lengths_and_ours_none():
    usual, ours = (counter.count(make, COUNTED) for make in (counter.usual_chunk, counter.our_chunk))
    assert ours.host_reads == 0
    # A layer and pass: whether the chunk is open, and the end of the window; the first pass two more to shift.
    assert usual.host_reads == COUNTED.layers * (2 * COUNTED.passes + 2)


def test_a_triton_chunk_is_a_few_launches():
    counts, launches = counter.count_triton(COUNTED)
    assert launches["begin_chunk_kernel"] == 1
    assert launches["write_kernel"] == launches["forward_kernel"] == COUNTED.layers * COUNTED.passes
    assert counts.operators == {"add_": 1} and counts.host_reads == 0  # num_frames


def test_a_chunk_of_a_librarys_kernel_is_three_launches_a_pass(monkeypatch):
    """Where the window is full: write and rotate by Triton's kernels, and the library's, which is one operator here."""
    kernel = next(kernel for kernel in library.KERNELS if kernel.name == "flash_attn_3")
    monkeypatch.setattr(kernel, "refusal", lambda device, dtype, head_dim: None)
    monkeypatch.setattr(kernel, "attend", lambda q, k, v, lengths, scale, return_lse: (q.clone(), None))
    with serving("triton"):
        counts, launches = counter.count_triton(COUNTED, "library:flash_attn_3")
    passes = COUNTED.layers * COUNTED.passes
    assert launches == {"begin_chunk_kernel": 1, "write_kernel": passes, "rotate_kernel": passes}
    assert counts.operators == {"add_": 1, "clone": passes} and counts.host_reads == 0


def test_bytes_of_single_operators():
    x, y = torch.ones(4, 6), torch.ones(6).expand(4, 6)
    with counter.CountingMode() as mode:
        z = x + y  # reads 24 and 6 elements, writes 24
        x[:2].copy_(z[2:])  # reads 12, writes 12
        z.t().unsqueeze(0)  # nothing
        torch.empty(100)  # nothing
        del z
        x[torch.tensor([1, 2])]  # reads 12 and two indices of 8 bytes, writes 12
        x.sum().item()  # reads 24, writes 1, and the host reads
    counts = mode.counts
    assert counts.operators == {"add": 1, "copy_": 1, "sum": 1, "index": 1} and counts.host_reads == 1
    assert (counts.read, counts.written) == (4 * (30 + 12 + 12 + 24) + 16, 4 * (24 + 12 + 12 + 1))
    assert counts.peak == 4 * (24 + 100)


# --- the host's time --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend, launches", [("triton", ["write_kernel", "forward_kernel"]), ("cuda", None)])
def test_a_pass_of_which_launches_are_noted(backend, launches):
    """Both ways launch the same, once a layer."""
    with host.noted(backend) as seen, torch.no_grad():
        call = host.a_pass(backend)
        call()
    names = launches or ["streaming_attention"]
    assert [seen[name] for name in names] == [host._LAYERS] * len(names)
    found = host.measure(backend, rounds=1)
    assert set(found) == set(host.WAYS) and all(len(x) == 1 and x[0] > 0 for x in found.values())


# --- the model --------------------------------------------------------------------------------------------------------


def test_a_stream_end_to_end(tmp_path, capsys):
    path = tmp_path / "e2e.json"
    assert main(["bench", "e2e", "--preset", "tiny", "--device", "cpu", "--chunks", "2", "--json", str(path)]) == 0
    said, run = capsys.readouterr().out, report.load(path)["e2e"]
    assert "first-frame latency" in said and "p99" in said and "not timed: the latents of the tiny preset" in said
    parts = {name: row["median"] for name, row in run["parts"].items()}
    assert set(parts) == {"text, once a prompt", *model.PASSES, "total"}
    assert sum(parts[name] for name in model.PASSES) <= parts["total"] * 1.5 and run["peak memory"] > 0


class Ticks:
    """A clock that counts its readings."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 1.0
        return self.now


def test_phases_add_up_to_the_pass_and_inner_ones_belong_to_outer_ones():
    marks = model.Phases(timing.CpuTimer(Ticks()))
    inner = marks.wrap(lambda: None, "inner")
    with marks.phase("outer"):
        inner()
    inner()
    assert marks.seconds() == {"outer": 1.0, "inner": 1.0} and marks.spans == []
    found = model.phases("tiny", CPU, timing.CpuTimer(Ticks()), rounds=1)
    layers = CausalWanConfig.preset("tiny").num_layers
    one = {name: row["median"] for name, row in found.items()}
    whole, _ = one.pop("whole pass"), one.pop("cache: begin_chunk, once a chunk")
    assert sum(one.values()) == pytest.approx(whole) and one["projections"] == layers * (4 + 2)  # q, k, v, o; q, o


def test_percentiles():
    assert model.percentiles([float(i) for i in range(101)]) == {"p50": 50.0, "p95": 95.0, "p99": 99.0}


# --- computed bounds --------------------------------------------------------------------------------------------------


def test_published_peaks_follow_from_the_table():
    peaks = {arch: gpu.tflops for arch, gpu in bounds.GPUS.items()}
    assert peaks == pytest.approx({80: 312, 90: 989.4, 100: 2250, 120: 209.5}, rel=3e-3)


def test_a_loop_is_bound_by_what_takes_most_clocks():
    loop = {"tensor": 16, "memory": 8, "special": 64, "barrier": 4, "other": 100, "per_score": 2.75}
    row = {"loop": loop, "tile": [128, 128], "warps": 8}  # 64 scores a thread and turn
    clocks = bounds.loop_bounds(row, bounds.GPUS[90])
    assert clocks == {
        "tensor": pytest.approx(1000 * 4 * 128 / 4096), "issue": pytest.approx(1000 * 192 / (64 * 32) / 4),
        "special": pytest.approx(1000 * 64 / 64 / 16), "shared": pytest.approx(1000 * 4 * 128 / 64 / 128),
    }  # fmt: skip


def test_the_budget_counts_what_the_model_multiplies():
    """The products of a pass of a model a tenth as deep, counted as it runs on fake tensors."""
    counted = []

    class Products(BelowOps):
        def other(self, func, args, kwargs):
            if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
                a, b = args[-2:]
                counted.append(2 * a.numel() * b.shape[-1])
            return super().other(func, args, kwargs)

    with torch.device("meta"):
        net = CausalWan(CausalWanConfig.preset("wan2.1-t2v-1.3b", num_layers=1)).to(torch.bfloat16)
    x, dim = torch.empty(1, 4680, 1536, dtype=torch.bfloat16, device="meta"), 1536
    kv = (torch.empty(1, 512, 12, 128, dtype=torch.bfloat16, device="meta"),) * 2
    time = torch.empty(1, 3, 6, dim, device="meta")
    with Products(), torch.no_grad():
        net.blocks[0](x, time, lambda q, k, v: q, kv)
    budget = figure.chunk_budget()
    names = ("projections (q, k, v, o; cross-attention q, o)", "feed-forward")
    assert sum(budget[name].flops for name in names) == 150 * sum(counted)


def test_the_page_shows_what_is_computed_now():
    page = bounds.README.read_text()
    assert bounds.renewed(page) == page, "run python -m benchmarks.bounds --write"
