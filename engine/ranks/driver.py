"""The planning rank: its rows tell the other ranks of each step, at the moment when they know it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import itemgetter
from typing import Any, Protocol

import numpy as np

from kvarena.engine.contract import KVAllocator, ScheduledRequest, StepPlan
from kvarena.engine.errors import KvarenaError, RankFailed
from kvarena.engine.model_runner import PendingTokens, StepResult
from kvarena.engine.parallel.layout import Layout
from kvarena.engine.ranks.plans import NewRow, StepMessage, checksum
from kvarena.engine.request import Request
from kvarena.engine.runner.request_rows import RequestRows

_START = itemgetter(1)


class Outbox(Protocol):
    """Where the planning rank's messages go, and who knows how the others are."""

    check_plans: bool
    layout: Layout

    def send(self, message: bytes) -> None:
        """To every other rank, in order."""
        ...

    def tell(self, name: str, **arguments: Any) -> None:
        """Let every other rank do something beside steps."""
        ...

    def opened(self, count: int) -> None:
        """So many steps more are in flight."""
        ...

    def check(self) -> None:
        """Raise RankFailed where a rank has failed."""
        ...

    def failed(self, error: BaseException) -> RankFailed:
        """What to raise where this rank's step has failed: another rank's failure, if that is why."""
        ...


class SendingRows(RequestRows):
    """The planning rank's rows."""

    outbox: Outbox

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._changed = self.tables.note_changes()
        self._new: list[NewRow] = []
        self._released: list[int] = []
        self._following = np.zeros(self.num_rows + 1, np.int64)
        self._known = np.zeros(self.num_rows + 1, np.int64)
        self._plan: StepPlan | None = None
        self._num_steps = 0

    def begin(self, plan: StepPlan) -> None:
        """A step comes: it is sent as soon as its rows are known."""
        self._plan = plan

    @property
    def is_sent(self) -> bool:
        """Whether the other ranks have been told of the step."""
        return self._plan is None

    def of_step(self, scheduled: Sequence[ScheduledRequest], allocator: KVAllocator) -> np.ndarray:
        """As `RequestRows.of_step`; sends the step that has begun."""
        rows = super().of_step(scheduled, allocator)
        if self._plan is not None:
            self.send(self._plan, rows, allocator)
        return rows

    def send(self, plan: StepPlan, rows: np.ndarray, allocator: KVAllocator) -> None:
        """Tell the other ranks of a step whose entries have `rows`."""
        scheduled, decodes = plan.scheduled, plan.num_decodes
        starts = np.fromiter(map(_START, scheduled), np.int64, len(scheduled))
        # The leading entries are known to be decodes of one token each.
        counts, samples = np.ones(len(scheduled), np.int64), np.ones(len(scheduled), np.bool_)
        if decodes < len(scheduled):
            counts[decodes:] = [entry[2] for entry in scheduled[decodes:]]
            samples[decodes:] = plan.samples[decodes:]
        stops = starts + counts
        odd = np.flatnonzero((starts != self._following[rows]) | (counts != 1) | ~samples)
        self._following[rows] = stops
        message = StepMessage(
            self._num_steps, plan, rows, np.stack([odd, starts[odd], counts[odd], samples[odd]], axis=1),
            released=self._released, new=self._new, tokens=self._missing(plan, rows, starts, stops),
        )  # fmt: skip
        if self._changed:
            message.tables = [(row, first, self.tables.read[row][first:]) for row, first in self._changed.items()]
        if self.outbox.check_plans:
            tables = [self.tables.read[row] for row in rows.tolist()]
            message.checksum = checksum(plan, tables, allocator.block_size)
        self.outbox.send(message.to_bytes())
        self._num_steps += 1
        self._changed.clear()
        self._new, self._released, self._plan = [], [], None

    def _missing(
        self, plan: StepPlan, rows: np.ndarray, starts: np.ndarray, stops: np.ndarray
    ) -> list[tuple[int, list[int]]]:
        """Tokens that the step reads, and that neither the devices nor the other ranks' hosts have."""
        needed = stops - (self.columns["sampled_to"][rows] == stops - 1)
        found = []
        for entry in np.flatnonzero((needed > starts) & (needed > self._known[rows])).tolist():
            row, stop = int(rows[entry]), int(needed[entry])
            found.append((row, plan.scheduled[entry].req.token_ids(int(self._known[row]), stop)))
            self._known[row] = stop
        return found

    def release(self, request_ids: Iterable[str]) -> None:
        """As `RequestRows.release`; the other ranks are told with the next step."""
        ids = list(request_ids)
        rows = self.known(ids)
        if rows:
            # Of a step that failed before it was sent the others have no row.
            unsent = {one.row for one in self._new}
            self._new = [one for one in self._new if one.row not in rows]
            self._released += [row for row in rows if row not in unsent]
        super().release(ids)

    def _add(self, req: Request) -> int:
        row = super()._add(req)
        seed = int(self.columns["seed"][row])
        self._new.append(NewRow(row, req, seed, bool(self.columns["is_plain"][row])))
        self._following[row], self._known[row] = 0, req.num_tokens
        return row

    def _grow(self) -> None:
        before = self.num_rows
        super()._grow()
        more = np.zeros(self.num_rows - before, np.int64)
        self._following, self._known = (np.concatenate([one, more]) for one in (self._following, self._known))


class _CheckedStep:
    """A step in flight, whose failure is all ranks' failure."""

    def __init__(self, step: PendingTokens, outbox: Outbox) -> None:
        self._step, self._outbox = step, outbox

    def result(self) -> StepResult:
        """The step's tokens."""
        try:
            found = self._step.result()
        except Exception as error:
            raise self._outbox.failed(error) from error
        self._outbox.opened(-1)
        return found


class Driving:
    """Makes a runner the planning rank's: beside one that computes, first among its bases.

    Attributes:
        outbox: to the other ranks.
    """

    rows_class: type[RequestRows] = SendingRows
    outbox: Outbox
    _rows: Any  # SendingRows, which the runner beside this calls RequestRows

    def drive(self, outbox: Outbox) -> None:
        """From now on every step is told to the other ranks."""
        self.outbox = self._rows.outbox = outbox

    def lanes(self, plan: StepPlan, rows: np.ndarray) -> np.ndarray:  # noqa: ARG002
        """As `Staged.lanes`: rows are what the other ranks call requests."""
        return rows % self.outbox.layout.pipeline

    def execute(self, plan: StepPlan, allocator: KVAllocator) -> PendingTokens:
        """As `ModelRunner.execute`. Raises RankFailed once the ranks cannot go on."""
        self.outbox.check()
        self._rows.begin(plan)
        self.outbox.opened(1)
        try:
            step: PendingTokens = super().execute(plan, allocator)  # type: ignore[misc]
            if not self._rows.is_sent:
                self._rows.send(plan, np.empty(0, np.int64), allocator)
        except Exception as error:
            if isinstance(error, KvarenaError) and not self._rows.is_sent:
                self.outbox.opened(-1)
                raise  # the others know nothing of it
            raise self.outbox.failed(error) from error
        return _CheckedStep(step, self.outbox)

    def warm_up(self, max_rows: int, max_tokens: int) -> int:
        """As `FusedRunner.warm_up`, on all ranks at once."""
        self.outbox.tell("warm_up", max_rows=max_rows, max_tokens=max_tokens)
        self.outbox.opened(1)
        found: int = super().warm_up(max_rows, max_tokens)  # type: ignore[misc]
        self.outbox.opened(-1)
        return found
