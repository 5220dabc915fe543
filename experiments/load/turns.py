"""Several tasks on one clock, of which one acts at a time: the router, and the host of each replica.

    virtual   sleep(task, when)    whoever is due next goes on, and the clock stands at its time
    real      sleep(task, when)    the others may go on; so they may while a replica's device computes (`computing`)

What a task sees of another one is therefore never half done, and the order of all actions is that of their times: a
recorded run can be made again action by action. Tasks are threads; the first one is the caller's.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from math import inf

LONGEST_WAIT = 0.1  # s between two looks at whether the run is to end


class _Stopped(BaseException):
    """Ends a task of a run that ends."""


class Turns(ABC):
    """Who acts when. `run` takes the tasks; the rest is called by the task whose turn it is.

    Args:
        num_tasks: tasks; of several that are due at the same time the first one goes on first.
    """

    def __init__(self, num_tasks: int) -> None:
        self._num_tasks = num_tasks
        self._is_idle = [False] * num_tasks
        self._error: BaseException | None = None
        self._ends = False

    def run(self, tasks: Sequence[Callable[[], None]]) -> None:
        """Run them until the first has returned; the others are then ended where they sleep.

        Raises:
            BaseException: what a task raised.
        """
        threads = [
            threading.Thread(target=self._task, args=(number, task), daemon=True, name=f"replica {number - 1}")
            for number, task in enumerate(tasks)
            if number
        ]
        for thread in threads:
            thread.start()
        try:
            self._begin()
            tasks[0]()
        except _Stopped:
            assert self._error is not None
        finally:
            self._ends = True
            self._let_all_go()
            for thread in threads:
                thread.join()
        if self._error is not None:
            raise self._error

    def _task(self, number: int, task: Callable[[], None]) -> None:
        try:
            self._first_turn(number)
            task()
        except _Stopped:
            pass
        except BaseException as error:
            self._error = self._error or error
            self._ends = True
        finally:
            self._leave(number)

    @abstractmethod
    def now(self) -> float:
        """Seconds since the run's start."""

    @abstractmethod
    def reset(self) -> None:
        """Make this moment second 0."""

    @abstractmethod
    def sleep(self, task: int, when: float, *, idle: bool = False) -> None:
        """Let the others act until `when`; one that is `idle` goes on at once when it is woken."""

    @abstractmethod
    def wake(self, task: int) -> None:
        """If that task is idle it is due now."""

    @contextmanager
    def computing(self) -> Iterator[None]:
        """In the block the others may act."""
        yield

    @abstractmethod
    def _begin(self) -> None:
        """The first task begins."""

    @abstractmethod
    def _first_turn(self, task: int) -> None:
        """Another one begins."""

    @abstractmethod
    def _leave(self, task: int) -> None:
        """A task acts no more."""

    @abstractmethod
    def _let_all_go(self) -> None:
        """End the tasks that sleep."""


class VirtualTurns(Turns):
    """On a virtual clock: it jumps from one task's time to the next one's."""

    def __init__(self, num_tasks: int) -> None:
        super().__init__(num_tasks)
        self._now = 0.0
        self._due = [0.0] * num_tasks  # when each goes on; never, for the one that acts
        self._gates = [threading.Lock() for _ in range(num_tasks)]  # closed: held
        for gate in self._gates:
            gate.acquire()

    def now(self) -> float:
        """Seconds since the run's start."""
        return self._now

    def reset(self) -> None:
        """Make this moment second 0."""
        self._now = 0.0

    def sleep(self, task: int, when: float, *, idle: bool = False) -> None:
        """Whoever is due first goes on, and the clock jumps there; it is this task again at `when`."""
        self._due[task], self._is_idle[task] = when, idle
        if (chosen := self._choose()) != task:
            self._open(chosen)
            self._await(task)
        self._is_idle[task] = False

    def wake(self, task: int) -> None:
        """If that task is idle it is due now."""
        if self._is_idle[task]:
            self._due[task] = min(self._due[task], self._now)

    def _choose(self) -> int:
        """Whoever goes on now; the clock stands at its time."""
        earliest = min(self._due)
        assert earliest < inf, "all tasks sleep for ever"
        chosen = self._due.index(earliest)
        self._now = max(self._now, earliest)
        self._due[chosen] = inf
        return chosen

    def _await(self, task: int) -> None:
        self._gates[task].acquire()
        if self._ends:
            raise _Stopped

    def _begin(self) -> None:
        self._due[0] = inf

    def _first_turn(self, task: int) -> None:
        self._await(task)

    def _leave(self, task: int) -> None:
        self._due[task] = inf
        if self._ends:
            self._open(0)
        else:
            self._open(self._choose())

    def _let_all_go(self) -> None:
        for task in range(self._num_tasks):
            self._open(task)

    def _open(self, task: int) -> None:
        with suppress(RuntimeError):  # where a run ends, it may be open
            self._gates[task].release()


