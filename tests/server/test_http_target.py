"""`target=http://...`: the same workload against any OpenAI-compatible server, every failure on record."""

import asyncio
import io
import json
import os
import signal
import socket
import sys
import threading

import pyarrow.parquet as pq
import pytest
import uvicorn
from rich.console import Console
from server_harness import KEY
from waiting import wait_for

from kvarena.engine.classes import CLASSES
from kvarena.engine.errors import ConfigError, EngineError
from kvarena.experiments.entry import main
from kvarena.experiments.jobs.job import execute
from kvarena.experiments.jobs.output import HttpProgress
from kvarena.experiments.load.http_metrics import read_gauges
from kvarena.experiments.recording.interruption import Interrupted
from kvarena.experiments.settings.compose import load_run
from kvarena.reports.pages.comparison import compare
from kvarena.reports.pages.terminal import run_table
from kvarena.reports.reading.files import read_run

CHOICES = {"allocator": "paged", "scheduler": "continuous", "workload": "uniform", "arrival": "poisson"}
LOAD = [
    "workload=uniform", "workload.num_requests=12", "arrival=poisson", "arrival.rate=20", "report.progress=false",
    "workload.prompt_len={min:4,max:40}", "workload.output_len={min:2,max:12}", "engine.max_model_len=512",
    "report.kv_map=false", "report.pages=false", "driver.probe=false",
]  # fmt: skip


class ForeignServer:
    """A small OpenAI-compatible server that knows no extension, shows no token ids, and fails as it is told.

    Each prompt is answered with its own length of chunks after `delay` seconds. Prompts of a length in `failures` get
    that status; 0 breaks the stream off. Those of a length in `events` get that event in the stream. After `lives_for`
    answers there is none for a minute.
    """

    def __init__(
        self,
        delay: float = 0.0,
        failures: dict[int, int] | None = None,
        events: dict[int, bytes] | None = None,
        lives_for: int | None = None,
    ) -> None:
        self.delay, self.failures, self.events, self.lives_for = delay, failures or {}, events or {}, lives_for
        self.bodies: list[dict] = []
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        options = {"log_level": "error", "lifespan": "off", "timeout_graceful_shutdown": 1}
        config = uvicorn.Config(self, port=self.port, **options)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)

    def __enter__(self) -> str:
        self.thread.start()
        wait_for(lambda: self.server.started, "it does not start", 0.01)
        return f"http://127.0.0.1:{self.port}"

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self.thread.join()

    async def __call__(self, scope, receive, send) -> None:
        if scope["path"] == "/v1/models":
            await self._answer(send, 200, {"data": [{"id": "foreign"}]})
            return
        if scope["path"] != "/v1/completions":
            await self._answer(send, 404, {"error": {"message": "no such path"}})
            return
        text, more = b"", True
        while more:
            message = await receive()
            text, more = text + message["body"], message.get("more_body", False)
        body = json.loads(text)
        if "ignore_eos" in body:
            await self._answer(send, 400, {"error": {"message": "unknown parameter: ignore_eos"}})
            return
        self.bodies.append(body)
        status = self.failures.get(len(body["prompt"]), 200)
        if status not in (0, 200):
            await self._answer(send, status, {"error": {"message": "told to fail"}})
            return
        is_dead = self.lives_for is not None and len(self.bodies) > self.lives_for
        await asyncio.sleep(60.0 if is_dead else self.delay)
        await self._stream(send, body["max_tokens"], len(body["prompt"]), whole=bool(status))

    async def _stream(self, send, count: int, num_prompt: int, whole: bool) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        events = [{"choices": [{"text": "x", "finish_reason": None}]} for _ in range(count if whole else 1)]
        if whole:
            events.append({"choices": [{"text": "", "finish_reason": "length"}]})
            events.append({"choices": [], "usage": {"prompt_tokens": num_prompt, "completion_tokens": count}})
        if num_prompt in self.events:
            await send({"type": "http.response.body", "body": self.events[num_prompt], "more_body": True})
        for event in events:
            # The other line ending that server-sent events allow, and a pause between chunks.
            data = b"data: " + json.dumps(event).encode() + b"\r\n\r\n"
            await send({"type": "http.response.body", "body": data, "more_body": True})
        end = b"data: [DONE]\r\n\r\n" if whole else b""
        await send({"type": "http.response.body", "body": end})

    async def _answer(self, send, status: int, body: dict) -> None:
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps(body).encode()})


