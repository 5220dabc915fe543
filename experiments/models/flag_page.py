"""Writes the tables of docs/flags.md: what flags of `kvarena serve` and of `vllm serve` do, from the parser's own.

kvarena make flag_page            # writes it
kvarena make flag_page --check    # exit code 1 where it is not what would be written
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kvarena.engine.checkpoints.directory import PACKAGE_ROOT
from kvarena.engine.errors import ConfigError
from kvarena.experiments.serving.flag_table import FLAGS, Flag
from kvarena.experiments.serving.flag_words import said_of
from kvarena.experiments.serving.foreign_flags import NO_EFFECT, REFUSED, Foreign
from kvarena.experiments.tools import tool_parser

PAGE = PACKAGE_ROOT / "docs" / "flags.md"
# What stands between them is written; the rest of the page is by hand.
BEGIN, END = "<!-- tables -->\n", "<!-- end of the tables -->\n"


def page(text: str) -> str:
    """The page with its tables as they are now. Raises ConfigError: `text` has no place for them."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ConfigError(f"{PAGE} has no lines {BEGIN.strip()} and {END.strip()}, between which the tables stand")
    same = [flag for flag in FLAGS if not flag.ours]
    ours = [flag for flag in FLAGS if flag.ours]
    sections = (
        ("The same", "flag", "what it does", _rows(same)),
        ("Only here", "flag", "what it does", _rows(ours)),
        ("No effect", "flag", "because", _foreign_rows(NO_EFFECT)),
        ("Refused", "flag", "because", _foreign_rows(REFUSED)),
    )
    tables = ""
    for title, left, right, rows in sections:
        lines = "\n".join(f"| {names} | {says} |" for names, says in rows)
        tables += f"\n## {title}\n\n| {left} | {right} |\n|---|---|\n{lines}\n"
    return f"{before}{begin}{tables}\n{end}{after}"


def _rows(flags: Sequence[Flag]) -> Iterator[tuple[str, str]]:
    for flag in flags:
        yield ", ".join(f"`{name}`" for name in flag.names), _escaped(flag.says)


def _foreign_rows(table: Sequence[Foreign]) -> Iterator[tuple[str, str]]:
    """A row for each reason; one that has more flags than a cell may hold goes on in the next row."""
    for foreign in table:
        names = [f"`{name}`" for name in (names[0] for names in foreign.names)]
        for start in range(0, len(names), 6):
            yield ", ".join(names[start : start + 6]), _escaped(said_of(foreign))


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def main(argv: Sequence[str]) -> int:
    """Write the page, or compare it; returns the exit code."""
    parser = tool_parser(__name__, __doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where the page differs")
    options = parser.parse_args(argv)
    if not PAGE.is_file():
        raise ConfigError(f"{PAGE} is not there: the page belongs to a checkout")
    text = PAGE.read_text(encoding="utf-8")
    made = page(text)
    if options.check:
        print("the same" if made == text else "docs/flags.md differs: run kvarena make flag_page")
        return 0 if made == text else 1
    PAGE.write_text(made, encoding="utf-8")
    return 0
