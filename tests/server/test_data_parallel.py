"""Several engines behind one port: the same tokens, a share for each, and what is lost with one of them."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from checkpoints import write_checkpoint
from image_checkpoints import shared_model, write_original
from server_harness import PATIENCE, RunningServer
from test_server_faults import Reader, _gone, _stub
from waiting import wait_for

from kvarena import experiments
from kvarena.engine.errors import ConfigError
from kvarena.engine.server.processes.engine import Place
from kvarena.experiments.serving.flags import overrides_of, parse_flags
from kvarena.experiments.serving.router import make_router
from kvarena.experiments.serving.serve import build_served_engine
from kvarena.experiments.serving.words import in_flags
from kvarena.experiments.settings.compose import load_run

PROMPTS = [[30 + i] * 20 + list(range(40, 60)) for i in range(8)]
SMALL = ("--max-model-len", "256", "--num-gpu-blocks-override", "64", "--dtype", "float32")


def by_engine(server: RunningServer, name: str) -> list[float]:
    """A metric's value of each engine."""
    text = server.client.get("/metrics").text
    found = re.findall(rf'^{name}\{{engine="(\d+)"[^}}]*\}} (\S+)$', text, re.M)
    found += re.findall(rf'^{name}\{{[^}}]*,engine="(\d+)"[^}}]*\}} (\S+)$', text, re.M)
    values: dict[int, float] = {}
    for engine, value in found:
        values[int(engine)] = values.get(int(engine), 0.0) + float(value)
    return [values[engine] for engine in sorted(values)]


def tokens_of(server: RunningServer) -> list[list[int]]:
    answers = [server.complete(prompt, max_tokens=12, ignore_eos=True, return_token_ids=True) for prompt in PROMPTS]
    assert all(answer.status_code == 200 for answer in answers), answers[0].text
    return [answer.json()["choices"][0]["token_ids"] for answer in answers]


def test_two_engines_give_the_tokens_of_one():
    """For every prompt, whichever engine has it; both have some, and metrics, events and pages tell them apart."""
    one = RunningServer(*SMALL)
    try:
        expected = tokens_of(one)
    finally:
        assert one.stop() == 0
    events = '{"enable_kv_cache_events": true, "endpoint": "tcp://*:0"}'
    server = RunningServer(*SMALL, "-dp", "2", "--router", "round_robin", "--kv-events-config", events)
    try:
        assert tokens_of(server) == expected
        assert by_engine(server, "vllm:request_success_total") == [4, 4]
        assert by_engine(server, "vllm:generation_tokens_total") == [48, 48]
        assert by_engine(server, "kvarena:engine_up") == [1, 1]
        assert len(by_engine(server, "vllm:cache_config_info")) == 2
        sources = server.client.get("/kv_event_sources").json()
        assert set(sources) == {"0", "1"} and sources["0"]["endpoint"] != sources["1"]["endpoint"]
        for engine in (0, 1):
            with server.client.stream("GET", "/dashboard/events", params={"engine": engine}) as response:
                line = next(line for line in response.iter_lines() if line.startswith("data: "))
            frame = json.loads(line[6:])
            assert (frame["engine"], frame["num_engines"], frame["counters"]["generated"]) == (engine, 2, 48)
        assert server.client.get("/dashboard/events", params={"engine": 2}).status_code == 400
        server.wait_idle()
    finally:
        assert server.stop() == 0
    assert "Traceback" not in server.said and "ERROR" not in server.said


# Family, what the engines are told beside a pool that is too small, and the count that says that it was.
TIGHT = ("--num-gpu-blocks-override", "14")
CELLS = [
    ("llama", ("--allocator", "paged", "--scheduler", "continuous", *TIGHT), "vllm:num_preemptions_total"),
    ("qwen3", ("--allocator", "radix", "--scheduler", "fair"), "vllm:prefix_cache_hits_total"),
    ("mixtral", ("--allocator", "paged", "--scheduler", "chunked", "--swap-space", "0.01", *TIGHT),
     "vllm:num_preemptions_total"),
    ("internvl", ("--scheduler", "priority"), "vllm:prefix_cache_hits_total"),
]  # fmt: skip


def written(directory: Path, family: str) -> Path:
    """A small checkpoint with a tokenizer beside it."""
    if family == "internvl":
        return write_original(directory, shared_model(), "LlamaForCausalLM")
    demo = Path(experiments.__file__).parent / "models" / "demo"
    vocabulary = json.loads((demo / "config.json").read_text())["vocab_size"]
    write_checkpoint(directory, family, vocab_size=vocabulary)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo / name, directory / name)
    return directory


