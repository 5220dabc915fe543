"""A report as data (sections of text, tables and figures), and its rendering as HTML and Markdown.

The HTML is one file: figures are inline SVG, style is inline CSS, nothing is loaded from anywhere.
"""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from kvarena.reports.reading.writing import write_text


@dataclass(frozen=True, slots=True)
class Table:
    """A table of text cells; the first column is the row's name.

    Attributes:
        header: one cell per column.
        rows: as wide as the header.
        caption: printed above; may be empty.
        strong: (row, column) of cells to stress.
        text_columns: columns that hold words (left-aligned), beside the first.
        links: (row, column) -> where that cell leads, as a relative URL.
    """

    header: list[str]
    rows: list[list[str]]
    caption: str = ""
    strong: frozenset[tuple[int, int]] = frozenset()
    text_columns: frozenset[int] = frozenset()
    links: Mapping[tuple[int, int], str] = field(default_factory=dict)

    @classmethod
    def of(cls, entries: Sequence[Any], columns: Sequence[Column], words: Sequence[str] = (), **options: Any) -> Table:
        """A table with a row for each entry.

        Args:
            entries: what the rows are about.
            columns: each heading, and what its cell says of an entry.
            words: headings of the columns that hold words.
            options: other attributes.
        """
        rows = [[show(entry) for _, show in columns] for entry in entries]
        texts = frozenset(index for index, (name, _) in enumerate(columns) if name in words)
        return cls([name for name, _ in columns], rows, text_columns=texts, **options)


Column = tuple[str, Callable[[Any], str]]


def at(show: Callable[[Any], str], *keys: str) -> Callable[[Any], str]:
    """What a table's column shows: a number of a nested entry; none where a key leads to nothing."""

    def cell(entry: Any) -> str:
        for key in keys:
            entry = None if entry is None else entry[key]
        return show(entry)

    return cell


@dataclass(frozen=True, slots=True)
class Picture:
    """A figure.

    Attributes:
        name: of its file below figures/.
        markup: the inline SVG, or other HTML.
        caption: what it shows.
        alt: the same for who cannot see it.
    """

    name: str
    markup: str
    caption: str
    alt: str


@dataclass(slots=True)
class Section:
    """A heading, and below it text, a list, pictures, tables, notes and links, in that order.

    Attributes:
        links: (text, relative URL).
    """

    title: str
    text: list[str] = field(default_factory=list)
    items: list[str] = field(default_factory=list, kw_only=True)
    pictures: list[Picture] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    links: list[tuple[str, str]] = field(default_factory=list)


@dataclass(slots=True)
class Document:
    """A whole report.

    Attributes:
        kicker: what kind of report it is.
        title: its name.
        headline: the result in one sentence.
        notices: what a reader must know before believing the headline, right below it.
        verdict: a line that must not be overlooked, and whether it is good news; None for none.
        facts: (name, value) of what ran.
        commands: lines for a shell that make this report again.
        tiles: (name, value, remark) of the few numbers to see first.
        sections: the body.
        definitions: (term, meaning).
        config: the configuration as text; empty for none.
        footer: the last line.
    """

    kicker: str
    title: str
    headline: str
    notices: list[str] = field(default_factory=list)
    verdict: tuple[str, bool] | None = None
    facts: list[tuple[str, str]] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    tiles: list[tuple[str, str, str]] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)
    definitions: list[tuple[str, str]] = field(default_factory=list)
    config: str = ""
    footer: str = ""

    @property
    def anchors(self) -> list[str]:
        """An anchor a section, in order: as GitHub names those of Markdown headings, so that both pages share them."""
        found: list[str] = []
        for section in self.sections:
            anchor = re.sub(r"[^\w\- ]", "", section.title.lower()).replace(" ", "-")
            names = itertools.chain([anchor], (f"{anchor}-{number}" for number in itertools.count(1)))
            found.append(next(name for name in names if name not in found))
        return found

    @property
    def contents(self) -> list[tuple[str, str]]:
        """(anchor, title) of all that has a heading."""
        named = [(anchor, section.title) for anchor, section in zip(self.anchors, self.sections, strict=True)]
        return named + ([("definitions", "Definitions")] if self.definitions else [])


def commands(*lines: Sequence[str] | None) -> list[str]:
    """Commands, each as words, as lines for a shell; what is None or empty is left out."""
    return [shlex.join(words) for words in lines if words]


@cache  # with the templates that it has compiled
def _environment(*, autoescape: bool) -> Environment:
    loader = FileSystemLoader(Path(__file__).parent / "templates")
    environment = Environment(
        loader=loader, undefined=StrictUndefined, autoescape=autoescape, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["breaks"] = lambda text: escape(text).replace(",", Markup(",<wbr>"))  # where a line may end
    environment.filters["cell"] = lambda text: str(text).replace("|", "\\|").replace("\n", " ")
    return environment


def render_html(document: Document) -> str:
    """One self-contained HTML page."""
    template = _environment(autoescape=True).get_template("report.html.j2")
    style = Markup((Path(__file__).parent / "templates" / "style.css").read_text(encoding="utf-8"))
    copy = Markup((Path(__file__).parent / "templates" / "copy.js").read_text(encoding="utf-8"))
    return template.render(doc=document, style=style, copy=copy, labelled=labelled)


def write_pages(folder: Path, document: Document) -> None:
    """Write report.md and report.html. Raises NotWritten."""
    write_text(folder / "report.md", render_markdown(document))
    write_text(folder / "report.html", render_html(document))


def labelled(picture: Picture) -> Markup:
    """The picture's markup; each drawing in it is an image with a name for who cannot see it."""
    label = f'role="img" aria-label="{escape(picture.alt)}"'
    return Markup(re.sub(r"<(svg|canvas)(?=[ >])(?![^>]* role=)", lambda tag: f"<{tag[1]} {label}", picture.markup))


def render_markdown(document: Document) -> str:
    """The same report as Markdown; figures are links to figures/*.png."""
    return _environment(autoescape=False).get_template("report.md.j2").render(doc=document)
