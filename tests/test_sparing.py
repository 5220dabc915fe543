"""What tests are spared is there for one that looks at it (in warm processes: tests/studies/test_study_frame.py)."""

import pytest
import sparing

from kvarena.experiments.recording.contention import Contention
from kvarena.reports.drawing.style import drawing, export, new_figure


def line(sheet):
    figure = new_figure(2, sheet)
    figure.subplots().plot([1, 2])
    return figure


def exported(folder):
    with drawing():
        markup = export(line, folder, "line")
    return markup, (folder / "figures" / "line.png").read_bytes()


def test_a_picture_that_nobody_looks_at_is_empty(tmp_path):
    markup, png = exported(tmp_path)
    assert markup.count("<svg") == 2 and "<path" not in markup
    assert png == sparing.PIXEL
    with sparing.nothing_spared():
        assert exported(tmp_path)[0].count("<path") > 10
    assert exported(tmp_path)[1] == sparing.PIXEL


@pytest.mark.drawn
def test_a_picture_that_a_test_looks_at_is_drawn(tmp_path):
    markup, png = exported(tmp_path)
    assert markup.count("<svg") == 2 and markup.count("<path") > 10
    assert png.startswith(b"\x89PNG") and len(png) > 5000


def test_a_probe_that_nobody_looks_at_finds_a_quiet_machine():
    contention = Contention(probe=True, cuda=False)
    contention.before()
    with contention:
        pass
    assert contention.after()["probe"] == {"before": 1000.0, "after": 1000.0, "spread": 0.0}
