"""How far a job is: a bar on a terminal, lines elsewhere, nothing where nobody asks."""

import io
import sys

from kvarena.experiments.jobs import output
from kvarena.experiments.jobs.output import progress_bar


def test_a_log_gets_lines_and_no_carriage_return(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(output.time, "monotonic", lambda: now[0])
    bar = progress_bar("paged x static", 2000, "requests", enabled=True)
    for _ in range(2000):
        now[0] += output.LINE_EVERY / 900
        bar.set_postfix_str("5 tok/s", refresh=False)
        bar.update(1)
    bar.close()
    bar.close()
    lines = capsys.readouterr().err
    assert "\r" not in lines
    assert len(lines.splitlines()) == 3
    assert lines.splitlines()[-1] == "paged x static: 2,000 of 2,000 requests, 5 tok/s"


def test_a_terminal_gets_a_bar_and_nobody_nothing(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stderr", stream)
    progress_bar("a", 3, "requests", enabled=False).close()
    assert stream.getvalue() == ""
    bar = progress_bar("a", 3, "requests", enabled=True)
    bar.update(3)
    bar.close()
    assert "\r" in stream.getvalue()
