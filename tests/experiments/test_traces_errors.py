"""Broken traces: each error is one line that names file, line and column, and says what is wrong."""

import gzip
import json

import pytest

from kvarena.engine.errors import ConfigError, TraceError
from kvarena.experiments.workloads.azure import AzureTraceWorkload
from kvarena.experiments.workloads.burstgpt import BurstGPTWorkload
from kvarena.experiments.workloads.mooncake import MooncakeWorkload
from kvarena.experiments.workloads.vidur import VidurWorkload

COMMON = {"seed": 0, "vocab_size": 1000}
HEAD = b"TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
GOOD = b"2023-11-16 18:17:03.9799600,4808,10\r\n"


def message(kind, path):
    with pytest.raises(TraceError) as error:
        kind(path=str(path), **COMMON).items()
    text = str(error.value)
    assert str(path) in text
    assert "\n" not in text
    assert len(text) < 400
    return text


@pytest.mark.parametrize(
    ("data", "line", "column", "what"),
    [
        (b"", 1, "1", "empty"),
        (b"TIMESTAMP,ContextTokens\r\n", 1, "2", "lacks the column 'GeneratedTokens'"),
        (b"TIMESTAMP,ContextTokens,Output\r\n", 1, "'Output' (3)", "unknown column"),
        (b"TIMESTAMP,ContextTokens,ContextTokens\r\n", 1, "'ContextTokens' (3)", "occurs twice"),
        (HEAD, None, None, "no row is left"),
        (HEAD + GOOD + b"2023-11-16 18:17,1,1", 3, "'TIMESTAMP' (1)", "is not a time"),
        (HEAD + GOOD + b"2023-13-16 18:17:00,1,1", 3, "'TIMESTAMP' (1)", "is not a time"),
        (b"\x00" * 5000, 1, "'" + "\\x00" * 40 + "' (1)", "unknown column"),
        (HEAD + GOOD + GOOD.replace(b"4808", b"x" * 5000), 3, "'ContextTokens' (2)", "is not an integer"),
        (HEAD + GOOD + b",1,1", 3, "'TIMESTAMP' (1)", "'' is not a time"),
        (HEAD + GOOD + GOOD.replace(b"4808", b"-3"), 3, "'ContextTokens' (2)", "-3 must be at least 1"),
        (HEAD + GOOD + GOOD.replace(b"4808", b"0"), 3, "'ContextTokens' (2)", "0 must be at least 1"),
        (HEAD + GOOD + GOOD.replace(b",10", b",0"), 3, "'GeneratedTokens' (3)", "0 must be at least 1"),
        (HEAD + GOOD + GOOD.replace(b"4808", b"48.5"), 3, "'ContextTokens' (2)", "'48.5' is not an integer"),
        (HEAD + GOOD + GOOD.replace(b"4808", b"1e3"), 3, "'ContextTokens' (2)", "'1e3' is not an integer"),
        (HEAD + GOOD + GOOD.replace(b"4808", b" 48"), 3, "'ContextTokens' (2)", "' 48' is not an integer"),
        (HEAD + GOOD + GOOD.replace(b"4808", "٤".encode()), 3, "'ContextTokens' (2)", "is not an integer"),
        (HEAD + GOOD + GOOD.replace(b"4808", b""), 3, "'ContextTokens' (2)", "'' is not an integer"),
        (HEAD + GOOD + GOOD.replace(b"4808", b"\xff8"), 3, "'ContextTokens' (2)", "is not an integer"),
        (HEAD + GOOD + GOOD.replace(b"4808", b"10000001"), 3, "'ContextTokens' (2)", "too large"),
        (HEAD + GOOD + GOOD.replace(b"4808", b"9" * 30), 3, "'ContextTokens' (2)", "30 digits is too large"),
        (HEAD + GOOD + GOOD.replace(b"4808", b"9" * 9000), 3, "'ContextTokens' (2)", "9000 digits is too large"),
        (HEAD + GOOD + b"2023-11-16 18:17:04.0,5", 3, "'GeneratedTokens' (3)", "has 2 columns"),
        (HEAD + GOOD + b"2023-11-16 18:17:04.0,5,5,5", 3, "4", "has 4 columns"),
        (HEAD + b"\r\n" + GOOD, 2, "1", "the line is empty"),
        (HEAD + GOOD + b'2023-11-16 18:17:04.0,"5', 3, "1", "not CSV"),
    ],
)
def test_broken_azure(tmp_path, data, line, column, what):
    path = tmp_path / "trace.csv"
    path.write_bytes(data)
    text = message(AzureTraceWorkload, path)
    assert what in text
    if line is not None:
        assert f": line {line}, column {column}: " in text


def test_truncated_gzip(tmp_path):
    path = tmp_path / "trace.csv.gz"
    rows = b"".join(b"2023-11-16 18:17:03.%07d,%d,10\r\n" % (i * 7919, i + 1) for i in range(5000))
    path.write_bytes(gzip.compress(HEAD + rows)[:-2000])
    assert "cannot be read on" in message(AzureTraceWorkload, path)
    path.write_bytes(b"not gzip at all")
    assert "cannot be read on" in message(AzureTraceWorkload, path)