class RealTurns(Turns):
    """On the wall's clock: one lock, which a task gives away while it sleeps or its device computes."""

    def __init__(self, num_tasks: int) -> None:
        super().__init__(num_tasks)
        self._changed = threading.Condition(threading.Lock())
        self._woken = [False] * num_tasks
        self._origin = time.perf_counter()

    def now(self) -> float:
        """Seconds since the run's start."""
        return time.perf_counter() - self._origin

    def reset(self) -> None:
        """Make this moment second 0."""
        self._origin = time.perf_counter()

    def sleep(self, task: int, when: float, *, idle: bool = False) -> None:
        """Let the others act until `when`."""
        self._is_idle[task] = idle
        while not self._woken[task] and (left := when - self.now()) > 0:
            self._changed.wait(min(left, LONGEST_WAIT))
            self._check()
            if idle and task == 0:
                break  # to look whether a signal came
        self._is_idle[task] = self._woken[task] = False

    def wake(self, task: int) -> None:
        """If that task is idle it is due now."""
        if self._is_idle[task]:
            self._woken[task] = True
            self._changed.notify_all()

    @contextmanager
    def computing(self) -> Iterator[None]:
        """In the block the others may act."""
        self._changed.release()
        try:
            yield
        finally:
            self._changed.acquire()
            self._check()

    def _check(self) -> None:
        if self._ends:
            raise _Stopped

    def _begin(self) -> None:
        self._changed.acquire()

    def _first_turn(self, task: int) -> None:  # noqa: ARG002 - the lock tells nobody apart
        self._changed.acquire()
        self._check()

    def _leave(self, task: int) -> None:  # noqa: ARG002
        self._changed.notify_all()
        self._changed.release()

    def _let_all_go(self) -> None:
        self._changed.notify_all()
        self._changed.release()


class TaskClock:
    """The clock of one task: the engine's, the runner's and the driver's of a replica.

    On a virtual clock a task may run ahead by itself (`advance`); others are let act when it sleeps, and it sleeps
    before whatever another task can see: a step's schedule and its update.

    Args:
        turns: of all tasks.
        task: its number.
    """

    def __init__(self, turns: Turns, task: int) -> None:
        self._turns = turns
        self._task = task
        self._ahead = 0.0  # the task's own time, where that is later than that of all

    def now(self) -> float:
        """Seconds since the run's start."""
        return max(self._ahead, self._turns.now())

    def reset(self) -> None:
        """Make this moment second 0."""
        self._ahead = 0.0
        self._turns.reset()

    def advance(self, seconds: float) -> None:
        """Move on by `seconds` >= 0, alone."""
        self._ahead = self.now() + seconds

    def sleep_until(self, when: float) -> None:
        """Let the others act up to `when`, or up to this task's own time where that is later."""
        self._turns.sleep(self._task, max(when, self.now()))

    def wait_until(self, when: float) -> None:
        """The same; `wake` ends it."""
        self._turns.sleep(self._task, max(when, self.now()), idle=True)
