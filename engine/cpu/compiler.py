"""Compiles kernels for CPUs, keeps them on disk, and runs them on torch's own threads.

    kernel(function, "8q1d") --numba--> machine code --> cache folder of the user
    kernel(threads, *values) --packed--> one block of 8-byte words --> function(address), on every thread of a team

A kernel is a function of one address. It reads its arguments there, finds out which thread of how many it is
(`thread_id`, `num_threads`), and does that part. Threads come from the OpenMP runtime that torch has loaded: a second
pool beside it would compete for the same cores.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import struct
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding as llvm
import numba
import torch
from numba import types
from numba.core import event

_PARALLEL, _THREAD, _TEAM = "GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads"
_GIVE_WAY = "sched_yield"


def _find_openmp() -> Callable[..., Any] | None:
    """Make torch's OpenMP runtime known to compiled code; what starts a team of its threads, or None without one."""
    names = ("libtorch_cpu.so", "libtorch_cpu.dylib", "torch_cpu.dll")
    folder = Path(torch.__file__).parent / "lib"
    for path in (folder / name for name in names):
        if not path.exists():
            continue
        library = ctypes.CDLL(str(path))  # loaded already; its symbols are its dependencies' too
        try:
            found = {name: getattr(library, name) for name in (_PARALLEL, _THREAD, _TEAM, _GIVE_WAY)}
        except AttributeError:
            continue
        for name, function in found.items():
            llvm.add_symbol(name, ctypes.cast(function, ctypes.c_void_p).value)
        start = found[_PARALLEL]
        start.restype, start.argtypes = None, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint]
        return start
    return None


_start_team = _find_openmp()
if _start_team is None:  # one thread, which is number 0 of 1 and waits for nobody
    _alone = [ctypes.CFUNCTYPE(ctypes.c_int)(lambda value=value: value) for value in (0, 1, 0)]
    for _name, _function in zip((_THREAD, _TEAM, _GIVE_WAY), _alone, strict=True):
        llvm.add_symbol(_name, ctypes.cast(_function, ctypes.c_void_p).value)

# In compiled code: this thread's number, how many there are, and letting other threads have its core.
thread_id = types.ExternalFunction(_THREAD, types.int32())
num_threads = types.ExternalFunction(_TEAM, types.int32())
give_way = types.ExternalFunction(_GIVE_WAY, types.int32())


def most_threads() -> int:
    """Threads that a kernel may run on: torch's, or 1 where its threads cannot be had."""
    return torch.get_num_threads() if has_team() else 1


def has_team() -> bool:
    """Whether kernels can have torch's threads."""
    return _start_team is not None


class Kernel:
    """Compiled code. Calls from several Python threads at once are fine.

    Args:
        function: of one int64, the address of its arguments.
        layout: of the arguments: `q` for an integer or an address, `d` for a number; such as "6q2d".

    Attributes:
        address: of the compiled code, for others to call on a thread of a team.
        pack: the arguments of a call as the compiled code reads them.
        name: of the function.
    """

    def __init__(self, function: Callable[[int], None], layout: str) -> None:
        self.pack = struct.Struct(layout).pack
        self.name = function.__name__
        self._compiled = _compile(function)
        self.address: int = self._compiled.address
        self._run = ctypes.CFUNCTYPE(None, ctypes.c_char_p)(self.address)

    def __call__(self, threads: int, *values: float) -> None:
        """Run on so many threads and wait for them."""
        if threads == 1 or _start_team is None:
            self._run(self.pack(*values))
        else:
            _start_team(self.address, self.pack(*values), threads, 0)


def kernel(layout: str) -> Callable[[Callable[[int], None]], Kernel]:
    """A decorator that makes a `Kernel`. Of variables around the function only integers are kept apart on disk."""
    return lambda function: Kernel(function, layout)


def _compile(function: Callable[[int], None]) -> Any:
    config: Any = numba.config
    before, config.CACHE_DIR = config.CACHE_DIR, str(cache_folder())
    try:
        with event.install_listener("numba:run_pass", _Telling()):
            return numba.cfunc(types.void(types.int64), cache=True, error_model="numpy", fastmath=FAST)(function)
    finally:
        config.CACHE_DIR = before


# Sums may be reordered, so that they fill vectors. NaN and infinity stay what they are.
FAST = {"reassoc", "contract", "nsz", "arcp"}


class _Telling(event.Listener):
    """Says once that code is being compiled; what is read from disk fires no such event."""

    told = False

    def on_start(self, event: event.Event) -> None:  # noqa: ARG002
        """A pass of the compiler begins."""
        if not _Telling.told:
            _Telling.told = True
            print(
                f"compiling kernels for this CPU, once: they are kept in {cache_folder()}", file=sys.stderr, flush=True
            )

    def on_end(self, event: event.Event) -> None:
        """A pass has ended."""


@cache
def cache_folder() -> Path:
    """Where compiled kernels lie: with the user, a folder for each state of the sources and versions.

    In the system's folder for temporary files where the user's cannot be written.
    """
    digest = hashlib.sha256(f"{numba.__version__} {llvmlite.__version__} {sys.version}".encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvarena" / "kernels"
    folder = base / digest.hexdigest()[:16]
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    folder = (
        Path(tempfile.gettempdir()) / f"kvarena-kernels-{os.getuid() if hasattr(os, 'getuid') else 0}" / folder.name
    )
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder
