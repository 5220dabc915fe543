"""A terminal that cannot write a character gets a plain spelling, never an error."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvarena.reports.drawing.plain_text import write_any_text
from kvarena.reports.reading.packages import missing_package

ROOT = Path(__file__).resolve().parents[2]


def test_any_text_is_written_in_any_encoding(monkeypatch):
    for encoding, expected in (
        ("ascii", "p99 <= 2.0 s - 3.0 s x \\udcff \\u8a9e"),
        ("utf-8", "p99 ≤ 2.0 s – 3.0 s × \\udcff 語"),
    ):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", stream)
        write_any_text()
        print("p99 ≤ 2.0 s – 3.0 s × \udcff 語", end="", flush=True)
        assert stream.buffer.getvalue().decode(encoding) == expected


@pytest.mark.parametrize(
    "command",
    [["run.py", "--help"], ["run.py", "--hydra-help"], ["-m", "kvarena", "--help"],
     ["-m", "kvarena", "serve", "--help"], ["-m", "kvarena", "report", "--help"]],
    ids=" ".join,
)  # fmt: skip
@pytest.mark.parametrize("output", ["a reader that left", "a full disk"])
def test_output_that_nobody_takes_is_no_stack_trace(command, output):
    """`run.py --help | head`."""
    if output == "a full disk":
        file = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, file = os.pipe()
        os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, *command],
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
            check=False,
        )
    finally:
        os.close(file)
    said = ["warning: the output cannot be written (No space left on device); it is dropped"]
    assert done.stderr.splitlines() == (said if output == "a full disk" else [])
    assert done.returncode == 0


def test_a_package_that_is_not_installed_is_one_line():
    done = subprocess.run([sys.executable, "-S", "run.py"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith(f"error: {sys.executable} has no package ") and "type `make run`" in line
    assert missing_package(ModuleNotFoundError("no", name="engine.nowhere")) is None  # a bug keeps its trace
    assert missing_package(ImportError("cannot import name")) is None
