"""A rank that does not plan: it reads messages and does what they say, until there are no more."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, cast

import numpy as np
import orjson

from kvarena.engine.contract import KVAllocator, ScheduledRequest
from kvarena.engine.errors import EngineError
from kvarena.engine.parallel.groups import Groups
from kvarena.engine.ranks.plans import CALL, Mirror, checksum
from kvarena.engine.request import Request
from kvarena.engine.runner.request_rows import RequestRows
from kvarena.engine.runner.torch_runner import TorchRunner


class Inbox(Protocol):
    """Where a rank's messages come from, and where its answers go."""

    def receive(self) -> bytes | None:
        """The next message; None: there will be no more."""
        ...

    def answer(self, **values: Any) -> None:
        """To the planning rank."""
        ...


class Rank(Protocol):
    """What is built for a rank: whatever the calls name, and a runner once it is prepared."""

    groups: Groups

    @property
    def runner(self) -> TorchRunner | None:
        """Executes the steps."""
        ...

    @property
    def block_size(self) -> int:
        """Of the pool."""
        ...

    def call(self, name: str, arguments: dict[str, Any]) -> dict[str, Any] | None:
        """Do what the planning rank does too; what to answer, or None for nothing."""
        ...


class MirroredRows(RequestRows):
    """The rows of a rank that does not plan: the planning rank's numbers, so a step's come with its message."""

    def of_step(self, scheduled: Sequence[ScheduledRequest], allocator: KVAllocator) -> np.ndarray:
        """As `RequestRows.of_step`; of a whole step nothing is looked up or compared that the message has said."""
        mirror = cast(Mirror, allocator)
        if scheduled is not mirror.scheduled:  # a stage's part of it
            return super().of_step(scheduled, allocator)
        for row, req in mirror.new.items():
            if req.request_id not in self._rows:
                self._add(req)
            self.tables.update(row, mirror.block_table(req))
        for row in mirror.changed:
            self.tables.update(row, mirror.table(row))
        mirror.new.clear()
        mirror.changed.clear()
        return mirror.rows

    def _free_row(self, req: Request) -> int:
        row = int(req.request_id)
        while row >= self.num_rows:
            self._grow()
        return row

    def release(self, request_ids: Iterable[str]) -> None:
        """As `RequestRows.release`; which rows are free is the planning rank's to know."""
        super().release(request_ids)
        self._free.clear()


RankFactory = Callable[[Groups], Rank]


def call_message(name: str, arguments: dict[str, Any]) -> bytes:
    """A message that is no step."""
    return bytes([CALL]) + orjson.dumps([name, arguments])


def work(rank: Rank, inbox: Inbox) -> None:
    """Serve until the planning rank has no more to say.

    Raises:
        Exception: whatever a step raises; the ranks cannot go on then.
    """
    mirror: Mirror | None = None
    while (message := inbox.receive()) is not None:
        if message[0] == CALL:
            name, arguments = orjson.loads(message[1:])
            answer = rank.call(name, arguments)
            if name == "prepare":
                mirror = Mirror(rank.block_size)
            if answer is not None:
                inbox.answer(**answer)
            continue
        assert mirror is not None
        assert rank.runner is not None
        _step(rank.runner, mirror, message)


def _step(runner: TorchRunner, mirror: Mirror, message: bytes) -> None:
    gone, plan, step, expected = mirror.read(message)
    runner.release(gone)
    if expected:
        found = checksum(plan, [mirror.block_table(entry.req) for entry in plan.scheduled], mirror.block_size)
        if found != expected:
            raise EngineError(
                f"its plan of step {step} is another one than the planning rank's (checksum {found:08x}, not "
                f"{expected:08x})"
            )
    # Of an allocator a runner asks block tables alone. Nobody waits: the devices are in step by what they exchange.
    runner.execute(plan, cast(KVAllocator, mirror))
