"""Watches ranks that run elsewhere: who ended, who is silent, whose last word it was. One rank's end is everyone's.

The watcher is a thread. It ends the other ranks, which frees the planning rank from a collective that it waits in; a
GPU that waits for a rank that is gone is never freed, and then the process ends.
"""

from __future__ import annotations

import contextlib
import os
import queue
import selectors
import socket
import sys
import threading
import time
from abc import abstractmethod
from typing import Any

import orjson
import torch
import torch.distributed as dist

from kvarena.engine.parallel.groups import Groups, arrive
from kvarena.engine.parallel.layout import Layout
from kvarena.engine.ranks.frames import receive_frame
from kvarena.engine.ranks.peers import Peers

SILENCE_SECONDS = 5.0
# Before the first step: libraries that are loaded from a slow disk let no other thread run.
START_SILENCE_SECONDS = 120.0
_LOOK_SECONDS = 0.1
# On GPUs, whose sums in graphs have no limit of their own: a rank may still compile for a new shape of steps.
STEP_SECONDS = 60.0
# How long the reason of a lost connection may come after it.
_REASON_SECONDS = 1.0
_STUCK_SECONDS = 3.0


class Watched:
    """The ranks, and what is known of them. Its thread holds no reference to the peers, so these may be dropped.

    Args:
        layout: of the planning rank.
        ends_process: where the planning rank cannot be freed, its process ends.

    Attributes:
        sockets: to each rank, by rank.
        answers: that they gave.
        failure: see `Peers`.
        failed: set with it.
        seen: the planning rank knows of it.
        num_open: steps whose result is not there.
        has_stepped: a step's result has been there.
        changed: when either last changed.
    """

    def __init__(self, layout: Layout, ends_process: bool) -> None:
        self.world_size = layout.world_size
        self.sockets: list[socket.socket] = []
        self.answers: queue.Queue[tuple[int, dict[str, Any]]] = queue.Queue()
        self.failure = ""
        self.failed, self.seen = threading.Event(), threading.Event()
        self.num_open, self.has_stepped, self.changed = 0, False, 0.0
        self.beats: dict[int, float] = {}
        # Who gave up waiting for the others, when, and how it said so.
        self._lost: dict[int, tuple[float, str]] = {}
        self._closing = False
        self._ends_process = ends_process
        self._looked = self._since = 0.0

    def opened(self, count: int) -> None:
        """So many steps more are in flight; fewer: their results are there."""
        self.num_open += count
        self.has_stepped |= count < 0
        self.changed = time.monotonic()

    @abstractmethod
    def why_ended(self, rank: int) -> str:
        """What to say of a rank whose socket is closed."""

    @abstractmethod
    def name_of(self, rank: int) -> str:
        """What a rank is, for a sentence."""

    @abstractmethod
    def kill(self) -> None:
        """End all ranks at once."""

    @abstractmethod
    def wait(self) -> None:
        """Wait a moment for ranks that end by themselves, and end the others."""

    def last_beat(self, rank: int) -> float:
        """When a rank last said that it runs; 0: not yet."""
        return self.beats.get(rank, 0.0)

    def behind(self) -> int:
        """The rank that has taken the fewest of the planning rank's messages; that one itself where none is behind."""
        return 0

    def watch(self) -> None:
        """The thread's function."""
        with selectors.DefaultSelector() as selector:
            for rank, sock in enumerate(self.sockets, 1):
                selector.register(sock, selectors.EVENT_READ, rank)
            while not self._closing and not self.failure:
                for key, _ in selector.select(_LOOK_SECONDS):
                    if not self._take(key.data, receive_frame(self.sockets[key.data - 1])):
                        selector.unregister(key.fileobj)
                self._look()
        is_busy = self.num_open or not self.has_stepped  # idle, it asks before its next step
        if self.failure and self._ends_process and is_busy and not self.seen.wait(_STUCK_SECONDS):
            print(f"error: {self.failure}", file=sys.stderr, flush=True)
            os._exit(1)

    def _take(self, rank: int, frame: bytes | None) -> bool:
        """What a rank said; False when it will say no more."""
        if frame is None:
            if not (self._closing or self.failure or rank in self._lost):
                self.fail(rank, self.why_ended(rank))
            return False
        message = orjson.loads(frame)
        if "answer" in message:
            self.answers.put((rank, message["answer"]))
        elif "beat" in message:
            self.beats[rank] = time.monotonic()
        elif message["is_lost"]:
            self.note_lost(rank, message["error"])
        else:
            self.fail(rank, message["error"])
        return True

    def _look(self) -> None:
        """Who is silent, and whose lost connection nobody else explains."""
        now = time.monotonic()
        # A machine that stood still silences all: hearts get their time again.
        if now - self._looked > 1.0:
            self._since = now
        self._looked = now
        limit = SILENCE_SECONDS if self.has_stepped else START_SILENCE_SECONDS
        for rank in range(1, self.world_size):
            beat = self.last_beat(rank)
            if beat and now - max(beat, self._since) > limit:
                self.fail(rank, f"{self.name_of(rank)} has been silent for {now - beat:.1f} s: it is stopped or frozen")
                return
        if self._ends_process and self.has_stepped and self.num_open:
            waited = now - max(self.changed, self._since)
            if waited > STEP_SECONDS:
                self.fail(
                    self.behind(), f"a step has not ended for {waited:.0f} s: a device hangs, or waits for another"
                )
                return
        if self._lost and now - min(when for when, _ in self._lost.values()) > _REASON_SECONDS:
            self.fail(*self._who_is_missing())

    def note_lost(self, rank: int, reason: str) -> None:
        """A rank has given up what the ranks compute together: not its own fault, as far as it knows."""
        self._lost.setdefault(rank, (time.monotonic(), reason))

    def _who_is_missing(self) -> tuple[int, str]:
        """The rank that the others waited for, who has not given up itself; else the first that gave up."""
        first = min(self._lost, key=lambda rank: self._lost[rank])
        reason = self._lost[first][1]
        missing = sorted(set(range(self.world_size)) - set(self._lost))
        if not missing:
            return first, reason
        return missing[0], f"it has not come to what the ranks compute together (rank {first}: {reason})"

    def fail(self, rank: int, reason: str) -> None:
        """The first failure is told; all ranks end."""
        if not self.failure and not self._closing:
            self.failure = f"rank {rank} of {self.world_size}: {reason}"
            self.kill()
            self.failed.set()

    def end(self) -> None:
        """End the ranks: those that can, of their own accord."""
        self._closing = True
        for sock in self.sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        self.wait()


