"""What many requests leave behind: nothing. Hang-ups by the thousand, a long mix, and the whole suite over again.

The numbers are the items of the reliability suite (docs/serving.md).
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Callable

import httpx
import pytest
import test_attacks_on_turns as turns
import test_bad_requests as bad
import test_rough_clients as rough
from server_footprint import Footprint, assert_flat
from server_harness import PATIENCE, RunningServer

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello!"}]
PERSON = {"type": "object", "properties": {"age": {"type": "integer", "maximum": 99}}, "required": ["age"]}


def _crowd(server: RunningServer) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    return httpx.AsyncClient(base_url=server.url, headers=server.headers, timeout=PATIENCE, limits=limits)


async def _hang_up(client: httpx.AsyncClient, rng: random.Random) -> None:
    """Read a few events of a stream, or none, and close the connection."""
    body = {
        "prompt": [rng.randint(20, 2000) for _ in range(rng.randint(1, 60))],
        "max_tokens": 400,
        "ignore_eos": True,
        "stream": True,
        "n": rng.choice((1, 1, 2)),
    }
    async with client.stream("POST", COMPLETIONS, json=body) as response:
        assert response.status_code == 200
        most = rng.randint(0, 6)
        async for _ in response.aiter_lines():
            most -= 1
            if most < 0:
                return


def _hang_ups(server: RunningServer, count: int, seed: int, at_once: int = 24) -> None:
    async def run() -> None:
        async with _crowd(server) as client:
            left = iter(range(count))

            async def one(rng: random.Random) -> None:
                for _ in left:
                    await _hang_up(client, rng)

            await asyncio.gather(*(one(random.Random(seed * 1000 + i)) for i in range(at_once)))

    asyncio.run(run())


@pytest.mark.parametrize("count", (150, pytest.param(10_000, marks=pytest.mark.slow)))
def test_31_hang_ups_by_the_thousand_leave_nothing(stub, count):
    """Each of a stream that has 4 s to go: a fast engine would be done before its client leaves."""
    _hang_ups(stub, count // 3, seed=1)
    stub.wait_idle()
    before, aborted = Footprint.of(stub), stub.metrics().get("vllm:request_success_total{abort}", 0)
    _hang_ups(stub, count, seed=2)
    assert_flat(stub, before)
    metrics = stub.metrics()
    assert metrics["vllm:request_success_total{abort}"] >= aborted + count
    assert metrics["vllm:num_requests_running"] == metrics["vllm:num_requests_waiting"] == 0
    assert metrics["vllm:kv_cache_usage_perc"] == 0
    stub.assert_alive()


async def _streams(client: httpx.AsyncClient, rng: random.Random) -> None:
    length = rng.randint(1, 40)
    body = {"prompt": [rng.randint(20, 2000)] * 9, "max_tokens": length, "ignore_eos": True, "stream": True}
    async with client.stream("POST", COMPLETIONS, json=body | {"return_token_ids": True}) as response:
        events = [line[6:] async for line in response.aiter_lines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    choices = [json.loads(event)["choices"][0] for event in events[:-1]]
    assert choices[-1]["finish_reason"] == "length"
    assert sum(len(choice.get("token_ids", ())) for choice in choices) == length


async def _answers(client: httpx.AsyncClient, rng: random.Random) -> None:
    kinds: list[tuple[str, dict]] = [
        (CHAT, {"messages": HELLO, "max_tokens": 12}),
        (COMPLETIONS, {"prompt": "The function", "n": 3, "logprobs": 2, "max_tokens": 8}),
        (COMPLETIONS, {"prompt": "The", "stop": ["e", " the"], "max_tokens": 20}),
        (COMPLETIONS, {"prompt": [7] * 50, "echo": True, "logprobs": 1, "max_tokens": 0}),
        (CHAT, {"messages": HELLO, "max_tokens": 30, "response_format": bad._fmt(PERSON)["response_format"]}),
        ("/tokenize", {"prompt": "word " * 300}),
    ]
    path, body = rng.choice(kinds)
    response = await client.post(path, json=body)
    assert response.status_code == 200, response.text


async def _mistakes(client: httpx.AsyncClient, rng: random.Random) -> None:
    _, path, body, status = rng.choice(bad.CASES)
    assert (await client.post(path, json=body)).status_code == status


async def _turns(client: httpx.AsyncClient, rng: random.Random) -> None:
    await turns._turn(client, rng)


MIX = (_turns, _streams, _streams, _answers, _answers, _mistakes, _hang_up)


def _mix(server: RunningServer, seconds: float, seed: int) -> Counter[str]:
    done: Counter[str] = Counter()
    until = time.monotonic() + seconds

    async def run() -> None:
        async with _crowd(server) as client:

            async def one(rng: random.Random) -> None:
                while time.monotonic() < until:
                    kind = rng.choice(MIX)
                    await kind(client, rng)
                    done[kind.__name__] += 1

            await asyncio.gather(*(one(random.Random(seed + i)) for i in range(16)))

    asyncio.run(run())
    return done


@pytest.mark.timeout(900)
@pytest.mark.parametrize("seconds", (3, pytest.param(600, marks=pytest.mark.slow)))
def test_41_a_long_mix_leaves_nothing(server, seconds):
    _mix(server, seconds / 3, seed=100)
    server.wait_idle()
    before = Footprint.of(server)
    done = _mix(server, seconds * 2 / 3, seed=200)
    assert_flat(server, before)
    assert set(done) == {kind.__name__ for kind in MIX}
    server.assert_alive()


SUITE: tuple[Callable[[RunningServer], None], ...] = (
    bad.test_2_wrong_content_type,
    bad.test_18_the_limit_itself_is_served,
    bad.test_15_an_exploding_regex_holds_nobody_up,
    bad.test_21_odd_text_is_only_text,
    bad.test_26_malformed_http_is_refused,
    bad.test_27_request_ids_are_sanitised,
    bad.test_28_other_methods,
    bad.test_35_the_same_request_id_twice_at_once,
    lambda server: rough.leave_while_queued(server, 1),
    rough.test_33_slow_bodies_hold_nobody_up,
    rough.test_34_reset_and_half_open_connections,
)


def _whole_suite(server: RunningServer) -> None:
    for _, path, body, status in bad.CASES:
        bad.assert_error(server.post(path, body), status)
    for _, data, status in bad.RAW:
        bad.test_raw_body(server, data, status)
    for test in SUITE:
        test(server)


@pytest.mark.parametrize("times", (1, pytest.param(4, marks=pytest.mark.slow)))
def test_after_the_whole_suite_the_server_is_as_before(server, times):
    for _ in range(times):
        _whole_suite(server)
    server.wait_idle()
    before = Footprint.of(server)
    for _ in range(times):
        _whole_suite(server)
    assert_flat(server, before)
    slots = server.slots()
    assert slots["token_states"] + slots["reservation"] + slots["internal"] == 0 < sum(slots.values())
    server.assert_alive()
