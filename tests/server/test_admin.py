"""What an operator may order with --enable-admin: pauses, ends of requests, an empty prefix cache."""

from __future__ import annotations

import itertools
import json
import os
import signal
import threading

import httpx
import pytest
from server_harness import PATIENCE, RunningServer
from test_data_parallel import by_engine
from test_intake import Compiles, constraint
from test_server_faults import Reader
from waiting import wait_for

from kvarena.allocators.prefix import PrefixCachingAllocator
from kvarena.engine.clock import WallClock
from kvarena.engine.core import Engine
from kvarena.engine.errors import ConfigError
from kvarena.engine.request import SamplingParams
from kvarena.engine.server.engine.intake import Intake
from kvarena.engine.server.engine.orders import Orders
from kvarena.engine.server.engine.served import ServedEngine
from kvarena.engine.server.shared.config import ADMIN_PATHS, ServerConfig
from kvarena.engine.server.shared.ipc import AddFrame, EngineInfo, ToEngine, pack_ids
from kvarena.engine.server.shared.metrics import PAUSED, Rows, create_page
from kvarena.experiments.serving.stub_engine import StubOptions, StubRunner, build
from kvarena.schedulers.chunked import ChunkedScheduler

ROOT_KEY = {"Authorization": "Bearer root"}
LONG = {"prompt": [20] * 8, "max_tokens": 6000, "ignore_eos": True, "temperature": 0}  # a minute, if nobody ends it
FEW = 20  # tokens of what is to end by itself: held back until it may


@pytest.fixture(scope="module")
def operated():
    """Two engines and two fronts; a key of the operator's own."""
    server = RunningServer(
        "--fronts", "2", "--engines", "2", "--step-time", "0.01", "--set", "enable_admin=true",
        'admin_keys=["root"]', "shutdown_timeout=120", module="kvarena.experiments.serving.stub_engine",
    )  # fmt: skip
    yield server
    if server.process.poll() is None:
        server.stop()


def order(server: RunningServer, path: str, method: str = "POST", **more: object) -> httpx.Response:
    """On a connection of its own, so that any front may get it."""
    with httpx.Client(base_url=server.url, timeout=PATIENCE) as client:
        return client.request(method, path, headers=ROOT_KEY, **more)  # type: ignore[arg-type]


def is_paused(server: RunningServer) -> bool:
    answer = order(server, "/is_paused", "GET")
    assert answer.status_code == 200, answer.text
    return answer.json()["is_paused"]


def last_reason(reader: Reader) -> str | None:
    reader.join(PATIENCE)
    assert reader.error is None and reader.lines[-1] == "data: [DONE]", reader.lines[-2:]
    return json.loads(reader.lines[-2][6:])["choices"][0]["finish_reason"]


@pytest.mark.parametrize("path", sorted(ADMIN_PATHS))
def test_off_is_a_404_that_says_so(server, path):
    for method in ("GET", "POST"):
        answer = server.client.request(method, path)
        assert answer.status_code == 404
        assert "--enable-admin" in answer.json()["error"]["message"]
    assert httpx.post(server.url + path, timeout=PATIENCE).status_code == 401


def test_the_operator_s_key_opens_these_paths_and_no_other(operated):
    for path in sorted(ADMIN_PATHS):
        for headers in ({}, operated.headers, {"Authorization": "Bearer Root"}, {"x-api-key": ""}):
            answer = httpx.post(operated.url + path, headers=headers, timeout=PATIENCE)
            assert answer.status_code == 401, (path, headers)
            assert "admin key" in answer.json()["error"]["message"]
    assert httpx.get(operated.url + "/is_paused", headers={"x-api-key": "root"}, timeout=PATIENCE).is_success
    assert order(operated, "/v1/models", "GET").status_code == 401
    assert "root" not in operated.client.get("/server_info").text.replace('"root_path"', "").replace("/root/", "")


def test_keys_of_the_operator_s_paths_are_checked_at_the_start():
    with pytest.raises(ConfigError, match="needs a key"):
        ServerConfig(enable_admin=True).with_keys({})
    with pytest.raises(ConfigError, match="are for the paths"):
        ServerConfig(admin_keys=("a",))
    with pytest.raises(ConfigError, match="KVARENA_ADMIN_KEY is set and empty"):
        ServerConfig(enable_admin=True).with_keys({"KVARENA_ADMIN_KEY": " "})
    assert ServerConfig(enable_admin=True).with_keys({"KVARENA_ADMIN_KEY": "b"}).admin_keys == ("b",)
    assert ServerConfig(enable_admin=True, api_keys=("a",)).with_keys({}).admin_keys == ()  # the server's key does