def crowd(server: RunningServer) -> list[list[int]]:
    """Twelve prompts at once, some of which begin alike, beside three whose clients go after a token or two."""
    begin = list(range(30, 62))
    prompts = [[*(begin if i % 2 else reversed(begin)), 70 + i] for i in range(12)]

    def leave(i: int) -> None:
        body = {"prompt": [9 + i] * 30, "max_tokens": 90, "stream": True, "temperature": 0, "ignore_eos": True}
        with server.client.stream("POST", "/v1/completions", json=body) as answer:
            next(answer.iter_lines())

    def ask(prompt: list[int]) -> list[int]:
        answer = server.complete(prompt, max_tokens=24, ignore_eos=True, return_token_ids=True)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["token_ids"]

    with ThreadPoolExecutor(15) as pool:
        gone = [pool.submit(leave, i) for i in range(3)]
        found = list(pool.map(ask, prompts))
        assert [one.result() for one in gone] == [None] * 3
    # Prompts that come at once are computed in one step, where none finds another's blocks: these come one by one.
    found += [ask(prompt) for prompt in prompts[:2] for _ in range(3)]
    server.wait_idle()
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("family", "cell", "evidence"), CELLS, ids=[cell[0] for cell in CELLS])
def test_families_and_strategies_behind_one_port(tmp_path, family, cell, evidence):
    """Under preemption, swaps, prefix hits and clients that leave: the tokens of one engine with room for all."""
    model, flags = str(written(tmp_path / family, family)), ("--max-model-len", "128", "--dtype", "float32")
    one = RunningServer(*flags, "--num-gpu-blocks-override", "256", model=model)
    try:
        expected = crowd(one)
    finally:
        assert one.stop() == 0
    server = RunningServer("--num-gpu-blocks-override", "64", *flags, *cell, "-dp", "2", "--router", "round_robin",
                           model=model)  # fmt: skip
    try:
        assert crowd(server) == expected
        assert min(by_engine(server, "vllm:generation_tokens_total")) > 0
        assert sum(by_engine(server, evidence)) > 0
    finally:
        assert server.stop() == 0


def engines_of(server: RunningServer) -> list:
    """The engines' processes; they are started before the fronts, and anew after them."""
    fronts = {one.pid for one in server.parts() if _listens(one)}
    return [one for one in server.parts() if one.pid not in fronts]


def _listens(process) -> bool:
    return any(one.status == "LISTEN" for one in process.net_connections("tcp"))


@pytest.mark.parametrize("number", (signal.SIGKILL, signal.SIGSTOP), ids=("kill", "stop"))
def test_an_engine_that_is_lost_takes_only_its_own_streams_along(number):
    server = _stub("--engines", "2", "--set", "heartbeat_timeout=1.5")
    try:
        with server.held():
            readers = [Reader(server, max_tokens=90) for _ in range(8)]
            wait_for(lambda: sum(by_engine(server, "vllm:num_requests_running")) == 8, "they do not run")
            lost, kept = by_engine(server, "vllm:num_requests_running")
            assert lost and kept
            victim = engines_of(server)[0]
            os.kill(victim.pid, number)
            assert _gone([victim.pid])
        for reader in readers:
            reader.join(PATIENCE)
            assert reader.error is None and reader.lines[-1] == "data: [DONE]"
        ended = ['"error"' in reader.lines[-2] for reader in readers]
        assert sum(ended) == lost
        for reader, is_error in zip(readers, ended, strict=True):
            assert ('"code":"engine_dead"' if is_error else '"finish_reason":"length"') in reader.lines[-2]
        # It is there again, and takes its share.
        wait_for(lambda: sum(by_engine(server, "kvarena:engine_restarts_total")) == 1, "none is started again")
        wait_for(lambda: by_engine(server, "kvarena:engine_up") == [1, 1], "no other engine was started")
        assert sorted(by_engine(server, "kvarena:engine_restarts_total")) == [0, 1]
        with server.held():
            again = [Reader(server, max_tokens=60) for _ in range(4)]
            wait_for(lambda: min(by_engine(server, "vllm:num_requests_running")) > 0, "one engine gets nothing")
        for reader in again:
            reader.join(PATIENCE)
            assert '"finish_reason":"length"' in reader.lines[-2]
        server.wait_idle()
        assert server.process.poll() is None
    finally:
        assert server.stop() == 0
    assert "another one starts in its place" in server.said and "Traceback" not in server.said


def test_what_nobody_has_seen_of_is_answered_by_another_engine():
    """Answers that are not streamed, and streams that wait for their first token: no client notices."""
    server = _stub("--engines", "2")
    try:
        whole: list[int] = []

        def ask() -> None:
            whole.append(server.complete([20] * 8, max_tokens=90, ignore_eos=True).status_code)

        threads = [threading.Thread(target=ask) for _ in range(6)]
        with server.held():
            for thread in threads:
                thread.start()
            wait_for(lambda: sum(by_engine(server, "vllm:num_requests_running")) == 6, "they do not run")
            assert min(by_engine(server, "vllm:num_requests_running")) > 0
            os.kill(engines_of(server)[0].pid, signal.SIGKILL)
        for thread in threads:
            thread.join(PATIENCE)
        assert whole == [200] * 6
        wait_for(lambda: sum(by_engine(server, "kvarena:engine_restarts_total")) == 1, "none is started again")
        wait_for(lambda: by_engine(server, "kvarena:engine_up") == [1, 1], "no other engine was started")
        server.wait_idle()
    finally:
        assert server.stop() == 0


