"""Text for streams that cannot write every character: an ASCII terminal, a path whose name is no text."""

from __future__ import annotations

import codecs
import io
import sys

NAME = "kvarena-plain"
PLAIN = {
    "×": "x", "–": "-", "—": "-", "−": "-", "≤": "<=", "≥": ">=", "±": "+-", "·": "-", "…": "...", "→": "->", "µ": "u",
    "“": '"', "”": '"', "‘": "'", "’": "'", "\N{NO-BREAK SPACE}": " ", "\N{THIN SPACE}": " ",
    "\N{NARROW NO-BREAK SPACE}": " ",
}  # fmt: skip


def _replace(error: UnicodeError) -> tuple[str, int]:
    """What stands in for characters that an encoding lacks: a plain spelling, else the escape."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    plain = (PLAIN.get(one) or one.encode("ascii", "backslashreplace").decode("ascii") for one in missing)
    return "".join(plain), error.end


def write_any_text() -> None:
    """Let stdout and stderr take every text: what their encoding lacks is written plainly, and never an error."""
    codecs.register_error(NAME, _replace)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=NAME)
