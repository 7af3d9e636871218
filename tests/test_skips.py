"""The report of what was skipped, run on tests of its own."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = """
import pytest

@pytest.mark.parametrize("size", [1, 2, 3])
def test_sizes(size):
    if size > 1:
        pytest.skip(f"no kernel of head_dim {size}")

@pytest.mark.skipif(True, reason="no GPU")
def test_marked(): pass

@pytest.fixture
def tool(): pytest.skip("no GPU")

def test_fixture(tool): pass
def test_fixture_again(tool): pass
"""


def test_skips_are_reported_in_groups(tmp_path):
    (tmp_path / "test_some.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "skips", "-p", "no:cacheprovider", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 tests skipped, by reason" in done.stdout
    assert "    3 no GPU (test_some.py)\n    2 no kernel of head_dim 2 (test_some.py)\n" in done.stdout, done.stdout
