"""The driver: hands requests to an engine when they are due, and steps it until all have ended.

Open loop: a request is handed over at its scheduled arrival, whatever the engine does; a step that runs meanwhile
delays it, and that lateness is recorded. Latencies count from the scheduled arrival, so a late driver cannot make
an engine look fast. Closed loop: each of N users sends the next request when the previous one has ended.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from kvarena.engine.core import Engine, StepOutput
from kvarena.engine.errors import EngineError, RequestRejected
from kvarena.engine.request import Request
from kvarena.experiments.recording.interruption import Signals


class Progressed(Protocol):
    """How far a run is.

    Attributes:
        num_finished: requests that ended, for whatever reason.
        num_output_tokens: tokens so far.
        wall_time: end of the last step, in seconds since the run's start.
    """

    @property
    def num_finished(self) -> int: ...  # noqa: D102

    @property
    def num_output_tokens(self) -> int: ...  # noqa: D102

    @property
    def wall_time(self) -> float: ...  # noqa: D102


class Recorder(Progressed, Protocol):
    """Who is told what happens in a run."""

    def on_submit(self, req: Request, now: float) -> None:
        """`req` was handed to the engine at `now`."""
        ...

    def on_rejected(self, req: Request, now: float, error: str) -> None:
        """The engine refused `req`, which was handed over at `now`."""
        ...

    def on_step(self, step: StepOutput) -> None:
        """A step has ended."""
        ...


class Arrivals:
    """Requests by the time they are due: a stream in order of arrival, of which one is held, and what was pushed."""

    def __init__(self, requests: Iterable[Request]) -> None:
        self._order = itertools.count()
        self._heap: list[tuple[float, int, Request]] = []
        self._rest = iter(requests)
        self._pull()

    def _pull(self) -> None:
        """Take the stream's next request in."""
        req = next(self._rest, None)
        self._head = req
        if req is not None:
            self.push(req)

    def push(self, req: Request) -> None:
        """One more."""
        heapq.heappush(self._heap, (req.arrival_time, next(self._order), req))

    def next_time(self) -> float | None:
        """When the next one is due; None: there is none."""
        return self._heap[0][0] if self._heap else None

    def pop_due(self, now: float) -> list[Request]:
        """Those that are due at `now`, in order."""
        due = []
        while self._heap and self._heap[0][0] <= now:
            req = heapq.heappop(self._heap)[2]
            due.append(req)
            if req is self._head:
                self._pull()
        return due


class ClosedLoop:
    """N users who take requests from one list, each waiting `think_time` seconds after an answer."""

    def __init__(self, requests: Iterable[Request], num_users: int, think_time: float = 0.0) -> None:
        self._rest = iter(requests)
        self._think_time = think_time
        self.first = list(itertools.islice(self._rest, num_users))

    def on_end(self, now: float) -> Request | None:
        """The next request of the user whose request ended at `now`, or None when the list is used up."""
        req = next(self._rest, None)
        if req is not None:
            req.arrival_time = now + self._think_time
        return req


def drive(
    engine: Engine,
    requests: Iterable[Request],
    recorder: Recorder,
    *,
    closed_loop: ClosedLoop | None = None,
    on_progress: Callable[[Recorder], None] | None = None,
    after_step: Callable[[StepOutput], None] | None = None,
    signals: Signals | None = None,
) -> None:
    """Run `requests` to their end, or until a signal comes: then the step that runs is the last one.

    Args:
        engine: steps the requests; its clock starts at 0.
        requests: in the order of their scheduled arrivals; ignored under `closed_loop`.
        recorder: told of each hand-over, refusal and step.
        closed_loop: where the requests come from when users wait for answers.
        on_progress: called after every step.
        after_step: called with every step after it was recorded (a simulation's host works then).
        signals: looked at after every step; they end a wait for the next arrival.

    Raises:
        EngineError: requests wait and nothing can ever run, or the device failed.
    """
    arrivals = Arrivals(closed_loop.first if closed_loop else requests)

    def ended(now: float, requests: Sequence[Request]) -> None:
        for _ in requests if closed_loop else ():
            req = closed_loop.on_end(now) if closed_loop else None
            if req is not None:
                arrivals.push(req)

    while (arrivals.next_time() is not None or engine.has_work) and not (signals is not None and signals.came):
        now = engine.clock.now()
        step = take_turn(engine, arrivals.pop_due(now), now, recorder, ended)
        if step is not None:
            if on_progress is not None:
                on_progress(recorder)
            if after_step is not None:
                after_step(step)
        elif not engine.in_flight:
            _sleep(engine, arrivals.next_time(), signals)


def take_turn(
    engine: Engine,
    due: Iterable[Request],
    now: float,
    recorder: Recorder,
    on_end: Callable[[float, Sequence[Request]], None],
) -> StepOutput | None:
    """Hand over the requests that are due and run one step; None where none ended.

    Args:
        engine: steps.
        due: handed over first, in order.
        now: when they are.
        recorder: told of each hand-over, refusal and step.
        on_end: told when requests ended, and which.

    Raises:
        EngineError: the device failed.
    """
    for req in due:
        recorder.on_submit(req, now)
        try:
            engine.add(req)
        except RequestRejected as error:
            recorder.on_rejected(req, now, str(error))
            on_end(now, [req])
    step = engine.step() if engine.has_work else None
    if step is not None:
        recorder.on_step(step)
        if step.finished or step.plan.rejected:
            on_end(step.end_time, [*step.finished, *step.plan.rejected])
    return step


def stuck(engine: Engine) -> EngineError:
    """The error of an engine that has requests, plans nothing, and waits for nothing."""
    return EngineError(
        f"the scheduler plans nothing while {engine.scheduler.num_waiting} requests wait and "
        f"{engine.scheduler.num_running} run: its build_plan leaves them out, or the allocator has no room"
    )


def _sleep(engine: Engine, next_arrival: float | None, signals: Signals | None) -> None:
    """Nothing to compute: wait for the next arrival or for a batch to form."""
    wake = engine.wake_time(engine.clock.now()) if engine.has_work else None
    times = [when for when in (wake, next_arrival) if when is not None]
    if times and signals is not None:
        signals.wait(lambda: engine.clock.sleep_until(min(times)))
    elif times:
        engine.clock.sleep_until(min(times))
    elif engine.has_work:
        raise stuck(engine)