MALFORMED = [
    ("/pause", {"params": {"mode": "never"}}, 400, "mode"),
    ("/pause", {"params": {"moed": "keep"}}, 400, "moed"),
    ("/pause", {"params": [("mode", "keep"), ("mode", "wait")]}, 400, "mode"),
    ("/pause", {"params": {"mode": "keep"}, "json": {"mode": "keep"}}, 400, "mode"),
    ("/pause", {"params": {"clear_cache": "perhaps"}}, 400, "clear_cache"),
    ("/pause", {"json": {"mode": None}}, 400, "mode"),
    ("/pause", {"json": ["keep"]}, 400, None),
    ("/pause", {"content": b"{", "headers": {"content-type": "application/json"}}, 400, None),
    ("/pause", {"content": b"mode=keep", "headers": {"content-type": "application/x-www-form-urlencoded"}}, 415, None),
    ("/pause", {"content": b"[" * 100_000}, 400, None),
    ("/resume", {"params": {"mode": "keep"}}, 400, "mode"),
    ("/abort_requests", {}, 400, None),
    ("/abort_requests", {"json": {"request_ids": "all"}}, 400, "request_ids"),
    ("/abort_requests", {"json": {"request_ids": [1]}}, 400, "request_ids"),
    ("/abort_requests", {"json": {"request_ids": ["x"] * 5000}}, 400, "request_ids"),
    ("/abort_requests", {"json": {"ids": []}}, 400, "ids"),
    ("/reset_prefix_cache", {"params": {"reset_running_requests": "true"}}, 400, "reset_running_requests"),
    ("/reset_prefix_cache", {"json": {"all": True}}, 400, "all"),
]


@pytest.mark.parametrize(("path", "sent", "status", "param"), MALFORMED)
def test_what_is_malformed_changes_nothing(operated, path, sent, status, param):
    headers = ROOT_KEY | sent.get("headers", {})
    answer = httpx.post(operated.url + path, timeout=PATIENCE, **(sent | {"headers": headers}))
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["param"] == param
    assert not is_paused(operated)


def test_wrong_methods_say_which_is_right(operated):
    assert order(operated, "/pause", "GET").headers["allow"] == "POST"
    assert order(operated, "/is_paused").headers["allow"] == "GET"


def test_keep_holds_open_streams_and_new_requests_until_somebody_resumes(operated):
    readers = [Reader(operated) for _ in range(4)]
    wait_for(lambda: all(len(one.lines) > 2 for one in readers), "the streams do not begin")
    for _ in range(2):
        assert order(operated, "/pause", params={"mode": "keep"}).json() == {"status": "paused"}
    steps = operated.metrics()["kvarena:steps_total"]
    answers: list[httpx.Response] = []
    late = threading.Thread(target=lambda: answers.append(operated.complete([20], max_tokens=2)))
    late.start()
    wait_for(lambda: operated.metrics()["vllm:num_requests_waiting"] == 1, "the new request does not arrive")
    assert operated.metrics()["kvarena:steps_total"] == steps and not answers
    assert operated.client.get("/health").status_code == 200  # it stands still because it was told to
    ready = operated.client.get("/ready")
    assert (ready.status_code, ready.json()["error"]["code"]) == (503, "paused")
    assert is_paused(operated)
    for _ in range(2):
        assert order(operated, "/resume").json() == {"status": "resumed"}
    late.join(PATIENCE)
    assert answers[0].status_code == 200
    lines = [len(one.lines) for one in readers]
    wait_for(lambda: all(len(one.lines) > n for one, n in zip(readers, lines, strict=True)), "they do not go on")
    assert operated.client.get("/ready").status_code == 200
    assert order(operated, "/abort_requests", json={}).json()["aborted"] == 4
    assert [last_reason(one) for one in readers] == ["abort"] * 4


