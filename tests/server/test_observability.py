"""Metrics under vLLM's names that agree with what was asked, the access log, traces, CORS and TLS."""

from __future__ import annotations

import http.server
import json
import ssl
import subprocess
import threading
import time

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from server_harness import PATIENCE, RunningServer

from kvarena.engine.classes import CLASSES

# What the shipped Grafana boards and common autoscalers query.
QUERIED = (
    "vllm:e2e_request_latency_seconds_bucket",
    "vllm:generation_tokens_total",
    "vllm:prompt_tokens_total",
    "vllm:inter_token_latency_seconds_bucket",
    "vllm:request_time_per_output_token_seconds_bucket",
    "vllm:kv_cache_usage_perc",
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:request_decode_time_seconds_sum",
    "vllm:request_prefill_time_seconds_sum",
    "vllm:request_queue_time_seconds_sum",
    "vllm:request_inference_time_seconds_sum",
    "vllm:request_generation_tokens_bucket",
    "vllm:request_prompt_tokens_bucket",
    "vllm:request_max_num_generation_tokens_sum",
    "vllm:request_success_total",
    "vllm:time_to_first_token_seconds_bucket",
    "vllm:iteration_tokens_total_count",
    "vllm:num_preemptions_total",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
    "vllm:cache_config_info",
)


@pytest.mark.parametrize("name", QUERIED)
def test_the_names_that_boards_query_exist(server, name):
    text = server.client.get("/metrics").text
    line = next(line for line in text.splitlines() if line.startswith((name + "{", name + " ")))
    assert 'engine="0"' in line
    assert name.endswith("_info") or 'model_name="demo"' in line


def test_counts_agree_with_what_was_asked(server):
    server.wait_idle()
    before = server.metrics()
    answers = [server.complete([40 + i] * 10, max_tokens=7, ignore_eos=True) for i in range(3)]
    answers.append(server.complete([50] * 10, max_tokens=5, ignore_eos=True, n=2, temperature=1.0))
    assert all(answer.status_code == 200 for answer in answers)
    server.wait_idle()
    after = server.metrics()

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert grown("vllm:generation_tokens_total") == 3 * 7 + 2 * 5
    assert grown("vllm:prompt_tokens_total") == 5 * 10
    assert grown("vllm:request_success_total{length}") == 5
    assert grown("vllm:e2e_request_latency_seconds_count") == 5
    assert grown("vllm:time_to_first_token_seconds_count") == 5
    assert grown("vllm:inter_token_latency_seconds_count") == 3 * 6 + 2 * 4
    assert grown("vllm:request_generation_tokens_sum") == 31
    assert grown("vllm:request_params_n_sum") == 3 + 2
    assert grown("vllm:request_max_num_generation_tokens_sum") == 3 * 7 + 5
    assert grown("vllm:iteration_tokens_total_sum") >= 50
    assert grown("http_requests_total{/v1/completions,POST,2xx}") == 4


def test_a_stop_string_is_an_end_like_any_other(server):
    """The front finds it, and the engine only hears of an abort: prompts and times must count all the same."""
    free = server.complete([60] * 10, max_tokens=12, ignore_eos=True).json()["choices"][0]["text"]
    server.wait_idle()
    before = server.metrics()
    answer = server.complete([60] * 10, max_tokens=400, stop=free[-3:], ignore_eos=True).json()
    assert answer["choices"][0]["finish_reason"] == "stop"
    server.wait_idle()
    after = server.metrics()
    assert after["vllm:prompt_tokens_total"] == before["vllm:prompt_tokens_total"] + 10
    assert after["vllm:request_success_total{stop}"] == before["vllm:request_success_total{stop}"] + 1
    for name in ("queue", "inference", "prefill", "decode"):
        key = f"vllm:request_{name}_time_seconds_count"
        assert after[key] == before[key] + 1, name


def test_the_ledger_adds_up_to_the_pool(server):
    slots = server.slots()
    assert set(slots) == set(CLASSES)
    assert sum(slots.values()) == 128 * 16


def test_the_access_log_is_one_structured_line(server):
    server.client.get("/v1/models", headers={"X-Request-Id": "look-for-me"})
    # The line is written when the answer has gone out, so it may come after the client has it.
    deadline = time.monotonic() + PATIENCE
    while not (lines := [line for line in server.log.splitlines() if "look-for-me" in line]):
        assert time.monotonic() < deadline, server.log
        time.sleep(0.05)
    line = lines[0]
    assert 'method=GET path="/v1/models" status=200 seconds=' in line
    server.client.get("/v1/models/%0d%0aforged%22")
    assert "\nforged" not in server.log


class _Collector(http.server.BaseHTTPRequestHandler):
    bodies: list[bytes]

    def do_POST(self) -> None:
        self.bodies.append(self.rfile.read(int(self.headers["content-length"])))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        return


