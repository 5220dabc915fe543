"""The driver of several replicas: a router takes each request when it is due, and each replica steps its own.

    requests --when due--> Router.route --> inbox of a replica --between two steps--> scheduler ... --> ended
                              ^                                                                          |
                              '------- counts, caches (ReplicaState) -------- closed loop: the next one -'

Every replica has an engine of its own: allocator, scheduler, pool, runner. All of them, and the router, are tasks of
one clock (`kvarena.experiments.load.turns`), virtual or real.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from math import inf

from kvarena.engine.contract import KVAllocator, StepPlan
from kvarena.engine.core import Engine, StepOutput
from kvarena.engine.errors import ConfigError, EngineError
from kvarena.engine.model_runner import ModelRunner, PendingTokens, StepResult
from kvarena.engine.request import Request
from kvarena.engine.routing import Router
from kvarena.experiments.load.driver import Arrivals, ClosedLoop, Recorder, stuck, take_turn
from kvarena.experiments.load.turns import TaskClock, Turns
from kvarena.experiments.recording.interruption import Signals

AfterStep = Callable[[StepOutput], None]


class Replica:
    """One replica, and what a router may know of it (`kvarena.engine.routing.ReplicaState`).

    Args:
        engine: its own; the clock is a `TaskClock`.
        recorder: told what happens in it.
        after_step: called with every step after it was recorded.
    """

    def __init__(self, engine: Engine, recorder: Recorder, after_step: AfterStep | None = None) -> None:
        assert isinstance(engine.clock, TaskClock)
        self.engine = engine
        self.clock = engine.clock
        self.recorder = recorder
        self.after_step = after_step
        self.inbox: list[Request] = []
        self.is_stuck = False  # it has work and can plan nothing, now or later
        self.num_sent = 0
        self._open: dict[Request, None] = {}

    # ---- for routers

    @property
    def num_slots(self) -> int:
        """Slots of its pool."""
        return self.engine.allocator.num_blocks * self.engine.allocator.block_size

    @property
    def num_open(self) -> int:
        """Requests that were sent here and have not ended."""
        return len(self._open)

    @property
    def num_owned_slots(self) -> int:
        """Slots that its requests own."""
        return self.engine.allocator.count().owned

    @property
    def num_queued_tokens(self) -> int:
        """Tokens of the requests that own nothing yet."""
        return sum(req.num_tokens for req in self._open if not req.num_slots)

    @property
    def num_tokens_to_compute(self) -> int:
        """Tokens of its requests whose KV is not computed."""
        return sum(max(0, req.num_tokens - req.num_computed_tokens) for req in self._open)

    def cached_tokens(self, req: Request) -> int:
        """Leading tokens of `req` in its prefix cache."""
        return self.engine.allocator.match_prefix(req)

    # ---- for the drivers

    def send(self, req: Request) -> None:
        """`req` is on its way to this replica, which takes it in between two steps."""
        self.inbox.append(req)
        self._open[req] = None
        self.num_sent += 1

    def take_inbox(self) -> list[Request]:
        """What was sent since the last call, in order."""
        taken, self.inbox = self.inbox, []
        return taken

    def ended(self, requests: Iterable[Request]) -> None:
        """These have ended here."""
        for req in requests:
            self._open.pop(req, None)


class YieldingRunner:
    """A runner that lets the other tasks act while it computes."""

    def __init__(self, runner: ModelRunner, turns: Turns) -> None:
        self._runner = runner
        self._turns = turns

    def execute(self, plan: StepPlan, allocator: KVAllocator) -> PendingTokens:
        """Execute `plan`, see `ModelRunner`."""
        with self._turns.computing():
            pending = self._runner.execute(plan, allocator)
        return _YieldingTokens(pending, self._turns)

    def release(self, request_ids: list[str]) -> None:
        """See `ModelRunner`."""
        self._runner.release(request_ids)


class _YieldingTokens:
    def __init__(self, pending: PendingTokens, turns: Turns) -> None:
        self._pending = pending
        self._turns = turns

    def result(self) -> StepResult:
        with self._turns.computing():
            return self._pending.result()


class RoutingLog:
    """Which replica each request was sent to, and when, in the order of their arrival.

    Attributes:
        replicas: number of the replica.
        times: in seconds.
    """

    def __init__(self) -> None:
        self.replicas: array[int] = array("i")
        self.times: array[float] = array("d")

    def add(self, replica: int, now: float) -> None:
        """The next request was sent to `replica` at `now`."""
        self.replicas.append(replica)
        self.times.append(now)


class RouterTask:
    """Takes requests as they become due and sends each to the replica that the router names.

    A request that shares its prompt with the one before it (`sampling.n`) goes where that one went.

    Args:
        router: decides.
        replicas: to choose from.
        log: told of each decision.
    """

    def __init__(self, router: Router, replicas: Sequence[Replica], log: RoutingLog) -> None:
        if router.num_replicas != len(replicas):
            raise ConfigError(f"router.num_replicas={router.num_replicas}, and there are {len(replicas)} replicas")
        self._router = router
        self.replicas = replicas
        self._log = log
        self._of_parents: tuple[Request | None, int] = (None, 0)

    def send(self, req: Request, now: float) -> int:
        """Send `req` to a replica; returns which.

        Raises:
            EngineError: the router named none that there is.
        """
        parent, number = self._of_parents
        if req.parent is None or req.parent is not parent:
            number = self._router.route(req, self.replicas)
            if not 0 <= number < len(self.replicas):
                raise EngineError(f"the router named replica {number} of {len(self.replicas)}; they count from 0")
            self._of_parents = req, number
        self._log.add(number, now)
        self.replicas[number].send(req)
        return number


def drive_replicas(
    router: Router,
    replicas: Sequence[Replica],
    turns: Turns,
    requests: Iterable[Request],
    log: RoutingLog,
    *,
    closed_loop: ClosedLoop | None = None,
    on_progress: Callable[[], None] | None = None,
    signals: Signals | None = None,
) -> None:
    """Run `requests` to their end, or until a signal comes: then the steps that run are the last ones.

    Args:
        router: decides who gets a request, in the order of arrival, at the moment when it is due.
        replicas: the task of replica i is i + 1; that of the router 0. Their clocks stand at 0.
        turns: of all tasks.
        requests: in the order of their scheduled arrivals; ignored under `closed_loop`.
        log: told of each decision.
        closed_loop: where the requests come from when users wait for answers.
        on_progress: called after every step.
        signals: looked at between steps.

    Raises:
        EngineError: requests wait and nothing can ever run, a device failed, or the router named no replica.
    """
    arrivals, clock = Arrivals(closed_loop.first if closed_loop else requests), TaskClock(turns, 0)
    task = RouterTask(router, replicas, log)

    def came() -> bool:
        return signals is not None and signals.came

    def route() -> None:
        while not came():
            now = clock.now()
            for req in arrivals.pop_due(now):
                turns.wake(1 + task.send(req, now))
            following = arrivals.next_time()
            busy = [replica for replica in replicas if replica.num_open]
            if following is None and not busy:
                return
            if following is None and all(replica.is_stuck for replica in busy):
                raise stuck(busy[0].engine)
            clock.wait_until(inf if following is None else following)

    def serve(number: int) -> None:
        replica = replicas[number]

        def on_end(now: float, ended: Sequence[Request]) -> None:
            replica.ended(ended)
            for _ in ended if closed_loop else ():
                assert closed_loop is not None
                if (req := closed_loop.on_end(now)) is not None:
                    arrivals.push(req)
            if closed_loop or not replica.num_open:
                turns.wake(0)

        while not came():
            replica.clock.sleep_until(0.0)  # whatever was sent up to now is here
            step = take_turn(replica.engine, replica.take_inbox(), replica.clock.now(), replica.recorder, on_end)
            if step is not None:
                if on_progress is not None:
                    on_progress()
                if replica.after_step is not None:
                    replica.after_step(step)
            elif not replica.engine.in_flight and not replica.inbox:
                _rest(replica, turns)
        turns.wake(0)

    turns.run([route, *((lambda number=number: serve(number)) for number in range(len(replicas)))])


def _rest(replica: Replica, turns: Turns) -> None:
    """Nothing to compute: until a request comes, or a batch forms."""
    wake = replica.engine.wake_time(replica.clock.now()) if replica.engine.has_work else None
    replica.is_stuck = replica.engine.has_work and wake is None
    if replica.is_stuck:
        turns.wake(0)
    replica.clock.wait_until(inf if wake is None else wake)
    replica.is_stuck = False
