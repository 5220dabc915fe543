"""The process that writes a server's recording; `WriterProcess` starts it (recorder.py).

    engine --frames over a pipe--> Window --every so often, whole--> FOLDER

It ends when the pipe does, however the engine ends, and writes what it has got by then. Signals that are meant for the
server leave it alone. Files are for this user's eyes alone.
"""

from __future__ import annotations

import os
import pickle
import select
import signal
import struct
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from kvarena.engine.errors import KvarenaError
from kvarena.experiments.folders.recordings import claim, set_aside
from kvarena.experiments.folders.run_folder import put_files
from kvarena.experiments.recording.served.window import Bounds, Frame, Window
from kvarena.reports.reading.errors import NotWritten

LENGTH = struct.Struct(">Q")
WRITE_EVERY = 10.0  # seconds at least between two writings
MOST_SHARE = 0.02  # of the time that writing may take
READ_BYTES = 1 << 20
PRIVATE_FILES = 0o077  # what the mode of a new file leaves out
NICE = 10


class Opening(NamedTuple):
    """The first thing that the engine sends.

    Attributes:
        manifest: what is known before the first request.
        bounds: how much is kept.
        epoch: the wall clock when the engine's stood at 0, in seconds.
    """

    manifest: dict[str, Any]
    bounds: Bounds
    epoch: float


GOODBYE = "goodbye"  # the last thing that an engine sends which ends of its own accord


class Pipe:
    """What comes over a pipe: pickled objects, each behind its length.

    Args:
        file: descriptor of its end.
    """

    def __init__(self, file: int) -> None:
        self._file, self._buffer, self.has_ended = file, bytearray(), False

    def wait(self, seconds: float) -> Iterator[Any]:
        """What has come after at most so many seconds; `has_ended` tells that nothing will any more."""
        if not select.select([self._file], [], [], max(0.0, seconds))[0]:
            return
        data = os.read(self._file, READ_BYTES)
        self.has_ended = not data
        self._buffer += data
        while len(self._buffer) >= LENGTH.size:
            end = LENGTH.size + LENGTH.unpack_from(self._buffer)[0]
            if len(self._buffer) < end:
                return
            yield pickle.loads(memoryview(self._buffer)[LENGTH.size : end].tobytes())
            del self._buffer[:end]


def packed(message: Any) -> bytes:
    """An object as `Pipe` reads it."""
    data = pickle.dumps(message, protocol=5)
    return LENGTH.pack(len(data)) + data


class Writer:
    """Keeps a window and writes it.

    Args:
        folder: whose files are replaced.
        say: told in one line what went wrong.
        clock: seconds.
    """

    def __init__(self, folder: Path, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._folder, self._say, self._clock = folder, say, clock
        self._opening: Opening | None = None
        self._window: Window | None = None
        self._is_new = False  # since the last writing
        self._due = 0.0
        self._has_written = self._has_said_goodbye = False

    def take(self, message: Any) -> None:
        """Something has come."""
        if isinstance(message, Opening):
            self._opening, self._window = message, Window(message.bounds)
        elif message == GOODBYE:
            self._has_said_goodbye = True
        else:
            assert isinstance(message, Frame) and self._window is not None
            self._window.add(message)
            self._is_new = True

    @property
    def seconds_left(self) -> float:
        """Until there is something to do."""
        return self._due - self._clock() if self._is_new else WRITE_EVERY

    def write_if_due(self) -> None:
        """Write what is new, now and then."""
        if self._is_new and self._clock() >= self._due:
            begin = self._clock()
            self.write(is_end=False)
            now = self._clock()
            self._due = now + max(WRITE_EVERY, (now - begin) / MOST_SHARE)

    def write(self, *, is_end: bool) -> None:
        """Write all; nothing without a request. What cannot be written is said, and tried again later."""
        window, opening = self._window, self._opening
        if window is None or opening is None or not len(window):
            return
        manifest: dict[str, Any] = {}

        def write(folder: Path) -> None:
            manifest.update(self._manifest(opening, window, window.write(folder), is_end))

        try:
            if not self._has_written:
                set_aside(self._folder)
            put_files(self._folder, manifest, write, keeps_report=True)
            self._is_new, self._has_written = False, True
        except (NotWritten, OSError) as error:
            self._say(f"the recording cannot be written: {error}")

    def _manifest(self, opening: Opening, window: Window, found: dict[str, Any], is_end: bool) -> dict[str, Any]:
        """The whole manifest (docs/files.md)."""
        bounds = opening.bounds
        count, num_open = found["num_requests"], found["num_open"]
        dropped = {"steps": window.num_dropped_steps, "requests": window.num_dropped_requests}
        seconds, wall = window.seconds, found["wall_time"]
        end = "going on" if not is_end else "orderly" if self._has_said_goodbye else "cut off"
        age = wall + (found["zero"] if any(dropped.values()) else 0.0)
        run = {
            "ended": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "wall_time": wall,
            "num_steps": found["num_steps"],
            "peak_rss_bytes": None,
            "max_lateness": found["max_lateness"],
            "lateness_bound": None,
            "warmup_time": 0.0,
            "processor_seconds": None if any(dropped.values()) else window.processor_seconds,
            "recorded": "full",
            "recording": {"seconds": seconds, "share": seconds / age if age > 0 else 0.0},
            "interrupted": None,
        }
        said = f"{count} requests as they were served"
        if any(dropped.values()):
            said += f"; the oldest {dropped['requests']} and {dropped['steps']} steps were dropped"
        if bounds.content == "hashes":
            said += "; of prompts and outputs only hashes and lengths"
        if end == "cut off":
            said += f"; the server was ended from outside, with {num_open} of them open"
        return opening.manifest | {
            "workload": {"name": "served", "seed": 0, "num_requests": count, "description": said},
            "run": run,
            "recording": {
                "begin": datetime.fromtimestamp(opening.epoch + found["zero"], UTC).isoformat(timespec="milliseconds"),
                "content": bounds.content,
                "block_size": bounds.block_size,
                "max_bytes": bounds.max_bytes,
                "max_seconds": bounds.max_seconds,
                "dropped": dropped,
                "num_open": num_open,
                "has_bound": found["has_bound"],
                "num_not_greedy": found["num_not_greedy"],
                "end": end,
            },
        }


def main(argv: list[str]) -> int:
    """Write what comes over standard input into the folder that is named; returns the exit code."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.umask(PRIVATE_FILES)
    os.nice(NICE)
    folder = Path(argv[0])

    def say(line: str) -> None:
        print(f"error: {folder}: {line}", file=sys.stderr, flush=True)

    try:
        with claim(folder):
            pipe, writer = Pipe(sys.stdin.fileno()), Writer(folder, say)
            while not pipe.has_ended:
                for message in pipe.wait(writer.seconds_left):
                    writer.take(message)
                writer.write_if_due()
            writer.write(is_end=True)
    except KvarenaError as error:
        say(str(error))
        return 1
    return 0