def test_a_client_that_leaves_a_paused_engine_frees_its_slots(operated):
    def waiting(number: int) -> None:
        wait_for(lambda: operated.metrics()["vllm:num_requests_waiting"] == number, f"{number} do not wait")

    assert order(operated, "/pause", json={"mode": "keep"}).is_success
    with httpx.Client(base_url=operated.url, headers=operated.headers, timeout=PATIENCE) as client:
        with client.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as answer:
            assert answer.status_code == 200
            waiting(1)
        waiting(0)
    assert order(operated, "/resume").is_success


def test_wait_refuses_what_is_new_and_is_done_when_the_rest_has_ended(operated):
    assert order(operated, "/pause", params={"mode": "keep"}).is_success  # the stream cannot end before it is asked
    reader = Reader(operated, max_tokens=FEW)
    done: list[httpx.Response] = []
    waiting = threading.Thread(target=lambda: done.append(order(operated, "/pause", params={"mode": "wait"})))
    waiting.start()
    wait_for(lambda: by_engine(operated, PAUSED) == [2.0, 2.0], "it does not refuse")
    refused = operated.complete([20])
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "paused")
    assert refused.headers["retry-after"]
    waiting.join(PATIENCE)
    assert done[0].json() == {"status": "paused"}
    assert last_reason(reader) == "length"
    assert order(operated, "/resume").is_success
    assert operated.complete([20]).status_code == 200


def test_a_pause_that_waits_ends_when_somebody_resumes(operated):
    reader = Reader(operated)
    done: list[httpx.Response] = []
    waiting = threading.Thread(target=lambda: done.append(order(operated, "/pause", params={"mode": "wait"})))
    waiting.start()
    wait_for(lambda: is_paused(operated), "it does not pause")
    assert order(operated, "/resume").is_success
    waiting.join(PATIENCE)
    assert (done[0].status_code, done[0].json()["error"]["code"]) == (409, "resumed")
    assert order(operated, "/abort_requests", json={}).json() == {"status": "aborted", "aborted": 1, "unknown": []}
    assert last_reason(reader) == "abort"


def test_requests_are_ended_by_either_of_their_ids(operated):
    hello = [{"role": "user", "content": "Hi"}]
    bodies = {
        "/v1/completions": LONG | {"n": 2, "prompt": [[20] * 8, [21] * 8], "temperature": 1.0},
        "/v1/chat/completions": {"messages": hello, "max_tokens": 6000, "ignore_eos": True},
        "/v1/messages": {"messages": hello, "max_tokens": 6000, "ignore_eos": True},
        "/v1/responses": {"input": "Hi", "max_output_tokens": 6000, "ignore_eos": True},
    }
    answers: dict[str, httpx.Response] = {}

    def ask(path: str) -> None:
        headers = operated.headers | {"X-Request-Id": f"of:{path[4:8]}"}
        answers[path] = httpx.post(operated.url + path, json=bodies[path], headers=headers, timeout=PATIENCE)

    threads = [threading.Thread(target=ask, args=(path,)) for path in bodies]
    reader = Reader(operated)
    wait_for(lambda: len(reader.lines) > 2, "the stream does not begin")
    assert order(operated, "/pause", params={"mode": "keep"}).is_success
    kept = Reader(operated, max_tokens=FEW)
    for thread in threads:
        thread.start()
    wait_for(lambda: operated.metrics()["vllm:num_requests_waiting"] == 8, "they do not arrive")
    shown = json.loads(reader.lines[1][6:])["id"]
    ids = [f"of:{path[4:8]}" for path in bodies]
    made = order(operated, "/abort_requests", json={"request_ids": [shown, "nobody's", *ids]}).json()
    assert made == {"status": "aborted", "aborted": 5, "unknown": ["nobody's"]}
    for thread in threads:
        thread.join(PATIENCE)
    assert last_reason(reader) == "abort"
    for path in ("/v1/completions", "/v1/chat/completions"):  # what there was of them
        body = answers[path].json()
        assert {choice["finish_reason"] for choice in body["choices"]} == {"abort"}
        assert body["usage"]["completion_tokens"] == 0
    for path in ("/v1/messages", "/v1/responses"):  # have no such reason
        assert answers[path].status_code == 503
        assert "operator" in answers[path].json()["error"]["message"]
        assert answers[path].headers["x-should-retry"] == "false"
    assert order(operated, "/resume").is_success
    assert last_reason(kept) == "length"


