"""Text for streams that cannot take it: an ASCII terminal, a path whose name is no text, a reader that has left."""

from __future__ import annotations

import codecs
import contextlib
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


class _Output(io.FileIO):
    """stdout or stderr, which may end before the work does: what nobody can read any more is dropped.

    A reader that left (`| head`) is no error. Anything else, such as a full disk, is said once on stderr.
    """

    _said = False

    def write(self, data: object) -> int:
        try:
            return super().write(data)  # type: ignore[arg-type]
        except BrokenPipeError:
            pass
        except OSError as error:
            if not self._said and self.fileno() != 2:
                self._said = True
                with contextlib.suppress(OSError):
                    print(f"warning: the output cannot be written ({error.strerror}); it is dropped", file=sys.stderr)
        return memoryview(data).nbytes  # type: ignore[arg-type]


def write_any_text(*, logs: bool = False) -> None:
    """Let stdout and stderr take every text, whoever reads: what their encoding lacks is written plainly, what nobody
    reads is dropped, and neither is an error.

    Args:
        logs: they carry a server's log, whose handler counts and tells what is lost: only the encoding is seen to.
    """
    codecs.register_error(NAME, _replace)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, io.TextIOWrapper):
            continue
        if not logs and stream is getattr(sys, f"__{name}__"):  # not one that somebody else has put there
            stream = _tolerant(stream)
            setattr(sys, name, stream)
        stream.reconfigure(errors=NAME)


def _tolerant(stream: io.TextIOWrapper) -> io.TextIOWrapper:
    """The same stream, its bytes going through `_Output`. `stream` itself stays open, for it owns the file."""
    stream.flush()
    raw = _Output(stream.fileno(), "wb", closefd=False)
    buffered = raw if isinstance(stream.buffer, io.RawIOBase) else io.BufferedWriter(raw)
    return io.TextIOWrapper(
        buffered, stream.encoding, line_buffering=stream.line_buffering, write_through=stream.write_through
    )
