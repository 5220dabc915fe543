"""What holds of every report's page: contents lead somewhere, commands can be copied, drawings have names."""

import html
import json
import re
import shlex
from urllib.parse import unquote

import pytest
from fake_runs import fake_run

from kvarena.reports.__main__ import main
from kvarena.reports.drawing.document import Document, Section
from kvarena.reports.pages.comparison import write_comparison
from kvarena.reports.pages.run_report import write_run_report
from kvarena.reports.pages.study import write_study_report

WORDS = ["python", "run.py", "-m", "allocator=contiguous,paged", "model.path=/a b/it's", "x={a: 1}", "n=$HOME", "~y"]


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The folders of a run's, a sweep's and an experiment's report."""
    root = tmp_path_factory.mktemp("a sweep")
    names = ["contiguous-1", "a #1? cell", "no page"]
    for name, allocator in zip(names, ("contiguous", "paged", "paged"), strict=True):
        run = fake_run(root / name, allocator, num_requests=12, seed=len(name) % 2, kv_map=True)
        manifest = json.loads((run / "manifest.json").read_text())
        (run / "manifest.json").write_text(json.dumps(manifest | {"command": WORDS}))
    for name in names[:2]:
        write_run_report(root / name)
    (root / "sweep.json").write_text(json.dumps({"runs": names, "command": WORDS}))
    write_comparison(root)
    series = {"name": "s", "x": ["a", "b"], "y": [1, 2], "low": [], "high": []}
    chart = {"name": "c", "kind": "bars", "x_label": "", "y_label": "requests", "caption": 'A "chart" & <more>.',
             "log_x": False, "log_y": False, "series": [series]}  # fmt: skip
    claim = {"quantity": "q", "unit": "%", "stated": 1.0, "ours": 1.1, "tolerance": "t", "verdict": "holds",
             "low": 1.0, "high": 1.2, "note": ""}  # fmt: skip
    study = {"title": "A study", "headline": "It holds.", "source": "here", "claims": [claim], "charts": [chart],
             "differences": ["one"], "notes": ["a note"], "created": "today", "cells": ["a #1? cell", "no page"],
             "command": WORDS, "git": {"commit": None}, "machine": {"cpu": "a cpu", "cores": 2}}  # fmt: skip
    (root / "study.json").write_text(json.dumps(study))
    sweep = [(root / f"report.{end}").read_text() for end in ("html", "md")]
    write_study_report(root)
    experiment = [(root / f"report.{end}").read_text() for end in ("html", "md")]
    run = [(root / names[1] / f"report.{end}").read_text() for end in ("html", "md")]
    return root, {"run": run, "comparison": sweep, "study": experiment}


KINDS = pytest.mark.parametrize("kind", ["run", "comparison", "study"])


@KINDS
def test_contents_name_every_section_and_lead_to_it(pages, kind):
    page, markdown = pages[1][kind]
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    wanted = re.findall(r'href="#([^"]*)"', page)
    assert set(wanted) <= set(ids)
    headings = re.findall(r'<h2 id="([^"]*)">', page)
    contents = re.findall(r'<li><a href="#([^"]*)">', page)
    assert len(headings) > 2 and contents == [*headings, *(["configuration"] if kind != "study" else [])]
    titles = re.findall(r"^## (.*)$", markdown, re.M)
    linked = re.findall(r"\[([^]]*)\]\(#([^)]*)\)", markdown)
    assert linked == list(zip(titles, headings, strict=True))
    assert len(re.findall(r'<figure id="figure-', page)) == page.count("<figure") > 0


def test_two_sections_of_one_name_have_two_anchors():
    document = Document("", "", "", sections=[Section(title) for title in ("A, b!", "A b", "A b 1", "A b")])
    assert document.anchors == ["a-b", "a-b-1", "a-b-1-1", "a-b-2"]


@KINDS
def test_the_command_is_there_to_be_copied(pages, kind):
    page, markdown = pages[1][kind]
    shown = re.search(r"<pre tabindex[^>]*>(.*?)</pre>", page, re.S)[1]
    assert shlex.split(html.unescape(re.sub(r"<[^>]*>", "", shown)).strip()) == WORDS
    assert shlex.split(re.search(r"```sh\n(.*?)```", markdown, re.S)[1]) == WORDS
    assert 'class="copy"' in page


def test_a_run_whose_command_nobody_knows_shows_none(tmp_path):
    write_run_report(fake_run(tmp_path / "run", num_requests=6))
    assert 'class="command"' not in (tmp_path / "run" / "report.html").read_text()


@KINDS
def test_every_drawing_is_an_image_with_a_name(pages, kind):
    page = pages[1][kind][0]
    drawings = re.findall(r"<(?:svg|canvas)\b[^>]*>", page)
    assert drawings
    for tag in drawings:
        assert 'role="img"' in tag and re.search(r'aria-label="[^"]{8,}"', tag), tag[:200]


def _linked(page, folder):
    """Where the page's links to other pages lead."""
    links = [unquote(url) for url in re.findall(r'<a href="([^"#][^"]*)"', page)]
    for link in links:
        assert (folder / link).is_file(), link
    return {(folder / link).resolve().parent.name for link in links}


def test_a_sweep_and_an_experiment_link_the_pages_of_their_cells(pages, tmp_path, capsys):
    root, texts = pages
    assert _linked(texts["comparison"][0], root) == {"contiguous-1", "a #1? cell"}
    assert _linked(texts["study"][0], root) == {"a #1? cell"}
    assert "](contiguous-1/report.html)" in texts["comparison"][1]
    elsewhere = tmp_path / "else where"
    runs = [str(root / name) for name in ("contiguous-1", "a #1? cell")]
    assert main([*runs, "--out", str(elsewhere), "--baseline", "contiguous-1"]) == 0
    page = (elsewhere / "report.html").read_text()
    assert _linked(page, elsewhere) == {"contiguous-1", "a #1? cell"}
    [command] = json.loads((elsewhere / "summary.json").read_text())["commands"]
    assert command == ["kvarena", "report", *runs, "--out", str(elsewhere), "--baseline", "contiguous-1"]


def test_a_sweep_s_other_comparison_shows_both_commands(pages, tmp_path, capsys):
    root = tmp_path / "sweep"
    root.mkdir()
    fake_run(root / "a", num_requests=6), fake_run(root / "b", "contiguous", num_requests=6)
    (root / "sweep.json").write_text(json.dumps({"runs": ["a", "b"], "command": WORDS}))
    write_comparison(root, "b", command=["kvarena", "report", "sweep", "--baseline", "b"])
    shown = re.search(r"```sh\n(.*?)```", (root / "report.md").read_text(), re.S)[1].splitlines()
    assert [shlex.split(line) for line in shown] == [WORDS, ["kvarena", "report", "sweep", "--baseline", "b"]]
