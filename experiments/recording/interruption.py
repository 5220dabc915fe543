"""Ctrl-C, SIGTERM and SIGHUP: a run ends with its step and keeps what it measured; all else ends at once.

signal --> Signals --patient--> `number` is set, and whoever works looks at it when nothing is half done
                   --else-----> Interrupted, wherever the process is
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
AGAIN = 1.0  # seconds after the first signal from which on another one is meant to end what does not end by itself
NOTHING = "nothing had been measured"
PLAIN = r"[A-Za-z0-9_./:@%+-]+"  # what Hydra and a shell take unquoted


class Interrupted(KeyboardInterrupt):
    """A signal ended the work.

    Attributes:
        number: of the signal.
        kept: what of the work is kept, and where: a clause.
        setting: `hydra.run.dir` or `hydra.sweep.dir`, whose folder the same command goes on in; None: not known yet.
        folder: that folder.
    """

    def __init__(
        self, number: int, kept: str = NOTHING, setting: str | None = None, folder: Path | None = None
    ) -> None:  # fmt: skip
        super().__init__(number, kept, setting, folder)
        self.number, self.kept, self.setting, self.folder = number, kept, setting, folder

    def __str__(self) -> str:
        return f"interrupted by {name_of(self.number)}: {self.kept}"

    def line(self) -> str:
        """What happened, what is kept, and the command that goes on."""
        return f"{self}; go on with: {self._command()}"

    def _command(self) -> str:
        from kvarena.experiments.settings.command_line import program_of  # late: it imports Hydra

        program = Path(sys.argv[0])
        words = [*program_of(program, ("python", str(program))), *sys.argv[1:]]
        if self.folder is not None and not any(word.startswith(f"{self.setting}=") for word in words):
            folder = shown(self.folder)
            words.append(f"{self.setting}={folder}" if re.fullmatch(PLAIN, folder) else f"{self.setting}='{folder}'")
        return shlex.join(words)


def name_of(number: int) -> str:
    """The signal's name, such as SIGINT."""
    return signal.Signals(number).name


def shown(folder: Path) -> str:
    """A folder as a person would type it here."""
    relative = os.path.relpath(folder)
    return str(folder) if relative.startswith("..") else relative


def whole_cells(number: int, folder: str) -> str:
    """How many cells of a sweep or an experiment are whole, and what compares them."""
    if number == 0:
        return f"no cell of {folder} is whole"
    if number == 1:
        return f"1 cell of {folder} is whole (kvarena report {shlex.quote(folder)})"
    return f"{number} cells of {folder} are whole (kvarena report {shlex.quote(folder)} compares them)"


class Signals:
    """Takes SIGINT, SIGTERM and SIGHUP while its context lasts; a SIGHUP that the process ignores stays ignored.

    In a thread that is not the main one, where no signal arrives, it does nothing.

    Attributes:
        number: the first signal that came; None: none has.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._came = 0.0
        self._is_patient = self._is_sealed = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                # Under nohup SIGHUP is ignored, and stays so. SIGINT is where a shell without job control started the
                # command in the background, and who sends it to that means it.
                if number is not signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _take(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        insists = self.number is not None and now - self._came > AGAIN and not self._is_sealed
        if self.number is None:
            self.number, self._came = number, now
        if insists or not self._is_patient:
            raise Interrupted(self.number)

    @property
    def came(self) -> bool:
        """Whether a signal came."""
        return self.number is not None

    @contextmanager
    def patient(self, *, sealed: bool = False) -> Iterator[None]:
        """In the block a signal is only noted; with `sealed` also one that comes again, for the block is short."""
        before = self._is_patient, self._is_sealed
        self._is_patient, self._is_sealed = True, sealed
        try:
            yield
        finally:
            self._is_patient, self._is_sealed = before

    def hold(self, *, sealed: bool = False) -> None:
        """The same from here on, until `let_go` or the context's end."""
        self._is_patient, self._is_sealed = True, sealed

    def let_go(self) -> None:
        """A signal ends at once again what runs."""
        self._is_patient = self._is_sealed = False

    def wait(self, wait: Callable[[], None]) -> None:
        """Within `patient`: call `wait`, in which nothing is half done; a signal ends it, and that is no error."""
        before = self._is_patient
        self._is_patient = False
        try:
            if not self.came:
                wait()
        except Interrupted:
            pass
        finally:
            self._is_patient = before

    @contextmanager
    def released(self) -> Iterator[None]:
        """In the block signals do what they did before."""
        for number, before in self._before.items():
            signal.signal(number, before)
        try:
            yield
        finally:
            for number in self._before:
                signal.signal(number, self._take)

    def check(self, kept: str | None = None) -> None:
        """Raise Interrupted if a signal came."""
        if self.number is not None:
            raise Interrupted(self.number) if kept is None else Interrupted(self.number, kept)
