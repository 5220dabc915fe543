"""The other ranks of an engine, as the planning rank has them: how they are started, told, watched and ended.

Peers          what is common: calls and their answers, and what becomes of a failure
ThreadPeers    ranks that are threads of this process, for tests and for looking at it; CPU alone
"""

from __future__ import annotations

import queue
import threading
import time
from abc import abstractmethod
from typing import Any

import torch
import torch.distributed as dist

from kvarena.engine.errors import KvarenaError, RankFailed
from kvarena.engine.parallel.groups import Groups
from kvarena.engine.parallel.layout import Layout
from kvarena.engine.ranks.worker import Rank, RankFactory, call_message, work

LOOPBACK = "127.0.0.1"
START_SECONDS = 600.0
# How long a rank's own words may come after what they cause elsewhere: connections that close.
_REASON_SECONDS = 2.0
# What the libraries say when another rank has gone.
_LOST = ("Connection closed", "Timed out waiting", "Connection reset", "gloo", "NCCL")


class Peers:
    """The ranks beside the planning one.

    Args:
        layout: of the planning rank.
        check_plans: every rank compares what a step comes to with the planning rank.

    Attributes:
        groups: of the planning rank.
        failure: the line that says which rank failed and why; empty while none has.
    """

    groups: Groups

    def __init__(self, layout: Layout, *, check_plans: bool = False) -> None:
        self.layout, self.check_plans = layout, check_plans
        self.failure = ""
        self._failed = threading.Event()
        self._answers: queue.Queue[tuple[int, dict[str, Any]]] = queue.Queue()

    @abstractmethod
    def send(self, message: bytes) -> None:
        """To every other rank, in order."""

    @abstractmethod
    def close(self) -> None:
        """End them all; nothing of them is left. Idempotent."""

    def tell(self, name: str, **arguments: Any) -> None:
        """Let every other rank do something beside steps."""
        self.check()
        self.send(call_message(name, arguments))

    def answers(self) -> list[dict[str, Any]]:
        """Wait for one answer of each. Raises RankFailed."""
        found: dict[int, dict[str, Any]] = {}
        deadline = time.monotonic() + START_SECONDS
        while len(found) < self.layout.world_size - 1:
            self.check()
            try:
                rank, answer = self._answers.get(timeout=0.1)
            except queue.Empty:
                if time.monotonic() > deadline:
                    missing = sorted(set(range(1, self.layout.world_size)) - set(found))
                    self.fail(missing[0], f"it has not answered for {START_SECONDS:g} s")
                continue
            found[rank] = answer
        return [found[rank] for rank in sorted(found)]

    def ready(self) -> None:
        """Wait until all have loaded their parts; the planning rank has its own. Raises RankFailed."""
        self.answers()

    def opened(self, count: int) -> None:
        """So many steps more are in flight."""

    def check(self) -> None:
        """Raise RankFailed where a rank has failed."""
        if self.failure:
            raise RankFailed(self.failure)

    def fail(self, rank: int, reason: str) -> None:
        """A rank cannot go on: the first failure is the one that is told."""
        if not self.failure:
            self.failure = f"rank {rank} of {self.layout.world_size}: {reason}"
            self._failed.set()

    def note_lost(self, reason: str) -> None:
        """The planning rank has given up what the ranks compute together."""

    def failed(self, error: BaseException) -> RankFailed:
        """What to raise where the planning rank's step has failed: another rank's failure, if that is why."""
        if isinstance(error, RankFailed):
            return error
        # Out of memory and the like are its own; a lost connection is another's end, whose words may come later.
        own = isinstance(error, KvarenaError) and not _is_lost(error)
        if not own:
            self.note_lost(reason_of(error)[0])
            self._failed.wait(_REASON_SECONDS)
        self.fail(self.layout.rank, reason_of(error)[0])
        self.close()
        return RankFailed(self.failure)


def _is_lost(error: BaseException) -> bool:
    """Whether a collective failed, and not this rank's own work."""
    seen: BaseException | None = error
    while seen is not None:
        if any(word in str(seen) for word in _LOST):
            return True
        seen = seen.__cause__
    return False


def reason_of(error: BaseException) -> tuple[str, bool]:
    """Why a rank ended, in a line, and whether that is but another's end."""
    text = str(error) if isinstance(error, KvarenaError) else f"{type(error).__name__}: {error}"
    return text.splitlines()[0], _is_lost(error)


class ThreadPeers(Peers):
    """Ranks that are threads of this process.

    Args:
        layout: of the planning rank.
        factory: builds a rank.
        timeout: seconds after which a collective has failed.
        check_plans: see `Peers`.
    """

    def __init__(self, layout: Layout, factory: RankFactory, timeout: float, *, check_plans: bool = False) -> None:
        super().__init__(layout, check_plans=check_plans)
        store = dist.HashStore()
        self._queues: list[queue.Queue[bytes | None]] = [queue.Queue() for _ in range(layout.world_size - 1)]
        self._threads = [
            threading.Thread(target=self._run, args=(rank, factory, store, timeout), name=f"rank-{rank}", daemon=True)
            for rank in range(1, layout.world_size)
        ]
        self._loading = threading.Lock()
        for thread in self._threads:
            thread.start()
        self.groups = Groups(layout, store, torch.device("cpu"), LOOPBACK, timeout)
        # transformers loads with settings of the whole process: one rank at a time.
        self.answers()

    def _run(self, rank: int, factory: RankFactory, store: dist.Store, timeout: float) -> None:
        try:
            groups = Groups(self.layout.of(rank), store, torch.device("cpu"), LOOPBACK, timeout)
            with self._loading:
                built: Rank = factory(groups)
            inbox = _ThreadInbox(rank, self._queues[rank - 1], self._answers)
            inbox.answer()
            work(built, inbox)
        except Exception as error:
            reason, is_lost = reason_of(error)
            if is_lost:
                self._failed.wait(_REASON_SECONDS)
            self.fail(rank, reason)

    def ready(self) -> None:
        """See `Peers.ready`: they load before the planning rank does."""

    def send(self, message: bytes) -> None:
        """See `Peers.send`."""
        for one in self._queues:
            one.put(message)

    def close(self) -> None:
        """See `Peers.close`."""
        for one in self._queues:
            one.put(None)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(_REASON_SECONDS)


class _ThreadInbox:
    """See `Inbox`."""

    def __init__(self, rank: int, messages: queue.Queue[bytes | None], answers: queue.Queue[Any]) -> None:
        self._rank, self._messages, self._answers = rank, messages, answers

    def receive(self) -> bytes | None:
        """See `Inbox.receive`."""
        return self._messages.get()

    def answer(self, **values: Any) -> None:
        """See `Inbox.answer`."""
        self._answers.put((self._rank, values))
