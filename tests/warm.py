"""Processes that start warm: forked from one that has imported what our commands need.

A fresh interpreter's imports of torch, transformers and the reports take 4 to 7 s of processor time, for every command
and, under a server, for its engine and each of its fronts. Here a worker's tests make them once. All else is as in a
process of its own: arguments, signals, exit code, what is printed, what is left when it dies. Some tests start the real
commands, so that a start from nothing stays tested; where there is a GPU all do, since CUDA does not survive a fork.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import sparing
import torch

ROOT = Path(__file__).resolve().parents[1]
IS_WARM = sys.platform == "linux" and not torch.cuda.is_available()
# In command lines of a server's engine and fronts: spawned ones, and forked ones.
PARTS = ("spawn_main", "multiprocessing.forkserver")


class WarmProcess:
    """`python COMMAND` with the interface of `subprocess.Popen`.

    Args:
        command: what follows `python`: a path that ends in run.py, or `-m` and a module whose `main()` gives the exit
            code; then the arguments.
        cwd: where it starts.
        stdout, stderr: files that it writes to.
        env: its environment.
    """

    def __init__(self, command: list[str], cwd: Path, stdout: Path, stderr: Path, env: Mapping[str, str]) -> None:
        _start_forkserver()
        module, argv = ("kvarena.experiments.entry", command) if command[0] != "-m" else (command[1], command[1:])
        module = "kvarena.experiments.cli" if module == "kvarena" else module
        self._process = multiprocessing.get_context("forkserver").Process(
            target=_run,
            args=(module, argv, str(cwd), str(stdout), str(stderr), dict(env), sparing.drawn, sparing.probed),
        )
        self._process.start()
        self.pid: int = self._process.pid  # type: ignore[assignment]
        self._command = command

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self._command, timeout or 0.0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()


def start(command: list[str], cwd: Path, stdout: Path, stderr: Path, env: Mapping[str, str] | None = None) -> Any:
    """A `WarmProcess`, or a `subprocess.Popen` where processes cannot start warm."""
    env = dict(os.environ if env is None else env)
    if IS_WARM:
        return WarmProcess(command, cwd, stdout, stderr, env)
    with stdout.open("ab") as out, stderr.open("ab") as err:
        return subprocess.Popen([sys.executable, *command], cwd=cwd, stdout=out, stderr=err, env=env)


def run(
    command: list[str], cwd: Path, timeout: float = 280.0, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run`, for what the process wrote."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        process = start(command, cwd, out, err, env)
        try:
            code = process.wait(timeout)
        finally:
            process.kill()
        return subprocess.CompletedProcess(command, code, out.read_text(), err.read_text())


def _start_forkserver() -> None:
    multiprocessing.get_context("forkserver").set_forkserver_preload(["tests.warm_imports"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(ROOT)
    try:
        forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before


def _run(
    module: str, argv: list[str], cwd: str, stdout: str, stderr: str, env: dict[str, str], drawn: bool, probed: bool
) -> None:
    """The process's main function."""
    gc.freeze()  # the libraries' objects are no garbage, and collections would copy their pages
    gc.enable()  # sparing.py had switched it off for a worker's imports
    for number, path in ((1, stdout), (2, stderr)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(env)
    time.tzset()
    sparing.set_for_test(is_drawn=drawn, is_probed=probed)
    os.chdir(cwd)
    sys.path[:0] = [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.argv = argv
    from kvarena.engine.server.processes.supervisor import Supervisor

    Supervisor._spawn = _fork_part  # type: ignore[method-assign]
    try:
        sys.exit(importlib.import_module(module).main())
    finally:
        # As where an interpreter ends: pools of processes end theirs. A forked one would wait for those first, which
        # are idle for five minutes (joblib's).
        threading._shutdown()


def _fork_part(_: Any, name: str, target: Callable[..., None], args: tuple[object, ...]) -> BaseProcess:
    """A server's engine or front, forked from its supervisor."""
    process = multiprocessing.get_context("fork").Process(target=_part, args=(target, args), name=name, daemon=True)
    process.start()
    return process


def _part(target: Callable[..., None], args: tuple[object, ...]) -> None:
    """As when spawned, a part holds no sockets but those that it is given: the others' deaths show in them."""
    given = set(_sockets_of(args))
    null = os.open(os.devnull, os.O_RDWR)
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the folder's own descriptor is closed by now
            if os.readlink(f"/proc/self/fd/{entry}").startswith("socket:") and int(entry) not in given:
                os.dup2(null, int(entry))  # not closed: the objects that own the numbers still exist
    os.close(null)
    target(*args)


def _sockets_of(value: object) -> Iterator[int]:
    if isinstance(value, socket.socket):
        yield value.fileno()
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _sockets_of(item)
