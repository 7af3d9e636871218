"""For mkdocs: links from pages to files of the repository become their names, as a site has no such files.

A link to a page of docs/, or to a file whose text is a page (CONTRIBUTING.md, ...), leads to that page.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = {  # files outside docs/ whose text is a page, by the page that includes them
    "benchmarks.md": "benchmarks/README.md",
    "changelog.md": "CHANGELOG.md",
    "dev/contributing.md": "CONTRIBUTING.md",
    "dev/emulator.md": "tests/ptx/README.md",
}
_BY_FILE = {file: page for page, file in PAGES.items()}
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#:\s]*)(#[^)\s]*)?\)")


def on_page_markdown(markdown: str, page, **_) -> str:
    """Raises:
    FileNotFoundError: a link to a file that does not exist.
    """
    source = page.file.src_uri
    if source in PAGES:
        markdown = (ROOT / PAGES[source]).read_text()
    folder = (ROOT / PAGES.get(source, f"docs/{source}")).parent

    def resolve(match: re.Match) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        if not target:
            return match[0]
        path = Path(os.path.normpath(folder / target))
        if not path.exists():
            raise FileNotFoundError(f"{source}: a link to {target}, which does not exist")
        file = path.relative_to(ROOT).as_posix()
        to = _BY_FILE.get(file, file.removeprefix("docs/") if file.startswith("docs/") else None)
        if to is None:
            return f"{text} (`{file}`)" if f"`{file}`" not in text and text != file else f"`{file}`"
        return f"[{text}]({os.path.relpath(to, Path(source).parent)}{anchor})"

    return _LINK.sub(resolve, markdown)
