"""The stub engine's server with a wall clock that a test steps: `--clock FILE` holds the seconds to add.

Its processes are spawned, and a spawned process imports this module as its main module before anything else: so the
clock is replaced in all of them. The monotonic clock is left alone, as an operator's or NTP's step leaves it.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

FLAG = "--clock"


def write_offset(file: Path, seconds: int) -> None:
    """Step the clock of the server that reads `file`."""
    fresh = file.with_suffix(".new")
    fresh.write_text(str(seconds))
    os.replace(fresh, file)


def _install(file: Path) -> None:
    real, real_ns = time.time, time.time_ns

    def offset() -> int:
        return int(file.read_text()) if file.exists() else 0

    time.time = lambda: real() + offset()
    time.time_ns = lambda: real_ns() + offset() * 10**9


def main() -> int:
    """Serve; a warm process's parts are forked, and have the clock of it."""
    from kvarena.experiments.serving.stub_engine import main as serve

    at = sys.argv.index(FLAG)
    if __name__ != "__main__":
        _install(Path(sys.argv[at + 1]))
    # The children see the whole command line.
    return serve(sys.argv[1:at] + sys.argv[at + 2 :])


if __name__ in ("__main__", "__mp_main__"):
    _install(Path(sys.argv[sys.argv.index(FLAG) + 1]))

if __name__ == "__main__":
    sys.exit(main())
