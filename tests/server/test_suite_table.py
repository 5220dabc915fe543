"""The table of the reliability suite in docs/serving.md names every item, and tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
SHORT = {
    "BR": "bad_requests",
    "RC": "rough_clients",
    "SF": "server_faults",
    "FR": "fronts",
    "RF": "rank_failures",
    "SU": "start_up",
    "OB": "observability",
    "ME": "media",
    "AD": "queue_limits",
    "CO": "connections",
    "EN": "endurance",
    "LB": "large_bodies",
    "SA": "structured_answers",
    "GA": "gate",
    "PS": "promised_seconds",
    "AM": "admin",
}


def _rows() -> list[tuple[str, str]]:
    text = (ROOT / "docs" / "serving.md").read_text()
    section = text[text.index("## Reliability suite") : text.index("## Measured")]
    rows = [line.strip("|").split(" | ") for line in section.splitlines() if re.match(r"\| \d", line)]
    return [(row[0].strip(), row[-1]) for row in rows]


def test_every_item_has_a_row():
    items: list[int] = []
    for numbers, _ in _rows():
        for part in numbers.split(", "):
            first, _, last = part.partition("-")
            items += range(int(first), int(last or first) + 1)
    assert items == list(range(1, 55))


def test_every_row_names_a_test_that_exists():
    for numbers, tests in _rows():
        names = re.findall(r"`([^`]+)`", tests)
        assert names, numbers
        for name in names:
            file, _, function = name.partition("::")
            path = ROOT / (f"tests/server/test_{SHORT[file]}.py" if file in SHORT else file)
            assert f"def {function}" in path.read_text() if function else path.is_file(), name
