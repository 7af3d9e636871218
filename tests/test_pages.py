"""The pages: every Python block of the README and of docs/ runs, and every link leads somewhere.

Blocks of a page run one after another in a fresh interpreter, in a folder of their own. What a reader would have
(weights, data) is made before, by a comment of the page that starts with ``<!-- for tests``. Those of docs/migrate.md
are lines of tests/test_migrate.py, which compares and runs them.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
CODE = re.compile(r"^```python\n(.*?)^```|^<!-- for tests\n(.*?)^-->", re.M | re.S)
ELSEWHERE = {"docs/migrate.md": "test_migrate.py"}  # by page: the file whose tests run its blocks


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[str]:
    return [shown or hidden for shown, hidden in CODE.findall(page.read_text())]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page) and name(page) not in ELSEWHERE], ids=name)
def test_blocks_run(page, tmp_path):
    """Each prints what it says it prints: the README's blocks and the tutorial's all print something."""
    code = "import torch\ntorch.set_num_threads(1)\n" + "\nprint('--- next block')\n".join(blocks(page))
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    if name(page) in ("README.md", "docs/tutorial.md"):
        assert all(part.strip() for part in done.stdout.split("--- next block")), done.stdout


LINK = re.compile(r"(?<!`)!?\[[^\]]*\]\(([^)\s]+)\)")
PROSE = re.compile(r"^```.*?^```|`[^`\n]+`", re.M | re.S)


def anchors(page: Path) -> set[str]:
    """Of its headings, as mkdocs and code hosts form them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", text.lower()).strip()) for text in headings}


@pytest.mark.parametrize(
    "page",
    [*PAGES, *(ROOT / f for f in ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "benchmarks/README.md"))],
    ids=name,
)
def test_links_lead_somewhere(page):
    for target in LINK.findall(PROSE.sub("", page.read_text())):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.exists(), f"{name(page)}: {target}"
        if anchor:
            assert anchor in anchors(path), f"{name(page)}: {target}"


def test_every_page_is_in_the_site():
    nav = (ROOT / "mkdocs.yml").read_text()
    missing = [path for path in PAGES[1:] if f": {path.relative_to(ROOT / 'docs').as_posix()}\n" not in nav]
    assert not missing, missing


def test_the_picture_of_the_ring_is_up_to_date(tmp_path):
    code = (ROOT / "docs" / "ring.py").read_text().replace('Path(__file__).with_name("ring.svg")', "Path('ring.svg')")
    code = code.replace("Path(__file__)", f"Path({str(ROOT / 'docs' / 'ring.py')!r})")
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert (tmp_path / "ring.svg").read_text() == (ROOT / "docs" / "ring.svg").read_text()