def run(tmp_path, url, *overrides, name="http"):
    folder = tmp_path / name
    folder.mkdir()
    # An arrival without a rate takes no rate.
    load = [one for one in LOAD if "arrival=closed_loop" not in overrides or not one.startswith("arrival")]
    cfg = load_run([*load, *([f"target={url}"] if url else []), *overrides])
    return execute(cfg, folder, name, CHOICES), read_run(folder)


@pytest.fixture(scope="module")
def lengths(tmp_path_factory) -> list[int]:
    """Of the load's prompts, in the order of their arrival."""
    return [int(n) for n in run(tmp_path_factory.mktemp("lengths"), None)[1].requests["num_prompt_tokens"]]


def test_our_server_beside_our_engine(server, tmp_path):
    key = tmp_path / "key"
    key.write_text(KEY + "\n")
    flags = (f"http.api_key_file={key}", "http.name=kvarena-serve", "report.pages=true")
    served, files = run(tmp_path, server.url, *flags)
    local, _ = run(tmp_path, None, name="here")
    assert served["num_finished"] == local["num_finished"] == 12
    assert served["num_output_tokens"] == local["num_output_tokens"]
    assert served["name"] == "kvarena-serve over HTTP"
    assert served["target"]["extensions_refused"] == []
    assert served["target"]["num_other_prompt_lens"] == 0
    assert served["itl_seconds"]["count"] > 12
    assert served["valid"]
    text = (tmp_path / "http/report.md").read_text()
    assert "no ledger" in text
    assert KEY not in (tmp_path / "http/manifest.json").read_text()
    summary = compare([("here", tmp_path / "here"), ("http", tmp_path / "http")], tmp_path / "both")
    assert summary["same_tokens"]["verdict"] == "same"
    assert summary["cells"][1]["paired"]["e2e_seconds"]["requests"]["count"] == 12
    assert summary["cells"][1]["label"] == "kvarena-serve × HTTP"
    assert summary["cells"][1]["batch_size_mean"] is None  # not 0: nobody saw its batches
    assert files.list_lengths("output_token_ids").sum() == served["num_output_tokens"]


def test_a_foreign_server_gets_openai_fields_only(tmp_path):
    foreign = ForeignServer()
    with foreign as url:
        summary, files = run(tmp_path, f"{url}/v1/")
    assert summary["num_finished"] == 12
    assert summary["target"]["url"] == url  # without the /v1 that it was given with
    assert summary["target"]["token_counts"] == {"not_stated": 0, "other_than_shown": 0, "merged": 0}
    assert summary["target"]["model"] == "foreign"
    assert summary["target"]["extensions_refused"] == ["ignore_eos", "min_p", "return_token_ids", "top_k"]
    assert all(isinstance(body["prompt"][0], int) and body["stream"] for body in foreign.bodies)
    assert (files.requests["num_output_tokens"] == files.requests["max_tokens"]).all()
    assert (files.list_lengths("token_times") == files.requests["num_output_tokens"]).all()
    assert not files.list_lengths("output_token_ids").any()
    compared = compare([("a", tmp_path / "http"), ("b", tmp_path / "http")], tmp_path / "both")
    assert compared["same_tokens"]["verdict"] == "not compared"


def test_requests_go_out_on_time_whatever_the_server_does(tmp_path):
    with ForeignServer(delay=3.0) as url:
        summary, files = run(tmp_path, url, "arrival.rate=100")
    req = files.requests
    # All are sent before the first is answered, and TTFT counts from the scheduled arrival.
    assert req["submit_time"].max() < req["first_token_time"].min()
    assert summary["ttft_seconds"]["min"] > 2.9
    assert (req["submit_time"] >= req["arrival_time"]).all()


def test_failures_are_recorded_one_by_one(tmp_path, lengths):
    assert load_run(LOAD).workload.need("num_requests") == len(lengths)
    chosen = sorted({n for n in lengths if n != 8})[:3]  # 8 is the probe's length
    failures = dict(zip(chosen, (500, 429, 0), strict=True))
    with ForeignServer(failures=failures) as url:
        summary, files = run(tmp_path, url)
    expected = [{500: "error", 429: "rejected", 0: "error"}.get(failures.get(int(n), 200), "length")
                for n in files.requests["num_prompt_tokens"]]  # fmt: skip
    assert files.requests["finish_reason"].tolist() == expected
    errors = {reason: text for reason, text in zip(expected, files.requests["error"], strict=True) if text}
    assert "status 429" in errors["rejected"]
    assert summary["num_finished"] == expected.count("length") < 12


