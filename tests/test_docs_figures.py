"""A measured figure stands in a section that has the command which makes it."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HISTORY = "LOG.md"  # each row of it names its command
PAGES = [ROOT / "README.md", *(page for page in sorted((ROOT / "docs").glob("*.md")) if page.name != HISTORY)]
FIGURE = re.compile(
    r"(?<![\w.`/=-])\d[\d,]*(?:\.\d+)?\s?(?:ms|us|s|%|tokens/s|requests/s|[GM]B|[GM]iB|TB/s|times)(?![\w`])"
)
TOOLS = "run|serve|report|list|benchmark|check|make|describe"
COMMAND = re.compile(rf"\b(?:kvarena (?:{TOOLS})|python run\.py|python -[mX]|make (?:run|test))\b")
# Sections whose figures nobody measured: what a field holds, what is set, what is meant; lines of a table of refusals.
STATED = {
    ("files.md", "manifest.json"), ("models.md", "Classes"), ("reports.md", "What the numbers mean"),
    ("serving.md", "Pages"), ("strategies.md", "Allocators"),
}  # fmt: skip


def sections(page: Path) -> list[tuple[str, str]]:
    """Headings and what is below each, the page's beginning first."""
    parts = re.split(r"(?m)^#{2,4} (.*)$", page.read_text(encoding="utf-8"))
    return list(zip(["", *parts[1::2]], [parts[0], *parts[2::2]], strict=True))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_figures_have_their_command(page):
    bare = {
        title: FIGURE.findall(text)
        for title, text in sections(page)
        if len(FIGURE.findall(text)) > 1 and not COMMAND.search(text)
    }
    assert bare.keys() == {title for name, title in STATED if name == page.name}, bare


def test_a_figure_without_a_command_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A\n\nA page.\n\n## Speed\n\nIt took 3 s, and 4.5 ms a step.\n")
    with pytest.raises(AssertionError, match=r"'Speed': \['3 s', '4\.5 ms'\]"):
        test_figures_have_their_command(page)
    page.write_text("# A\n\nA page.\n\n## Speed\n\n    kvarena benchmark cpu\n\nIt took 3 s, and 4.5 ms a step.\n")
    test_figures_have_their_command(page)
