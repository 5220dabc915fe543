"""What a server's processes hold (resident memory, open files, threads), and what holds up a front's event loop."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import psutil
from server_harness import PATIENCE, RunningServer

MEMORY_BOUND = 0.02
# asyncio starts the threads of a front's pool when they are first needed at once, and keeps them.
_POOL_THREADS = min(32, (os.cpu_count() or 1) + 4)


@dataclass(frozen=True)
class Footprint:
    """Sums over a server's processes. `rss` in bytes."""

    rss: int
    num_fds: int
    num_threads: int

    @classmethod
    def of(cls, server: RunningServer) -> Footprint:
        """Of an idle server, now."""
        watched = [psutil.Process(server.process.pid), *server.parts()]
        return cls(
            sum(process.memory_info().rss for process in watched),
            sum(process.num_fds() for process in watched),
            sum(process.num_threads() for process in watched),
        )

    def is_flat(self, before: Footprint) -> bool:
        """Nothing grew since `before`: memory by 2 % at most, files not at all, threads within a pool."""
        return (
            self.rss <= before.rss * (1 + MEMORY_BOUND)
            and self.num_fds <= before.num_fds
            and self.num_threads <= before.num_threads + _POOL_THREADS
        )


def assert_flat(server: RunningServer, before: Footprint) -> None:
    """The server is idle, its pool whole, and it holds no more than `before`; closed connections may take a moment."""
    server.wait_idle()
    deadline = time.monotonic() + PATIENCE
    while not (after := Footprint.of(server)).is_flat(before):
        assert time.monotonic() < deadline, f"memory grew by {after.rss / before.rss - 1:.1%}: {before}, then {after}"
        time.sleep(0.2)
    assert server.metrics()["kvarena:open_requests"] == 1  # the one that asks


@contextlib.contextmanager
def loop_is_not_held_up(server: RunningServer, seconds: float = 0.5) -> Iterator[None]:
    """Probes `/health` meanwhile: while one is on its way, the front's event loop computes for less than `seconds`.

    Its main thread's processor time: a probe waits for what the loop does, and not for the front's other threads, nor
    for whoever shares the machine.
    """
    front = server.front()
    spent: list[float] = []
    done = threading.Event()

    def computed() -> float:
        return next(one.user_time + one.system_time for one in front.threads() if one.id == front.pid)

    def probe() -> None:
        with httpx.Client(base_url=server.url, timeout=PATIENCE) as client:
            while not (spent and done.wait(0.02)):
                before = computed()
                assert client.get("/health").status_code == 200
                spent.append(computed() - before)

    thread = threading.Thread(target=probe)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    # One probe may go out just before the server reads a body, and come in behind its answer.
    held = sorted(spent)[-2:][0]
    assert held < seconds, f"a probe waited for {held:.2f} s of the loop's work"
