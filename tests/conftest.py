"""One fixture decides where tests run: on a GPU where there is one, else on the CPU."""

import importlib.util
from pathlib import Path

import pytest
import torch
from patched import exact_backends

import rfkernels as rf

torch.set_num_threads(1)  # small operations: threads would mostly wait for each other on a busy machine


def pytest_make_parametrize_id(val):
    """Bad arguments and the start of their message name a test. Never an address: parallel workers compare names."""
    return str(val)[:40] if isinstance(val, dict | str) else None


def pytest_collection_modifyitems(items):
    """Minutes long tests come first, so that parallel processes end at about the same time."""
    items.sort(key=lambda item: not item.name.startswith("test_in_the_interpreter"))


@pytest.fixture(autouse=True)
def _same_numbers_every_time():
    torch.manual_seed(0)


@pytest.fixture
def poisoned_outputs():
    """Memory that torch.empty gives holds NaN: what a kernel should have written and did not is no lucky zero."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(params=exact_backends())
def backend(request):
    """Every backend that works here and is exact; the test runs within ``use_backend``. See `pytest_runtest_call`."""
    with rf.use_backend(request.param):
        yield request.param


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """A test of every backend is skipped for one that does not serve its dtype or head size, with that reason.

    What each backend serves is tested where it is defined, so that a lost dtype cannot hide in a skip.
    """
    try:
        return (yield)
    except rf.backends.UnservedError as error:
        if "backend" not in item.fixturenames:
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def setup_py():
    """setup.py as a module, without its setup() call."""
    setuptools = pytest.importorskip("setuptools")
    source = Path(__file__).parents[1] / "setup.py"
    if not source.exists():
        pytest.skip("no source tree beside the tests")
    spec = importlib.util.spec_from_file_location("rfkernels_setup", source)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **_: None)
        spec.loader.exec_module(module)
    return module
