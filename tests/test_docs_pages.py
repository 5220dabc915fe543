"""Pages of the documentation: short paragraphs and cells, what each is for, its limits, links that lead somewhere."""

import re
import unicodedata
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LONGEST = 400  # characters of a paragraph, a list's item, or a table's cell
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])
HISTORY = "LOG.md"  # entries keep their form
FOLDERS = (ROOT / "docs", ROOT / "conf", ROOT / "experiments", ROOT / "engine", ROOT / "reports", ROOT / "kvarena")
LINK = re.compile(r"\]\(([^)\s]+)\)")
IN_A_COMMENT = re.compile(r"\bdocs/[\w./-]*\w")
IN_A_PAGE = re.compile(
    r"`((?:docs|conf|experiments|engine|reports|allocators|schedulers|tests|kvarena)/[\w./-]*\.(?:py|yaml|cu|md|jsonl|json|xz))`"
)
OF_READERS = re.compile(r"/(?:mine|NAME|frugal)\.")  # what a reader is to add


def pieces(text: str) -> list[str]:
    """Paragraphs, items and cells; what is indented by four or fenced is code or a drawing, and none of these."""
    found: list[str] = []
    fenced = open_piece = False
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            fenced, open_piece = not fenced, False
        elif fenced or not line.strip() or line.startswith("#"):
            open_piece = False
        elif line.startswith("|"):
            found += [cell.strip() for cell in re.split(r"(?<!\\)\|", line)]
            open_piece = False
        elif open_piece and not re.match(r"\s*(?:[-*]|\d+\.) ", line):
            found[-1] += " " + line.strip()
        elif not line.startswith("    "):
            found.append(line.strip())
            open_piece = True
    return found


@cache
def anchors(path: Path) -> set[str]:
    """Names of the headings of a page, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.S)
    names: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", text, re.M):
        kept = [c for c in heading.lower().replace(" ", "-") if c in "-_" or unicodedata.category(c)[0] in "LN"]
        names.add("".join(kept))
    return names


def dead_links(page: Path) -> list[str]:
    dead = []
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(link)
    return dead


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != HISTORY], ids=lambda page: page.name)
def test_no_paragraph_or_cell_is_long(page):
    long = [piece for piece in pieces(page.read_text(encoding="utf-8")) if len(piece) > LONGEST]
    assert not long, f"a table or a list in disguise: {long[0][:80]}... ({len(long[0])} characters)"


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=lambda page: page.name)
def test_a_page_begins_with_what_it_is_for(page):
    title, blank, first = page.read_text(encoding="utf-8").split("\n", 3)[:3]
    assert title.startswith("# ") and not blank and re.match(r"[A-Z`k]", first)


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_a_page_says_its_limits(page):
    assert page.name == HISTORY or "limits" in anchors(page)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    assert not dead_links(page)


def gone(file: Path) -> list[str]:
    """Files of this repository that a page or a comment names and that do not exist."""
    named = (IN_A_PAGE if file.suffix == ".md" else IN_A_COMMENT).findall(file.read_text(encoding="utf-8"))
    return [name for name in named if not OF_READERS.search(name) and not (ROOT / name).exists()]


def test_files_that_pages_and_comments_name_exist():
    files = [page for page in PAGES if page.name not in (HISTORY, "CHANGELOG.md")]
    files += [path for folder in FOLDERS for suffix in ("yaml", "py") for path in folder.rglob(f"*.{suffix}")]
    missing = {str(file.relative_to(ROOT)): names for file in files if (names := gone(file))}
    assert not missing


def test_what_is_too_long_or_leads_nowhere_is_noticed(tmp_path):
    words = "word " * 100
    page = tmp_path / "page.md"
    page.write_text(
        f"# A page\n\n{words}\n\n| a | {words} |\n\n- {words}\n\n    {words}\n\n[x](#a-page) [y](#b) [z](z.md)\n"
    )
    assert sum(len(piece) > LONGEST for piece in pieces(page.read_text())) == 3
    assert dead_links(page) == ["#b", "z.md"]
    page.write_text("`engine/ledger.py` `engine/no_such.py`")
    assert gone(page) == ["engine/no_such.py"]
