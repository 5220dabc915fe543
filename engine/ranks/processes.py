"""Ranks that are processes of this machine: plans go through shared memory, answers and failures over a socket.

planning rank ---- ring (shared memory) ----> rank 1, rank 2, ...
              <--- answers, a last word -----
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
import weakref
from datetime import timedelta

import torch.distributed as dist

from kvarena.engine.parallel.layout import Layout
from kvarena.engine.ranks.child import Start
from kvarena.engine.ranks.frames import send_frame
from kvarena.engine.ranks.peers import LOOPBACK
from kvarena.engine.ranks.ring import RingPage, RingWriter, SlowReader, make_page
from kvarena.engine.ranks.watch import Watched, WatchedPeers
from kvarena.engine.ranks.worker import RankFactory

_CODE = (
    "import sys; sys.path[:] = {path!r}; from kvarena.engine.ranks.child import main; main({answers}, {bell}, {page})"
)


class _WatchedProcesses(Watched):
    """Processes, and what is known of them."""

    def __init__(self, layout: Layout, page: RingPage, ends_process: bool) -> None:
        super().__init__(layout, ends_process)
        self.page = page
        self.processes: list[subprocess.Popen[bytes]] = []
        self.bells: list[socket.socket] = []

    def last_beat(self, rank: int) -> float:
        """See `Watched.last_beat`."""
        return self.page.last_beat(rank - 1)

    def behind(self) -> int:
        """See `Watched.behind`."""
        unread = [self.page.written() - self.page.read_by(reader) for reader in range(self.page.num_readers)]
        return unread.index(max(unread)) + 1 if any(unread) else 0

    def why_ended(self, rank: int) -> str:
        """See `Watched.why_ended`."""
        process = self.processes[rank - 1]
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1.0)
        code = process.returncode
        why = ": killed, as a system does that is out of memory" if code == -signal.SIGKILL else ""
        return f"{self.name_of(rank)} has ended with code {code}{why}"

    def name_of(self, rank: int) -> str:
        """See `Watched.name_of`."""
        return f"its process {self.processes[rank - 1].pid}"

    def kill(self) -> None:
        """See `Watched.kill`."""
        for process in self.processes:
            with contextlib.suppress(OSError):
                process.kill()

    def wait(self) -> None:
        """See `Watched.wait`."""
        for bell in self.bells:
            with contextlib.suppress(OSError):
                bell.shutdown(socket.SHUT_RDWR)
        deadline = time.monotonic() + 2.0
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
        self.kill()
        for process in self.processes:
            process.wait()


class ProcessPeers(WatchedPeers):
    """The other ranks as processes of this machine.

    Args:
        layout: of the planning rank.
        factory: builds a rank in its process; must pickle.
        device: cpu or cuda.
        timeout: seconds after which a collective has failed.
        check_plans: see `Peers`.

    Raises:
        RankFailed: one has ended while it started.
    """

    def __init__(
        self, layout: Layout, factory: RankFactory, device: str, timeout: float, *, check_plans: bool = False
    ) -> None:
        file = make_page()
        page = RingPage(file, layout.world_size - 1)
        self._processes = watched = _WatchedProcesses(layout, page, ends_process=device == "cuda")
        super().__init__(layout, watched, timeout, check_plans=check_plans)
        weakref.finalize(self, watched.end)
        store = dist.TCPStore(LOOPBACK, 0, None, True, timedelta(seconds=60), wait_for_workers=False)
        spin = 2e-4 if device == "cuda" else 0.0
        for rank in range(1, layout.world_size):
            self._start(Start(factory, layout.of(rank), device, LOOPBACK, store.port, timeout, spin), file)
        os.close(file)
        self._writer = RingWriter(page, watched.bells, check=self.check)
        self.meet(store, device, LOOPBACK)

    def _start(self, start: Start, page: int) -> None:
        answers, theirs = socket.socketpair()
        bell, their_bell = socket.socketpair()
        code = _CODE.format(path=sys.path, answers=theirs.fileno(), bell=their_bell.fileno(), page=page)
        env = dict(os.environ)
        if start.device == "cpu":
            # All ranks together take the cores once.
            env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // start.layout.world_size)))
        with theirs, their_bell:
            files = (theirs.fileno(), their_bell.fileno(), page)
            process = subprocess.Popen([sys.executable, "-c", code], pass_fds=files, stdin=subprocess.DEVNULL, env=env)
        self._processes.processes.append(process)
        self._processes.sockets.append(answers)
        self._processes.bells.append(bell)
        with contextlib.suppress(OSError):  # one that has ended is found by the watcher
            send_frame(answers, pickle.dumps(start))

    @property
    def pids(self) -> list[int]:
        """Of the other ranks' processes, by rank."""
        return [process.pid for process in self._processes.processes]

    def send(self, message: bytes) -> None:
        """See `Peers.send`."""
        try:
            self._writer.send(message)
        except SlowReader as error:
            self.fail(error.reader + 1, "it has stopped reading what the ranks are to do")
            self.check()