class WatchedPeers(Peers):
    """Ranks that run elsewhere.

    Args:
        layout: of the planning rank.
        watched: the ranks.
        timeout: seconds after which a collective has failed.
        check_plans: see `Peers`.
    """

    def __init__(self, layout: Layout, watched: Watched, timeout: float, *, check_plans: bool) -> None:
        self.watched = watched
        super().__init__(layout, check_plans=check_plans)
        self.timeout = timeout
        self._answers, self._failed = watched.answers, watched.failed

    def meet(self, store: dist.Store, device: str, host: str) -> None:
        """Begin to watch, and make this rank's groups together with the others. Raises RankFailed."""
        threading.Thread(target=self.watched.watch, name="ranks", daemon=True).start()
        try:
            own = torch.device("cuda", 0) if device == "cuda" else torch.device("cpu")
            arrive(store, self.layout, self.check)
            self.groups = Groups(self.layout, store, own, host, self.timeout)
        except Exception as error:
            raise self.failed(error) from error

    @property
    def failure(self) -> str:
        """See `Peers`."""
        return self.watched.failure

    @failure.setter
    def failure(self, text: str) -> None:
        if text:
            self.watched.failure = text

    def opened(self, count: int) -> None:
        """See `Peers.opened`."""
        self.watched.opened(count)

    def check(self) -> None:
        """See `Peers.check`."""
        if self.failure:
            self.watched.seen.set()
        super().check()

    def fail(self, rank: int, reason: str) -> None:
        """See `Peers.fail`."""
        self.watched.fail(rank, reason)

    def note_lost(self, reason: str) -> None:
        """See `Peers.note_lost`."""
        self.watched.note_lost(self.layout.rank, reason)

    def close(self) -> None:
        """See `Peers.close`."""
        self.watched.seen.set()
        self.watched.end()
        if not self.failure:  # a device may still wait for a rank that is gone
            self.groups.close()
