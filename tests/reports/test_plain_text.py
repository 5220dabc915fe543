"""A terminal that cannot write a character gets a plain spelling, never an error."""

import io
import sys

from reports.plain_text import write_any_text


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
