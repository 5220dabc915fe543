"""What a server's processes hold: resident memory, open files, threads."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

from server_harness import PATIENCE, RunningServer

from kvarena.experiments.benchmarks.soak import processes

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
        watched = processes(server.process.pid)
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