def test_an_interrupted_load_keeps_its_answers(tmp_path, monkeypatch):
    """The server is silent from then on; what it had not answered is aborted."""
    signalled = lambda _, count: count == 6 and os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
    monkeypatch.setattr(HttpProgress, "__call__", signalled)
    with ForeignServer(lives_for=7) as url, pytest.raises(Interrupted, match="6 of 12 requests had ended and are kept"):
        run(tmp_path, url, "arrival.rate=1000")  # one more was the connection's
    files = read_run(tmp_path / "http")
    assert files.manifest["run"]["interrupted"]["num_ended"] == 6
    reasons = files.requests["finish_reason"].tolist()
    assert (reasons.count("length"), reasons.count("abort")) == (6, len(reasons) - 6)
    assert not (tmp_path / "http" / "cell.json").exists()
    assert set(files.requests["error"][files.requests["finish_reason"] == "abort"]) == {"the run was interrupted"}


def test_a_server_that_dies_in_the_run_leaves_errors(tmp_path):
    with ForeignServer(lives_for=6) as url:
        summary, _ = run(tmp_path, url, "http.timeout=10", "arrival.rate=8", "workload.num_requests=16")
    assert 0 < summary["num_failed"] < 16
    assert summary["num_failed"] + summary["num_finished"] == 16
    assert "Timeout" in summary["rejections"][0]["example"]


BAD_EVENTS = (
    b"[1, 2]", b'"text"', b'{"choices": [5]}', b'{"choices": 7}', b'{"usage": "many"}', b'{"choices": [', b"\xff\xfe",
    b'{"choices": [{"token_ids": 3}]}', b'{"usage": {"completion_tokens": "x"}}',
    b'{"usage": {"prompt_tokens_details": 1}}',
)  # fmt: skip


@pytest.mark.parametrize("event", BAD_EVENTS)
def test_an_answer_of_another_shape_is_a_failed_request_among_others(event, tmp_path, capfd, lengths):
    """One such answer ended the run, and all answers with it."""
    chosen = next(n for n in lengths if n != 8)  # 8 is the probe's length
    with ForeignServer(events={chosen: b"data: " + event + b"\r\n\r\n"}) as url:
        summary, _ = run(tmp_path, url)
    assert summary["num_failed"] == lengths.count(chosen)
    assert summary["num_finished"] == 12 - lengths.count(chosen)
    [kind] = summary["rejections"]
    assert kind["example"].startswith("an event of the stream is no completion (")
    assert f"{summary['num_failed']} failed" in summary["headline"]
    warning = f"warning: http: {summary['num_failed']} of 12 requests failed, such as by: {kind['example']}"
    assert warning in capfd.readouterr().err
    console = Console(file=io.StringIO(), width=200)
    console.print(run_table(summary))
    assert f"{summary['num_failed']} failed" in console.file.getvalue()


@pytest.mark.parametrize("metrics", ["http://[::1", "http://localhost:abc/metrics"])
def test_gauges_that_cannot_be_read_do_not_cost_the_run(metrics, tmp_path):
    """The reader's error came up when all requests had been answered, and no file was written."""
    with ForeignServer() as url:
        summary, _ = run(tmp_path, url, f"http.metrics='{metrics}'")
    assert summary["num_finished"] == 12
    assert "InvalidURL" in summary["target"]["gauges"]["error"]


def test_a_closed_loop_keeps_its_users(tmp_path):
    with ForeignServer(delay=0.05) as url:
        _, files = run(tmp_path, url, "arrival=closed_loop", "arrival.num_users=3")
    events = [(t, 1) for t in files.requests["submit_time"]] + [(t, -1) for t in files.requests["finish_time"]]
    assert max(sum(step for when, step in events if when <= t) for t, _ in events) == 3


def test_a_warm_cache_sends_every_prompt_before_the_clock_starts(tmp_path):
    foreign = ForeignServer()
    with foreign as url:
        summary, _ = run(tmp_path, url, "driver.cache=warm")
    prompts = [body["prompt"] for body in foreign.bodies[1:]]
    assert prompts[:12] == prompts[12:] or sorted(prompts[:12]) == sorted(prompts[12:])
    assert {body["max_tokens"] for body in foreign.bodies[1:13]} == {1}
    assert summary["cache"] == "warm"


def test_a_prompt_that_breaks_off_while_the_cache_warms_up_is_an_error(tmp_path):
    with ForeignServer(failures={9: 0}) as url, pytest.raises(EngineError, match=r"the prompt of '.*' failed"):
        run(tmp_path, url, "driver.cache=warm", "workload.prompt_len={min:9,max:9}", "workload.num_requests=2")