@pytest.mark.slow
def test_a_rank_that_dies_loses_no_request_of_which_nothing_was_seen():
    """Two engines of two ranks each: one's rank dies, and the other engine makes its whole answers again."""
    server = RunningServer(*SMALL, "-dp", "2", "-tp", "2", "--router", "round_robin")
    try:
        whole: list[list[int]] = []

        def ask(i: int) -> None:
            answer = server.complete([20 + i] * 8, max_tokens=200, ignore_eos=True, return_token_ids=True)
            whole.append(answer.json()["choices"][0]["token_ids"] if answer.status_code == 200 else [])

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        wait_for(lambda: sum(by_engine(server, "vllm:num_requests_running")) == 6, "they do not run")
        ranks = [one for one in server.children() if "ranks.child" in " ".join(one.cmdline())]
        assert len(ranks) == 2 and min(by_engine(server, "vllm:num_requests_running")) > 0
        ranks[0].kill()
        for thread in threads:
            thread.join(PATIENCE)
        assert [len(tokens) for tokens in whole] == [200] * 6
        assert re.search(r"rank 1 of 2: its process \d+ has ended with code -9", server.log)
        wait_for(lambda: sum(by_engine(server, "kvarena:engine_restarts_total")) == 1, "none is started again")
        wait_for(lambda: by_engine(server, "kvarena:engine_up") == [1, 1], "no other engine was started")
        server.wait_idle()
    finally:
        assert server.stop() == 0


def test_streams_that_wait_for_their_first_token_move_on():
    """An engine stands still with what it was sent: nothing has come of it, so another one answers."""
    server = _stub("--engines", "2", "--set", "heartbeat_timeout=60")
    try:
        victim = engines_of(server)[0]
        victim.suspend()
        ended: list[list[str]] = []
        threads = [threading.Thread(target=lambda: ended.append(_read(server))) for _ in range(4)]
        for thread in threads:
            thread.start()
        wait_for(lambda: sum(by_engine(server, "kvarena:open_requests")) + len(ended) == 5, "they are not sent")
        victim.kill()
        for thread in threads:
            thread.join(PATIENCE)
        assert [(lines[0], lines[-1]) for lines in ended] == [("status 200", "data: [DONE]")] * 4
        assert all('"finish_reason":"length"' in lines[-2] for lines in ended)
        assert sum(by_engine(server, "kvarena:rerouted_requests_total")) >= 1
    finally:
        assert server.stop() == 0


def _read(server: RunningServer) -> list[str]:
    reader = Reader(server, max_tokens=4)
    reader.join(PATIENCE)
    return reader.lines


def test_both_engines_lost_at_once_come_back():
    server = _stub("--engines", "2")
    try:
        reader = Reader(server)
        for engine in engines_of(server):
            engine.kill()
        reader.join(PATIENCE)
        assert reader.lines[-1] == "data: [DONE]" and '"code":"engine_dead"' in reader.lines[-2]
        wait_for(lambda: by_engine(server, "kvarena:engine_restarts_total") == [1, 1], "none is started again")
        wait_for(lambda: by_engine(server, "kvarena:engine_up") == [1, 1], "they do not come back")
        server.assert_alive()
    finally:
        assert server.stop() == 0


@pytest.mark.slow
def test_engines_that_never_last_stay_away_and_the_last_one_ends_the_server():
    server = _stub("--engines", "2")
    lost = 0
    while server.process.poll() is None:
        parts = engines_of(server)
        if "no other one is started" in server.log and lost == 4:
            assert server.complete([20] * 8).status_code == 200  # the other one goes on
        if parts:
            parts[-1].kill()  # the one that was started last
            lost += 1
            assert _gone([parts[-1].pid])
        time.sleep(0.5)
    assert server.process.returncode == 1
    assert "after 3 others" in server.log and "Traceback" not in server.log


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("-dp", "0"), "--data-parallel-size 0 must be at least 1"),
        (("--router", "least_kv"), "--router least_kv chooses among engines"),
        (("-dp", "65"), "--data-parallel-size 65 must be at most 64"),
        (("-dp", "2", "--router", "kv_exact"), "--router prefix_affinity or --router least_kv"),
    ],
)
def test_wrong_flags_are_one_line(flags, words):
    with pytest.raises(ConfigError) as caught:
        make_router(load_run(overrides_of(parse_flags(list(flags)))).router)
    assert words in in_flags(str(caught.value))


def test_each_engine_takes_a_gpu_of_its_own(monkeypatch):
    import torch

    from kvarena.experiments.serving import serve

    monkeypatch.setattr(serve, "_build", lambda *_: os.environ["CUDA_VISIBLE_DEVICES"])
    parallel = SimpleNamespace(world_size=1, executor="auto")
    config = SimpleNamespace(engine=SimpleNamespace(device="cuda"), parallel=parallel)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for given, size, expected in (("", 1, "1"), ("4,7,8,9", 1, "7"), ("", 2, "2,3"), ("4,7,8,9", 2, "8,9")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
        parallel.world_size = size
        assert build_served_engine(config, {}, str, Place(1, 2)) == expected
    with pytest.raises(ConfigError, match="--data-parallel-size 3 engines of 2 GPUs each need 6, and this machine has"):
        build_served_engine(config, {}, in_flags, Place(1, 3))
