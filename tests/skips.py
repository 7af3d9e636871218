"""A pytest plugin: what was skipped and why, in groups, at the end of a run (``PYTHONPATH=tests pytest -p skips``).

Reasons that differ in numbers only (a head size, a compute capability) are one group; the first of them is shown.
"""

import re
from collections import defaultdict


def reason_of(report) -> str:
    """Of a skipped test; what pytest.skip() was told, or the reason of a mark."""
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return " ".join(text.removeprefix("Skipped: ").split())


def groups(reports) -> list[tuple[int, str, list[str]]]:
    """(tests, a reason, files they are in), the largest group first."""
    found = defaultdict(list)
    for report in reports:
        found[re.sub(r"\d+", "#", reason_of(report))].append(report)
    rows = [
        (len(group), reason_of(group[0]), sorted({report.nodeid.split("::")[0] for report in group}))
        for group in found.values()
    ]
    return sorted(rows, key=lambda row: (-row[0], row[1]))


def pytest_terminal_summary(terminalreporter):
    rows = groups(terminalreporter.getreports("skipped"))
    if not rows:
        return
    terminalreporter.section(f"{sum(count for count, *_ in rows)} tests skipped, by reason")
    for count, reason, files in rows:
        shown = ", ".join(file.rpartition("/")[2] for file in files[:3]) + (", ..." if len(files) > 3 else "")
        terminalreporter.write_line(f"{count:5} {reason} ({shown})")
