"""What the reliability suite promises in seconds (docs/serving.md), on a clock that nothing but waiting moves."""

from __future__ import annotations

import contextlib
import itertools
import socket
from types import SimpleNamespace

import pytest

from kvarena.engine.server.engine import loop as engine_loop
from kvarena.engine.server.processes import parts, supervisor, suspicion
from kvarena.engine.server.processes.process import EXIT, READY, ModelFiles
from kvarena.engine.server.shared import metrics
from kvarena.engine.server.shared.config import ServerConfig

UNHEALTHY_SECONDS, GONE_SECONDS = 5.0, 10.0


class TimedSupervisor:
    """A supervisor over an engine and a front that are no processes; `kind` is what befalls the engine at 20 s."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kind: str, fault_at: float = 20.0) -> None:
        self.now, self.kind, self.fault_at = 1000.0, kind, 1000.0 + fault_at
        self.unhealthy_at: float | None = None
        clock = SimpleNamespace(monotonic=lambda: self.now, sleep=self.advance)
        for module in (metrics, supervisor, suspicion):
            monkeypatch.setattr(module, "time", clock)
        self.config = ServerConfig()
        self.supervisor = one = supervisor.Supervisor(self.config, ModelFiles("models/demo"), lambda: None)
        one._rows = metrics.Rows(metrics.create_page(1), 1)
        self.row, self.front_row = one._rows.engines[0], one._rows.fronts[0][0]
        self.engine, self.front = Part(self), Part(self)
        (control, _), (ours, self.front.control) = socket.socketpair(), socket.socketpair()
        one._engines = [parts.Part(self.engine, control, self.row)]
        one._fronts = [parts.Part(self.front, ours, self.front_row)]
        one._listeners = [SimpleNamespace(close=lambda: None)]
        self.front.control.send(READY)
        self.front.control.setblocking(False)
        self.row.set("state", metrics.READY)
        self.row.set("has_work", 1)
        self.advance(0.0)

    def advance(self, seconds: float) -> None:
        """Wait: beats that fall due are written, and `/health` is asked as the front answers it."""
        end = self.now + seconds
        while True:
            self._beat()
            if self.now >= end:
                return
            self.now = min(end, self.now + 0.05)

    def _beat(self) -> None:
        self.front_row.set("heartbeat", self.now)
        well = self.now < self.fault_at
        if not well and self.kind == "kill":
            self.engine.alive = False
        beats = well or self.kind == "no progress"
        if beats and self.now - self.row.get("heartbeat") >= engine_loop.HEARTBEAT_SECONDS:
            self.row.set("heartbeat", self.now)
        if well:
            self.row.set("progress", self.now)
        else:
            state = metrics.health(self.row, self.config.heartbeat_timeout, self.config.stall_timeout)
            if state.reason and self.unhealthy_at is None:
                self.unhealthy_at = self.now
        assert self.now - self.fault_at < 300, "it goes on for ever"


class Part:
    """An engine or a front; the front leaves when it is told to."""

    def __init__(self, timed: TimedSupervisor) -> None:
        self.timed, self.alive, self.exitcode, self.name = timed, True, None, "a part"
        self.control: socket.socket | None = None

    def is_alive(self) -> bool:
        if self.alive and self.control is not None:
            with contextlib.suppress(BlockingIOError):
                self.alive = EXIT not in self.control.recv(16)
        return self.alive

    def join(self, timeout: float | None = None) -> None:
        for _ in itertools.count():
            if not self.is_alive() or (timeout is not None and timeout <= 0):
                return
            self.timed.advance(0.1)
            timeout = None if timeout is None else timeout - 0.1

    def kill(self) -> None:
        self.alive = False


@pytest.mark.parametrize("kind", ("kill", "stop", "no progress"))
def test_42_43_52_a_dead_or_frozen_engine_is_known_in_time(kind, monkeypatch):
    timed = TimedSupervisor(monkeypatch, kind)
    code = timed.supervisor._supervise(("127.0.0.1", 1))
    timed.supervisor._end_all()
    assert code == supervisor.ENGINE_FAILED
    assert timed.unhealthy_at is not None
    assert timed.unhealthy_at - timed.fault_at <= UNHEALTHY_SECONDS
    assert not timed.engine.alive and not timed.front.alive
    # An engine that beats and finishes no step may be compiling: it is given up after `step_timeout`.
    patience = timed.config.step_timeout if kind == "no progress" else 0.0
    assert timed.now - timed.fault_at <= patience + GONE_SECONDS


def test_a_well_engine_is_left_alone(monkeypatch):
    timed = TimedSupervisor(monkeypatch, "stop", fault_at=200.0)
    asked: list[float] = []

    def advance(seconds: float) -> None:
        timed.advance(seconds)
        asked.append(timed.now)
        if timed.now > 1100.0:
            timed.supervisor._signals = 1

    monkeypatch.setattr(supervisor, "time", SimpleNamespace(monotonic=lambda: timed.now, sleep=advance))
    assert timed.supervisor._supervise(("127.0.0.1", 1)) == 0  # drained, when it was told to
    assert timed.unhealthy_at is None and len(asked) > 900
