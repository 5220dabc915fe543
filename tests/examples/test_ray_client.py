"""The ingress' client of the Ray Serve example, over a handle that fails on command: no cluster."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace

import pytest

pytest.importorskip("grpc", reason="python -m pip install 'kvarena[ray-serve]', and this file again")
pytest.importorskip("ray")

from ray.exceptions import ActorDiedError
from waiting import PATIENCE

from examples.ray_serve.app import build
from examples.ray_serve.engines import RayEngines
from examples.ray_serve.replica import Admitted, News
from kvarena.engine.errors import ConfigError
from kvarena.engine.request import SamplingParams
from kvarena.engine.server.front.groups import Choice, EngineGone, Group, Refused
from kvarena.engine.server.shared import metrics
from kvarena.engine.server.shared.config import ServerConfig
from kvarena.engine.server.shared.ipc import AddFrame, EngineInfo, pack_ids

TOKEN = News(0, [5], [], {}, 3, None)
END = News(0, [6], [], {}, None, ("length", None, ""))


class Answer:
    """What a replica answers: items, and errors to raise; then it waits."""

    def __init__(self, script: list[object]) -> None:
        self.script, self.cancelled = script, False

    def cancel(self) -> None:
        self.cancelled = True

    async def __aiter__(self):
        for item in self.script:
            if isinstance(item, Exception):
                raise item
            yield item
        if self.script[-1] is TOKEN:
            await asyncio.sleep(3600)


class Handle:
    """Replicas, one after the other, each with its script."""

    def __init__(self, *scripts: list[object]) -> None:
        self.answers = [Answer(script) for script in scripts]
        self.generate = SimpleNamespace(remote=lambda frame, grammar: self.given.append(frame) or self._next())
        self.given: list[AddFrame] = []

    def options(self, stream: bool) -> Handle:
        assert stream
        return self

    def _next(self) -> Answer:
        return self.answers[len(self.given) - 1]


def ask(handle: Handle, then=None) -> SimpleNamespace:
    """Send a prompt, and wait for its end; what came of it."""

    async def run() -> SimpleNamespace:
        rows = metrics.Rows(metrics.create_page(1), 1)
        engines = RayEngines(handle, EngineInfo(64, 64, 100), ServerConfig(), rows)
        group = Group(engines, time.monotonic())
        choice = Choice(group, 0, [1, 2, 3], SamplingParams(max_tokens=2), None, None, {})
        group.choices.append(choice)
        frame = AddFrame(0, "r", pack_ids([1, 2, 3]), choice.sampling, group.arrival, 0, "", "", None)
        admission, error = engines.submit(frame, [choice]), None
        try:
            await admission
            if then is not None:
                await then(engines, choice)
            while not choice.ended and then is None:
                await group.changed()
        except (EngineGone, Refused) as caught:
            error = caught
        await asyncio.sleep(0.01)
        row = rows.fronts[0][0]
        open_ = [row.get(name) for name in ("num_open", "queued_tokens", "tokens_to_compute")]
        return SimpleNamespace(tokens=choice.tokens, error=error, open=open_, num_open=engines.num_open)

    return asyncio.run(run())


DIED = ActorDiedError()


def test_tokens_arrive_and_nothing_stays_open():
    found = ask(Handle([Admitted(), TOKEN, END]))
    assert (found.tokens, found.error, found.open, found.num_open) == ([5, 6], None, [0, 0, 0], 0)


@pytest.mark.parametrize("first", ([DIED], [Admitted(), DIED]), ids=("before it was queued", "before its first token"))
def test_a_replica_that_is_lost_before_a_token_is_not_noticed(first):
    handle = Handle(first, [Admitted(), TOKEN, END])
    found = ask(handle)
    assert (found.tokens, found.error, len(handle.given)) == ([5, 6], None, 2)


def test_a_replica_that_is_lost_after_a_token_ends_the_stream():
    handle = Handle([Admitted(), TOKEN, DIED], [Admitted(), TOKEN, END])
    found = ask(handle)
    assert isinstance(found.error, EngineGone) and len(handle.given) == 1 and found.open == [0, 0, 0]


def test_replicas_that_all_fail_and_one_that_refuses():
    assert isinstance(ask(Handle(*[[DIED]] * 4)).error, EngineGone)
    refused = ask(Handle([Admitted("queue_full", "9 are waiting")]))
    assert isinstance(refused.error, Refused) and refused.error.reason == "queue_full"
    again = ask(Handle([Admitted(), DIED], [Admitted("queue_full", "9 are waiting")]))
    assert isinstance(again.error, EngineGone) and "9 are waiting" in str(again.error)


def test_a_client_that_leaves_ends_the_replicas_work():
    handle = Handle([Admitted(), TOKEN])

    async def leave(engines, choice) -> None:
        async with asyncio.timeout(PATIENCE):
            while not choice.num_tokens:
                await asyncio.sleep(0.001)
        engines.abort([choice], "abort")

    found = ask(handle, leave)
    assert handle.answers[0].cancelled and found.num_open == 0 and found.open == [0, 0, 0]


def test_an_operator_s_paths_are_refused_at_the_start():
    with pytest.raises(ConfigError, match="reaches none of Ray"):
        build({"flags": "models/demo --enable-admin --admin-key k"})
