"""The main cases for pytest-benchmark: ``pytest benchmarks``, with its own --benchmark-save and --benchmark-compare.

Contenders run one after another here, not in turn: for ratios use ``python -m rfkernels bench``.
"""

import pytest
import torch

pytest.importorskip("pytest_benchmark", reason="pip install 'rfkernels[bench]'")

from benchmarks import gate, runner
from benchmarks.contenders import Options
from benchmarks.operations import OPERATIONS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CHOSEN = {runner.label(*one): one for one in runner.select(DEVICE, quick=True)}

CONTENDERS = ("rfkernels cuda", "rfkernels triton", "rfkernels sdpa", "usual", "SDPA", "plain")


@pytest.fixture(scope="module", params=CHOSEN)
def bench(request):
    """One operation with all that does it; slow definitions are left to the tests."""
    operation, case = CHOSEN[request.param]
    with torch.no_grad():
        return OPERATIONS[operation][1](case, Options(DEVICE, compiled=False))


@pytest.mark.parametrize(
    "contender", ["rfkernels cuda", "rfkernels triton", "rfkernels sdpa", "usual", "SDPA", "plain"]
)
def test_main(benchmark, bench, contender):
    if contender not in bench.contenders:
        pytest.skip(bench.skipped.get(contender, "does not do this"))
    it = bench.contenders[contender]

    def call():
        result = it.call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return result

    with it.around(), torch.no_grad():
        assert gate.wrong(it.read(it.call()), bench.exact, bench.plain) is None
        benchmark.pedantic(call, rounds=10, warmup_rounds=2)
    benchmark.extra_info.update(flops=bench.work.flops, bytes=bench.work.bytes)
