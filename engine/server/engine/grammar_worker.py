"""The process beside a front that tries grammars out: one that never ends, or takes all memory, ends alone.

    front --(job: kind, text)--> worker --fork--> child: compile, first mask --(grammar or what is wrong)--> front

The worker holds the tokenizer and forks a child per job, which takes milliseconds. The kernel ends a child after
DEADLINE seconds of processor time. Jobs are fair to each other: each gets QUICK_SECONDS in the order of arrival; what
takes longer is stopped, and goes on two at a time with the lowest priority, so that slow ones hold up neither the quick
ones nor the server. Of those that wait to go on, MAX_PUT_OFF are kept. A job that nobody waits for any more is killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import resource
import selectors
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path

import msgpack

from kvarena.engine.errors import RequestError
from kvarena.engine.server.engine.grammars import GrammarCompiler
from kvarena.engine.server.shared.ipc import Link

DEADLINE = 1.0  # processor seconds of one job
QUICK_SECONDS = 0.1  # processor seconds after which a job is slow
MAX_PUT_OFF = 32
_MAX_QUICK, _MAX_SLOW = 2, 2
_MAX_MEMORY = 512 << 20  # bytes that a job may take beside what the worker has
_TICK = 0.02
_LOW_PRIORITY, _LOWEST_PRIORITY = 10, 19
_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
_PR_SET_PDEATHSIG = 1
# glibc gives memory back to the kernel and asks for it again, thousands of times in one job of a small process: such a
# job then takes three times as long.
_MALLOPT = {-1: 1 << 30, -2: 32 << 20, -3: 1 << 30}  # M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD

TOO_SLOW = f"it takes longer than {DEADLINE:g} s to compile; make it smaller"
TOO_LARGE = f"it takes more than {_MAX_MEMORY >> 20} MiB to compile; make it smaller"
BROKEN = "the grammar library failed on it"
BUSY = "too many constraints that are slow to compile wait for their turn"


class ToWorker(IntEnum):
    """Kinds of messages that a front sends."""

    JOB = 0  # number, kind, text
    STOP = 1  # number


@dataclass(eq=False)
class Job:
    """One grammar to try out; `pid` and `pipe` are those of its child, once it has one."""

    number: int
    kind: str
    text: str
    pid: int = 0
    pipe: int = -1
    answer: bytearray = field(default_factory=bytearray)


def _child(job: Job, pipe: int, work: Callable[[str, str], str]) -> None:
    """Do a job and write its answer: an error or an empty text, the grammar, seconds of processor time."""
    start = time.process_time()
    error, grammar = "", ""
    try:
        grammar = work(job.kind, job.text)
    except RequestError as fault:
        error = str(fault).encode("utf-8", "replace").decode()
    except MemoryError:
        error = f"the {job.kind} cannot be used: {TOO_LARGE}"
    # A panic of the library is no Exception; like any other fault of its own it is about this grammar.
    except BaseException as fault:
        error = f"the {job.kind} cannot be used: {BROKEN} ({type(fault).__name__})"
    data = memoryview(msgpack.packb((error, grammar, time.process_time() - start)))
    while data:
        data = data[os.write(pipe, data) :]


class Worker:
    """Runs jobs in children until the front's end of the socket closes.

    Args:
        sock: to the front.
        work: gives the grammar of (kind, text), or raises RequestError.
    """

    def __init__(self, sock: socket.socket, work: Callable[[str, str], str]) -> None:
        self._link, self._work = Link(sock), work
        self._selector = selectors.DefaultSelector()
        self._selector.register(sock, selectors.EVENT_READ, None)
        self._jobs: dict[int, Job] = {}
        self._new: deque[Job] = deque()
        self._quick: list[Job] = []
        self._put_off: deque[Job] = deque()
        self._slow: list[Job] = []
        self._null = os.open(os.devnull, os.O_RDWR)
        self._libc = ctypes.CDLL(None) if sys.platform == "linux" else None
        if self._libc is not None and hasattr(self._libc, "mallopt"):
            for parameter, value in _MALLOPT.items():
                self._libc.mallopt(parameter, value)
        self._memory = _virtual_bytes() + _MAX_MEMORY

    def run(self) -> None:
        """Serve."""
        while not self._link.closed:
            for key, _ in self._selector.select(_TICK if self._quick or self._link.num_queued_bytes else None):
                if key.data is None:
                    self._receive()
                else:
                    self._read(key.data)
            self._demote()
            self._fill_seats()
            self._link.flush()
        for job in list(self._jobs.values()):
            self._end(job)

    def _receive(self) -> None:
        for kind, *rest in self._link.receive():
            if kind == ToWorker.JOB:
                job = Job(*rest)
                self._jobs[job.number] = job
                self._new.append(job)
            elif rest[0] in self._jobs:
                self._end(self._jobs[rest[0]])

    def _fill_seats(self) -> None:
        while self._new and len(self._quick) < _MAX_QUICK:
            job = self._new.popleft()
            self._fork(job)
            self._quick.append(job)
        while self._put_off and len(self._slow) < _MAX_SLOW:
            job = self._put_off.popleft()
            os.kill(job.pid, signal.SIGCONT)
            self._slow.append(job)

    def _demote(self) -> None:
        """Put off the jobs that have had their time; an answer without error and grammar says that there is no room."""
        for job in list(self._quick):
            if _cpu_seconds(job.pid) > QUICK_SECONDS:
                self._quick.remove(job)
                if len(self._put_off) >= MAX_PUT_OFF:
                    self._end(job)
                    self._link.send((job.number, "", None, 0.0))
                    continue
                os.kill(job.pid, signal.SIGSTOP)
                os.setpriority(os.PRIO_PROCESS, job.pid, _LOWEST_PRIORITY)
                self._put_off.append(job)

    def _fork(self, job: Job) -> None:
        job.pipe, theirs = os.pipe()
        job.pid = os.fork()
        if not job.pid:
            # Nothing but _exit may end this branch: the worker's stack is not the child's to unwind.
            try:
                self._become_child()
                _child(job, theirs, self._work)
            finally:
                os._exit(0)
        os.close(theirs)
        self._selector.register(job.pipe, selectors.EVENT_READ, job)

    def _become_child(self) -> None:
        if self._libc is not None:
            self._libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        os.dup2(self._null, 0)
        os.dup2(self._null, 1)
        os.dup2(self._null, 2)  # what the library prints as it dies
        self._link.sock.close()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (self._memory, self._memory))
        signal.setitimer(signal.ITIMER_PROF, DEADLINE)

    def _read(self, job: Job) -> None:
        data = os.read(job.pipe, 1 << 18)
        if data:
            job.answer += data
            return
        status = self._end(job)
        try:
            error, grammar, seconds = msgpack.unpackb(bytes(job.answer))
        except ValueError:  # it died before it had said all
            slow = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGPROF
            large = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGABRT
            reason = TOO_SLOW if slow else TOO_LARGE if large else BROKEN
            error, grammar, seconds = f"the {job.kind} cannot be used: {reason}", "", DEADLINE
        self._link.send((job.number, error, grammar, seconds))

    def _end(self, job: Job) -> int:
        """Forget a job, and its child if it has one; returns how the child ended."""
        del self._jobs[job.number]
        for seats in (self._new, self._quick, self._put_off, self._slow):
            if job in seats:
                seats.remove(job)
        if not job.pid:
            return 0
        self._selector.unregister(job.pipe)
        os.close(job.pipe)
        with contextlib.suppress(ProcessLookupError):
            os.kill(job.pid, signal.SIGKILL)
        return os.waitpid(job.pid, 0)[1]


def _virtual_bytes() -> int:
    """Address space of this process."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except OSError:  # no procfs: not Linux
        return 1 << 40


def _cpu_seconds(pid: int) -> float:
    """Processor time of a child."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_SECOND


def main() -> None:
    """Serve the socket argv[1]; the file argv[2] holds the tokenizer, argv[3] the vocabulary's size and end tokens."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C reaches the whole group; the front's end is ours
    sock = socket.socket(fileno=int(sys.argv[1]))
    with open(int(sys.argv[2]), encoding="utf-8") as file:
        file.seek(0)
        tokenizer = file.read()
    vocab_size, eos_token_ids = json.loads(sys.argv[3])
    os.setpriority(os.PRIO_PROCESS, 0, _LOW_PRIORITY)
    compiler = GrammarCompiler(tokenizer, vocab_size, eos_token_ids)
    del tokenizer
    gc.collect()
    gc.freeze()  # children share these pages
    with contextlib.suppress(OSError):
        Worker(sock, compiler.try_out).run()


if __name__ == "__main__":
    main()