def test_abort_ends_all_and_an_engine_in_another_s_place_stands_still_too(operated):
    readers = [Reader(operated) for _ in range(3)]
    for _ in range(2):
        assert order(operated, "/pause").json() == {"status": "paused"}
    assert [last_reason(one) for one in readers] == ["abort"] * 3
    operated.wait_idle()
    assert operated.complete([20]).json()["error"]["code"] == "paused"
    os.kill(operated.engine_pid(), signal.SIGKILL)
    wait_for(lambda: sum(by_engine(operated, "kvarena:engine_restarts_total")) == 1, "no other engine starts")
    wait_for(lambda: by_engine(operated, "kvarena:engine_up") == [1.0, 1.0], "it is not up")
    assert by_engine(operated, PAUSED) == [2.0, 2.0]
    assert order(operated, "/reset_prefix_cache").json() == {"success": True, "blocks_in_use": 0}
    assert order(operated, "/resume").is_success
    wait_for(lambda: operated.complete([20]).status_code == 200, "it does not go on")


def test_sigterm_lets_what_a_pause_holds_finish(operated):
    """Comes last: it ends the server."""
    assert order(operated, "/pause", params={"mode": "keep"}).is_success
    readers = [Reader(operated, max_tokens=FEW) for _ in range(2)]
    assert all(one.lines == ["status 200"] for one in readers)
    assert operated.stop() == 0
    assert [last_reason(one) for one in readers] == ["length"] * 2


# Beside the processes.

HANDLES = itertools.count(1)


def add(num_prompt: int = 40, max_tokens: int = 4, first: int = 20, constraint: str | None = None) -> list:
    handle = next(HANDLES)
    sampling = SamplingParams(max_tokens=max_tokens)
    prompt = pack_ids([first] * num_prompt)
    return [ToEngine.ADD, *AddFrame(handle, f"cmpl-{handle}:0", prompt, sampling, 0.0, 0, "", "", constraint)]


def orders_of(served: ServedEngine) -> tuple[Intake, Orders, list]:
    intake, ended = Intake(served, 1, 100), []
    return intake, Orders(served.engine, intake, Rows(create_page(1), 1).engines[0], ended.append), ended


def test_a_reset_forgets_all_but_what_requests_own():
    allocator = PrefixCachingAllocator(num_blocks=64, block_size=16, max_model_len=512)
    engine = Engine(
        ChunkedScheduler(allocator, max_model_len=512), allocator, StubRunner(StubOptions(2048)), WallClock()
    )
    intake, orders, _ = orders_of(ServedEngine(engine, EngineInfo(512, 512, 2048)))
    intake.receive(0, [add(), add(first=30, max_tokens=100)])
    intake.run_round(60)
    for _ in range(8):
        engine.step()  # the first has ended, the other runs
    assert len(list(allocator.cached_blocks())) == 2
    intake.receive(0, [[ToEngine.ORDER, 7, "reset", {}]])
    intake.run_round(60)
    assert orders.replies.pop().result == {"blocks_in_use": 3}
    assert not list(allocator.cached_blocks())
    orders.obey(0, 8, "abort", {"request_ids": None})
    orders.obey(0, 9, "reset", {})
    assert [reply.result for reply in orders.replies][-1] == {"blocks_in_use": 0}
    assert allocator.usage().free == 64 * 16
    intake.receive(0, [late := add(first=30)])
    intake.run_round(60)
    assert allocator.match_prefix(intake.requests[0, late[1]]) == 0


def test_what_waits_for_its_grammar_is_ended_and_refused_too():
    served, compiles = build(StubOptions(2048)), Compiles(lambda *_: None)
    object.__setattr__(served, "compile_grammar", compiles)
    intake, orders, _ = orders_of(served)
    compiles.go.clear()
    try:
        intake.receive(0, [constraint(), put_off := add(constraint="k")])
        intake.run_round(60)
        assert intake.num_parked == 1
        orders.obey(0, 1, "pause", {"mode": "abort", "clear_cache": True})
        orders.settle()
        assert intake.outs[0].admitted == [(put_off[1], "aborted", "the operator has ended it")]
        assert [reply.result for reply in orders.replies] == [{}]
        intake.receive(0, [late := add()])
        intake.run_round(60)
        assert intake.outs[0].admitted[-1][:2] == (late[1], "paused")
    finally:
        compiles.go.set()