@pytest.fixture(scope="module")
def special(tmp_path_factory):
    """A server with TLS, CORS, traces and two fronts."""
    folder = tmp_path_factory.mktemp("tls")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", folder / "key.pem", "-out", folder / "cert.pem"],
        check=True, capture_output=True,
    )  # fmt: skip
    handler = type("Collector", (_Collector,), {"bodies": []})
    collector = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=collector.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{collector.server_address[1]}/v1/traces"
    settings = [
        f'ssl_certfile="{folder}/cert.pem"',
        f'ssl_keyfile="{folder}/key.pem"',
        'cors_origins=["https://app.example"]',
        f'otlp_endpoint="{endpoint}"',
        f'chat_template="{folder}/template.jinja"',
        "force_include_usage=true",
    ]
    (folder / "template.jinja").write_text(
        "{% if messages[0].role == 'tool' %}{{ raise_exception('a chat cannot begin with a tool') }}{% endif %}"
        "{{ messages[0].content + messages[1].content }}{{ ' and more' if more is defined }}"
    )
    server = RunningServer("--fronts", "2", "--set", *settings, module="kvarena.experiments.serving.stub_engine")
    context = ssl.create_default_context(cafile=str(folder / "cert.pem"))
    server.client = httpx.Client(base_url=server.url, headers=server.headers, verify=context, timeout=PATIENCE)
    yield server, handler.bodies
    if server.process.poll() is None:
        server.stop()
    collector.shutdown()


def test_tls_and_cors_on_streams_too(special):
    server, _ = special
    assert server.url.startswith("https://")
    origin = {"Origin": "https://app.example"}
    body = {"prompt": [20], "max_tokens": 3, "stream": True}
    answer = server.client.post("/v1/completions", json=body, headers=origin)
    assert answer.text.endswith("data: [DONE]\n\n")
    assert answer.headers["access-control-allow-origin"] == "https://app.example"
    # The operator wants counts in every event, whatever is asked for.
    shown = [json.loads(line[6:])["usage"] for line in answer.text.splitlines() if line.startswith("data: {")]
    assert [usage["completion_tokens"] for usage in shown][-2:] == [3, 3]
    other = server.client.get("/v1/models", headers={"Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in other.headers
    preflight = server.client.options("/v1/completions", headers=origin | {"Access-Control-Request-Method": "POST"})
    assert preflight.status_code == 200


def test_22_a_template_that_refuses_is_a_400(special):
    server, _ = special

    def ask(*messages: dict) -> httpx.Response:
        return server.post("/v1/chat/completions", {"messages": list(messages), "max_tokens": 2})

    user = {"role": "user", "content": "Hi"}
    assert ask(user, user).status_code == 200
    refused = ask({"role": "tool", "content": "x"}, user)
    assert refused.status_code == 400
    assert "a chat cannot begin with a tool" in refused.json()["error"]["message"]
    assert ask(user).status_code == 400  # messages[1] is undefined: the template raises


@pytest.mark.parametrize("asked", [{}, {"stream_options": {"include_usage": False}}])
def test_an_operator_may_have_every_stream_tell_its_usage(special, asked):
    server, _ = special
    answer = server.client.post("/v1/completions", json={"prompt": [20], "max_tokens": 3, "stream": True} | asked)
    assert '"usage":{"prompt_tokens":1,"completion_tokens":3' in answer.text.splitlines()[-4]


def test_template_kwargs_reach_the_template(special):
    server, _ = special
    body = {"messages": [{"role": "user", "content": "Hi"}] * 2, "max_tokens": 1}
    plain = server.post("/v1/chat/completions", body).json()["usage"]["prompt_tokens"]
    more = server.post("/v1/chat/completions", body | {"chat_template_kwargs": {"more": True}}).json()
    assert more["usage"]["prompt_tokens"] > plain
    counted = server.post("/tokenize", body | {"chat_template_kwargs": {"more": True}}).json()["count"]
    assert counted == more["usage"]["prompt_tokens"]


def test_all_fronts_count_into_one_page_and_spans_leave(special):
    server, bodies = special
    before = server.metrics().get("vllm:request_success_total{length}", 0)
    for _ in range(8):
        with httpx.Client(base_url=server.url, headers=server.headers, verify=False) as client:
            client.post("/v1/completions", json={"prompt": [20], "max_tokens": 3}, headers={"X-Request-Id": "traced-7"})
    assert server.metrics()["vllm:request_success_total{length}"] == before + 8
    parent = {"traceparent": f"00-{'ab' * 16}-{'cd' * 8}-01"}
    assert server.client.post("/v1/completions", json={"prompt": [20], "max_tokens": 3}, headers=parent).is_success
    unwatched = {"traceparent": f"00-{'ef' * 16}-{'cd' * 8}-00"}
    assert server.client.post("/v1/completions", json={"prompt": [20], "max_tokens": 3}, headers=unwatched).is_success
    assert server.stop() == 0
    sent = [ExportTraceServiceRequest.FromString(body) for body in bodies]
    spans = [span for one in sent for part in one.resource_spans for scope in part.scope_spans for span in scope.spans]
    roots = [span for span in spans if span.name == "llm_request"]
    ids = [value.value.string_value for span in roots for value in span.attributes if value.key == "gen_ai.request.id"]
    assert ids.count("traced-7") == 8
    [going_on] = [span for span in roots if span.parent_span_id]
    assert (going_on.trace_id, going_on.parent_span_id) == (bytes.fromhex("ab" * 16), bytes.fromhex("cd" * 8))
    parts = [span for span in spans if span.parent_span_id == going_on.span_id]
    assert [span.name for span in parts] == ["queue", "prompt", "decode", "detokenize"]
    assert all(span.trace_id == going_on.trace_id for span in parts)
    assert not any(span.trace_id == bytes.fromhex("ef" * 16) for span in spans)  # its caller records nothing
