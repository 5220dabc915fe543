"""What an operator orders an engine to do: pause, resume, end requests, empty the prefix cache.

    pause keep     nothing is stepped; requests come in and wait, and go on when the engine resumes
    pause wait     new requests are refused; told to be done once those that were there have ended
    pause abort    new requests are refused; those that were there end with the reason `abort`

The modes and their names are vLLM's. Orders come over the fronts' sockets, in line with the requests.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import Any, NamedTuple

from kvarena.engine.core import Engine
from kvarena.engine.request import Request
from kvarena.engine.server.engine.intake import Intake
from kvarena.engine.server.shared.ipc import ABORTED
from kvarena.engine.server.shared.metrics import PAUSED, Row


class Pause(IntEnum):
    """How an engine stands still, as `kvarena:engine_paused` shows it."""

    NONE = 0
    KEEP = 1
    REFUSE = 2


class Reply(NamedTuple):
    """An order that is done: whose it was, and what came of it."""

    front: int
    token: int
    result: dict[str, Any]


class _Leaving(NamedTuple):
    """A pause that waits until all requests have ended."""

    front: int
    token: int
    clears: bool


class Orders:
    """Does what is ordered, and knows whether the engine stands still.

    Args:
        engine: of this process.
        intake: its requests; it hands orders over.
        row: the engine's metrics.
        finish: tells a front that a request has ended.
        pause: how it begins: as the other engines of its server stand.

    Attributes:
        replies: what is told when the step's frames have been sent; the loop empties it.
    """

    def __init__(
        self, engine: Engine, intake: Intake, row: Row, finish: Callable[[Request], None], pause: Pause = Pause.NONE
    ) -> None:
        self._engine, self._intake, self._row, self._finish = engine, intake, row, finish
        self._leaving: list[_Leaving] = []
        self.replies: list[Reply] = []
        intake.on_order = self.obey
        self._set(pause)

    @property
    def is_frozen(self) -> bool:
        """Whether no step is to be made."""
        return self._pause is Pause.KEEP

    def obey(self, front: int, token: int, kind: str, given: dict[str, Any]) -> None:
        """Do what is ordered; a pause that waits is told later. Raises KeyError: no such order."""
        orders: dict[str, Callable[..., dict[str, Any] | None]]
        orders = {"pause": self._pause_by, "resume": self._resume, "abort": self._abort, "reset": self._reset}
        result = orders[kind](front, token, **given)
        if result is not None:
            self.replies.append(Reply(front, token, result))

    def settle(self) -> None:
        """Tell those that wait for the last request's end; comes after each step."""
        if self._leaving and self._is_empty:
            if any(one.clears for one in self._leaving):
                self._engine.allocator.clear_cache()
            self._answer_leaving({})

    def drop_front(self, front: int) -> None:
        """A front is gone: nobody waits for its orders' ends."""
        self._leaving = [one for one in self._leaving if one.front != front]
        self.replies = [one for one in self.replies if one.front != front]

    @property
    def _is_empty(self) -> bool:
        return not self._intake.requests and not self._intake.num_parked

    def _set(self, pause: Pause) -> None:
        self._pause = pause
        self._intake.refuses = pause is Pause.REFUSE
        self._row.set(PAUSED, pause)

    def _answer_leaving(self, result: dict[str, Any]) -> None:
        self.replies += [Reply(front, token, result) for front, token, _ in self._leaving]
        self._leaving.clear()

    def _pause_by(self, front: int, token: int, mode: str, clear_cache: bool) -> dict[str, Any] | None:
        self._set(Pause.KEEP if mode == "keep" else Pause.REFUSE)
        if mode == "keep":
            return {}
        if mode == "abort":
            self._end(None)
        self._leaving.append(_Leaving(front, token, clear_cache))
        return None

    def _resume(self, front: int, token: int) -> dict[str, Any]:  # noqa: ARG002 - an order like any other
        self._set(Pause.NONE)
        self._answer_leaving({"resumed": True})
        return {}

    def _abort(self, front: int, token: int, request_ids: list[str] | None) -> dict[str, Any]:  # noqa: ARG002
        ended, found = self._end(None if request_ids is None else frozenset(request_ids))
        return {"ended": sorted(ended), "found": sorted(found)}

    def _end(self, wanted: frozenset[str] | None) -> tuple[set[str], set[str]]:
        """End requests; the ids of their answers, and which of those that are wanted they had."""
        ended, found = set(), set()
        for req in list(self._intake.requests.values()):
            names = {answer_id(req.request_id), req.shown_id}
            if wanted is None or names & wanted:
                self._engine.abort(req.request_id)
                self._intake.left(req)
                self._finish(req)
                ended.add(answer_id(req.request_id))
                found |= names & (wanted or set())
        for front, frame in self._intake.parked():
            names = {answer_id(frame.request_id), frame.shown_id}
            if wanted is None or names & wanted:
                self._intake.refuse_parked(front, frame, ABORTED, "the operator has ended it")
                ended.add(answer_id(frame.request_id))
                found |= names & (wanted or set())
        return ended, found

    def _reset(self, front: int, token: int) -> dict[str, Any]:  # noqa: ARG002
        """Empty the prefix cache: what requests own of it stays, and is still found."""
        allocator = self._engine.allocator
        allocator.clear_cache()
        owned = allocator.usage().owned // allocator.block_size if allocator.reads_tokens else 0
        return {"blocks_in_use": owned}


def answer_id(request_id: str) -> str:
    """The id of the answer that a request of the engine's is a part of: its own, up to the prompt's number."""
    return request_id.partition(":")[0]
