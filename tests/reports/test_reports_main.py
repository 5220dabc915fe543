"""`kvarena report`."""

import json

import pytest
from fake_runs import fake_run

from kvarena.reports.__main__ import main


def _last(capsys):
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def test_two_runs_and_a_sweep(tmp_path, capsys):
    a, b = fake_run(tmp_path / "a", num_requests=6), fake_run(tmp_path / "b", "contiguous", num_requests=6)
    assert main([str(a), "--trace", str(tmp_path / "trace.json")]) == 0
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert _last(capsys) == {"report": str(a / "report.html")}
    assert main([str(a), str(b), "--baseline", "b"]) == 0
    assert _last(capsys) == {"report": str(tmp_path / "comparison" / "report.html")}
    (tmp_path / "sweep.json").write_text(json.dumps({"runs": ["b"], "baseline": None, "failed": []}))
    assert main([str(tmp_path)]) == 0
    assert _last(capsys) == {"report": str(tmp_path / "report.html")}
    assert main([str(a), str(tmp_path)]) == 2
    assert f"{tmp_path} holds a sweep; give it alone" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["nowhere"], ["nowhere", "elsewhere"], ["nowhere", "--baseline", "x"], ["a", "b", "--trace", "t"]]
)
def test_errors_are_one_line(tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