@pytest.mark.parametrize(
    ("override", "error", "message"),
    [
        ("target=ftp://x", ConfigError, "target=ftp://x must be http"),
        ("target=http://127.0.0.1:9", EngineError, "does not answer /v1/models"),
        ("http.api_key_file=/nowhere", ConfigError, "http.api_key_file=/nowhere cannot be read"),
        ("sampling.n=2", ConfigError, "sampling.n=2 needs this process"),
        ("sampling.beams=2", ConfigError, "sampling.beams=2 needs this process"),
        ("http.timeout=0", ConfigError, "http.timeout=0 must be above 0"),
    ],
)
def test_bad_targets_are_one_line(tmp_path, override, error, message):
    with pytest.raises(error, match=message):
        run(tmp_path, "http://127.0.0.1:9" if not override.startswith("target") else None, override)


VLLM_METRICS = """\
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 4.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="m"} 2.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.5
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.7
# TYPE vllm:num_preemptions counter
vllm:num_preemptions_total{engine="0",model_name="m"} 9.0
# TYPE vllm:prefix_cache_queries counter
vllm:prefix_cache_queries_total{engine="0",model_name="m"} 100.0
# TYPE vllm:prefix_cache_hits counter
vllm:prefix_cache_hits_total{engine="0",model_name="m"} 25.0
"""


def test_names_of_other_servers_are_known():
    values = read_gauges(VLLM_METRICS)
    expected = {
        "num_running": 7,
        "num_waiting": 2,
        "kv_usage": 0.6,
        "num_preemptions": 9,
        "prefix_queries": 100,
        "prefix_hits": 25,
    }
    assert values == pytest.approx(expected)
    assert read_gauges("# TYPE sglang:token_usage gauge\nsglang:token_usage 0.25\n") == {"kv_usage": 0.25}
    assert read_gauges("# TYPE python_info gauge\npython_info 1.0\n") == {}


def test_our_servers_gauges_and_ledger_are_read_during_the_run(stub, tmp_path):
    """Of steps that last until the gauges have been written and read."""
    key = tmp_path / "key"
    key.write_text(KEY + "\n")
    flags = (f"http.api_key_file={key}", "http.metrics_interval=0.05", "report.pages=true")
    with stub.held():
        summary, files = run(tmp_path, stub.url, *flags, "workload.output_len={min:4,max:8}")
    gauges = summary["gauges"]
    assert gauges["num_readings"] > 5
    assert gauges["num_running"]["max"] >= 1
    assert 0 < gauges["kv_usage"]["max"] <= 1
    assert summary["target"]["gauges"] == {"url": "/metrics", "num_failed": 0, "error": None}
    columns = pq.read_table(files.path / "gauges.parquet").to_pydict()
    total = {sum(slots) for slots in zip(*(columns[name] for name in CLASSES), strict=True)}
    assert len(total) == 1  # the ledger's classes add up to the pool in every reading
    assert (files.path / "figures" / "gauges.png").exists()
    assert "The server's own gauges" in (files.path / "report.md").read_text()


def test_a_server_without_gauges_is_asked_once_and_said_to_have_none(tmp_path):
    foreign = ForeignServer()
    with foreign as url:
        summary, files = run(tmp_path, url, "http.metrics_interval=0.01", "report.pages=true")
    assert summary["gauges"] is None
    assert summary["target"]["gauges"]["num_failed"] == 1
    assert "404" in summary["target"]["gauges"]["error"]
    assert "It showed no gauges." in (files.path / "report.md").read_text()


def test_a_server_that_serves_nothing_ends_the_command_with_an_error(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    with ForeignServer(failures={9: 500, 10: 500}) as url:
        options = [
            *LOAD,
            "arrival.rate=1000",
            "workload.prompt_len={min:9,max:10}",
            f"target={url}",
            "report.pages=false",
        ]
        monkeypatch.setattr(sys, "argv", ["run.py", *options, f"hydra.run.dir={tmp_path}/run"])
        assert main() == 2
    [line] = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "finished none of 12 requests: " in line
    assert "told to fail" in line
    assert line.endswith("To serve any: look into the server's log")
    assert (tmp_path / "run" / "cell.json").exists()
    contention = json.loads((tmp_path / "run" / "manifest.json").read_text())["contention"]
    assert contention["processor_share"] > 0
    assert contention["probe"] is None
