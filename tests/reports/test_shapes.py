"""What a damaged JSON file is told in: the place, what stands there, and what should."""

import csv

import pytest

from kvarena.reports.reading.shapes import MOMENT, maybe, mismatch
from kvarena.reports.reading.writing import write_csv


@pytest.mark.parametrize(
    ("value", "shape", "wrong"),
    [
        ([], {"a": str}, "it is a list, not an object"),
        ({"c": 1}, {"a": str, "b": int}, "it lacks a, b"),
        ({"a": {}}, {"a": {"x": int, "y": maybe(int), "z": int | None}}, "a lacks x, z"),
        ({"a": True}, {"a": float}, "a is true, not number"),
        ({"a": 1}, {"a": float}, None),
        ({"a": 1.5}, {"a": int}, "a is 1.5, not integer"),
        ({"a": "1"}, {"a": maybe(int)}, "a is text, not integer"),
        ({"a": 0}, {"a": bool}, "a is 0, not true or false"),
        ({"a": None}, {"a": dict}, "a is null, not an object"),
        ({"a": {"b": [{"c": 1}, {"c": "x"}]}}, {"a": {"b": [{"c": int}]}}, "a.b[1].c is text, not integer"),
        ({"a": {}}, {"a": list}, "a is an object, not a list"),
        ({"a": None}, {"a": maybe({"x": int})}, None),
        ({}, {"a": maybe([str])}, None),
        ({"a": "2026-11-24T10:00:00.000+00:00"}, {"a": MOMENT}, None),
        ({"a": "today"}, {"a": maybe(MOMENT)}, "a is text, not a date and time as of ISO 8601"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(value, shape, wrong):
    assert mismatch(value, shape) == wrong
    inner = mismatch(value, shape, "run.totals")
    assert inner == wrong is None or (inner.startswith("run.totals") and inner.endswith(wrong.removeprefix("it")))


def test_a_table_keeps_whole_numbers_where_some_are_missing(tmp_path):
    path = tmp_path / "made" / "t.csv"
    rows = [{"a": 1, "b": 0.1, "c": True}, {"a": None, "b": 1e-9, "c": 'x, "y"', "left out": 1}]
    write_csv(path, rows, ["a", "b", "c", "d"])
    assert list(csv.reader(path.open(newline=""))) == [
        ["a", "b", "c", "d"], ["1", "0.1", "True", ""], ["", "1e-09", 'x, "y"', ""],
    ]  # fmt: skip
    write_csv(path, [], ["a", "b"])
    assert path.read_text() == "a,b\n"