def test_no_file(tmp_path):
    assert "cannot be read" in message(AzureTraceWorkload, tmp_path / "absent.csv")
    assert "cannot be read" in message(MooncakeWorkload, tmp_path)
    with pytest.raises(ConfigError, match=r"set workload\.path=FILE"):
        AzureTraceWorkload(path=None, **COMMON)


def test_negative_images(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text("TIMESTAMP,NumImages,ContextTokens,GeneratedTokens\n2024-10-15 00:00:00.5,-1,10,2\n")
    assert "line 2, column 'NumImages' (2): -1 must be at least 0" in message(AzureTraceWorkload, path)


LINE = '{"timestamp": 5, "input_length": 600, "output_length": 5, "hash_ids": [1, 2]}'


@pytest.mark.parametrize(
    ("bad", "at", "what"),
    [
        (LINE[:40], "end", "not JSON"),
        (LINE + " x", LINE + " x", "not JSON: Extra data"),
        ("[1]", "", "expected an object"),
        ("", "", "the line is empty"),
        (LINE.replace('"output_length": 5, ', ""), "last", "output_length: this key is missing"),
        (LINE.replace("600", "-600"), "-600", "-600 must be at least 1"),
        (LINE.replace("600", "0"), "0, ", "0 must be at least 1"),
        (LINE.replace("600", "6e2"), "6e2", "600.0 must be an integer"),
        (LINE.replace("600", "true"), "true", "True must be an integer"),
        (LINE.replace("600", '"600"'), '"600"', "must be an integer"),
        (LINE.replace("600", "null"), "null", "None must be an integer"),
        (LINE.replace("600", "NaN"), "", "NaN is not a JSON number"),
        (LINE.replace("600", "1e999"), "1e999", "inf must be an integer"),
        (LINE.replace("600", "99999999999"), "99999999999", "too large"),
        (LINE.replace("600", "9" * 6000), "9" * 6000, "a number of 6000 digits is too large"),
        (LINE.replace("[1, 2]", "[1]"), "[1]", "1 ids for 600 tokens; 2 are needed"),
        (LINE.replace("[1, 2]", "[1, -2]"), "[1", "a list of integers"),
        (LINE.replace("[1, 2]", "[1, 2.0]"), "[1", "a list of integers"),
        (LINE.replace("[1, 2]", "7"), "7}", "a list of integers"),
        (LINE.replace(": 5, ", ": -5, ", 1), "-5", "timestamp: -5 must be"),
        (LINE.replace('"output_length"', '"input_length"'), "", "a key occurs twice"),
        ("[" * 100_000, "", "not JSON"),
    ],
)
def test_broken_mooncake(tmp_path, bad, at, what):
    path = tmp_path / "trace.jsonl"
    path.write_text(f"{LINE}\n{LINE}\n{bad}\n")
    text = message(MooncakeWorkload, path)
    assert what in text
    column = {"": 1, "end": len(bad) + 1, "last": len(bad)}.get(at, bad.find(at) + 1)
    if what == "not JSON: Extra data":
        column = len(LINE) + 2
    if at != "end":
        assert f": line 3, column {column}: " in text
    else:
        assert ": line 3, column " in text


def test_mooncake_that_is_not_utf8(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_bytes(LINE.encode() + b"\n" + LINE.encode()[:30] + b"\xff\n")
    assert "line 2, column 31: not UTF-8" in message(MooncakeWorkload, path)


@pytest.mark.parametrize(
    ("cells", "column", "what"),
    [
        ("x,ChatGPT,1,1,2,API log", "'Timestamp' (1)", "is not a time"),
        ("-1,ChatGPT,1,1,2,API log", "'Timestamp' (1)", "at least 0"),
        ("nan,ChatGPT,1,1,2,API log", "'Timestamp' (1)", "is not a time"),
        ("1e999,ChatGPT,1,1,2,API log", "'Timestamp' (1)", "is not a time"),
        ("1,ChatGPT,1,-1,2,API log", "'Response tokens' (4)", "-1 must be at least 0"),
        ("1,ChatGPT,1.5,1,2,API log", "'Request tokens' (3)", "is not an integer"),
    ],
)
def test_broken_burstgpt(tmp_path, cells, column, what):
    path = tmp_path / "trace.csv"
    head = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type"
    path.write_text(f"{head}\n0,ChatGPT,4,4,8,API log\n{cells}\n")
    text = message(BurstGPTWorkload, path)
    assert f"line 3, column {column}: " in text
    assert what in text


def test_broken_vidur(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n0.0,1,1\n0.1,2,0\n")
    assert "line 3, column 'num_decode_tokens' (3): 0 must be at least 1" in message(VidurWorkload, path)


def test_rows_beyond_the_wanted_ones_are_not_read(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text(f"{LINE}\n{LINE}\n{json.dumps({})}\n")
    assert len(MooncakeWorkload(path=str(path), num_requests=2, **COMMON).items()) == 2
