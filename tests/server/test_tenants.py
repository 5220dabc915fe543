"""What each API key may have of an engine: requests at once, tokens a minute."""

from __future__ import annotations

import itertools
import time
from collections import Counter

import pytest

from kvarena.engine.request import SamplingParams
from kvarena.engine.server.engine.intake import Intake
from kvarena.engine.server.engine.tenants import Tenants
from kvarena.engine.server.shared.config import ServerConfig
from kvarena.engine.server.shared.ipc import KEY_LIMIT, AddFrame, ToEngine, pack_ids
from kvarena.experiments.serving.stub_engine import StubOptions, build
from kvarena.schedulers.chunked import ChunkedScheduler
from kvarena.schedulers.fair import FairScheduler

HANDLES = itertools.count(1)


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def add(key, num_prompt=5, max_tokens=10, n=1):
    first = next(HANDLES) * 100
    sampling = SamplingParams(n=n, max_tokens=max_tokens)
    frame = AddFrame(
        first, f"r{first}", pack_ids([5] * num_prompt), sampling, time.monotonic(), 0, "", "", None, key=key
    )
    return [ToEngine.ADD, *frame]


def intake_of(**limits):
    clock = Clock()
    return Intake(build(StubOptions(2048)), 2, 1000, Tenants(clock=clock, **limits)), clock


def reasons(intake):
    made = [reason for out in intake.outs for _, reason, _ in out.admitted]
    for out in intake.outs:
        out.admitted.clear()
    return made


def test_a_key_has_so_many_requests_whatever_front_they_come_by():
    intake, _ = intake_of(max_requests=3)
    intake.receive(0, [add(0, n=2)])
    intake.receive(1, [add(0), add(0), add(1, n=3), add(-1, n=9)])
    intake.run_round(60)
    assert sorted(reasons(intake)) == ["", "", "", "", KEY_LIMIT]
    done = next(req for req in intake.requests.values() if req.key == 0)
    intake.forget(done)
    intake.receive(0, [add(0), add(0)])
    intake.run_round(60)
    assert reasons(intake) == ["", KEY_LIMIT]


def test_a_key_s_tokens_come_back_as_time_goes_by_and_as_they_are_not_used():
    intake, clock = intake_of(tokens_per_minute=60)

    def ask(*frames):
        intake.receive(0, list(frames))
        intake.run_round(60)
        return reasons(intake)

    assert ask(add(0, 20, 20), add(0, 20, 20), add(1, 20, 20)) == ["", KEY_LIMIT, ""]
    intake.forget(next(req for req in intake.requests.values() if req.key == 0))  # it made no token: 20 come back
    assert ask(add(0, 20, 20)) == [""]
    assert ask(add(0, 1, 1)) == [KEY_LIMIT]
    clock.now += 2.0
    assert ask(add(0, 1, 1), add(0, 1, 1)) == ["", KEY_LIMIT]
    assert ask(add(0, 100, 20)) == [KEY_LIMIT]
    clock.now += 60.0
    assert ask(add(0, 100, 20)) == [""]  # more than a minute's: taken when nothing of it was used
    assert "in 62 s" in Tenants.refusal(intake._tenants, 0, 1, 2)


def test_a_full_queue_keeps_nobody_out_who_has_less_than_its_share():
    """Under the fair scheduler; any other takes requests in their order, and refuses them so."""

    def waiting_of(scheduler, *clients):
        served = build(StubOptions(2048))
        served.engine.scheduler = scheduler(served.engine.allocator, max_model_len=8192)
        intake = Intake(served, 1, 12)
        messages = [add(0) for _ in clients]
        for number, (message, client) in enumerate(zip(messages, clients, strict=True)):
            message[1], message[2], message[7] = number, f"r{number}", client
        intake.receive(0, messages)
        intake.run_round(60)
        refused = [clients[handle] for handle, reason, _ in intake.outs[0].admitted if reason == "queue_full"]
        return Counter(clients) - Counter(refused)

    flood = ["flood"] * 30
    assert waiting_of(FairScheduler, *flood) == {"flood": 13}  # one may have the first seat
    assert waiting_of(FairScheduler, *flood, *["steady"] * 9, *flood) == {"flood": 13, "steady": 6}
    crowd = [f"c{i}" for i in range(40)]
    assert sum(waiting_of(FairScheduler, *flood, *crowd).values()) <= 25  # twice as many at most
    assert waiting_of(ChunkedScheduler, *flood, "steady") == {"flood": 13}


def test_settings_of_keys_are_checked():
    config = ServerConfig.from_dict({"least_priority_by_key": [0, -3], "clients_by": "key"})
    assert config.least_priority_by_key == (0, -3)
    for wrong in ({"least_priority_by_key": ["a"]}, {"clients_by": "host"}, {"max_requests_per_key": -1}):
        with pytest.raises(Exception, match=f"server.{next(iter(wrong))}"):
            ServerConfig.from_dict(wrong)
