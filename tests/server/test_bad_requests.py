"""Bad input gets the right 4xx in OpenAI's shape, the engine never sees it, and the next request is served.

The numbers in names and ids are the items of the reliability suite (docs/serving.md).
"""

from __future__ import annotations

import base64
import contextlib
import json
import socket
import struct
import zlib

import httpx
import pytest

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


def _deep(levels: int) -> dict:
    schema: dict = {"type": "object"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


def _png(width: int, height: int) -> str:
    """A PNG header that promises an image of this size."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return "data:image/png;base64," + base64.b64encode(data).decode()


def _image(url: object) -> dict:
    return {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}


def _chat(**extra: object) -> dict:
    return {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2, **extra}


def _fmt(schema: object) -> dict:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}}


P = {"prompt": "x", "max_tokens": 2}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
LIST_TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}
CASES = [
    ("4 unknown model", COMPLETIONS, P | {"model": "nope"}, 404),
    ("5 no messages", CHAT, {}, 400),
    ("5 messages a string", CHAT, {"messages": "hi"}, 400),
    ("5 messages empty", CHAT, {"messages": []}, 400),
    ("5 message without role", CHAT, {"messages": [{"content": "x"}]}, 400),
    ("6 no prompt", COMPLETIONS, {}, 400),
    ("6 empty list", COMPLETIONS, {"prompt": []}, 400),
    ("6 empty string", COMPLETIONS, {"prompt": ""}, 400),
    ("6 negative id", COMPLETIONS, {"prompt": [-1]}, 400),
    ("6 id outside the vocabulary", COMPLETIONS, {"prompt": [2048]}, 400),
    ("6 huge id", COMPLETIONS, {"prompt": [2**70]}, 400),
    ("6 mixed types", COMPLETIONS, {"prompt": ["a", 1]}, 400),
    ("6 mixed ids", COMPLETIONS, {"prompt": [1, "a"]}, 400),
    ("6 floats", COMPLETIONS, {"prompt": [1.5]}, 400),
    ("6 booleans", COMPLETIONS, {"prompt": [True]}, 400),
    ("7 max_tokens 0", COMPLETIONS, {"prompt": "x", "max_tokens": 0}, 400),
    ("7 max_tokens -1", COMPLETIONS, {"prompt": "x", "max_tokens": -1}, 400),
    ("7 max_tokens a word", COMPLETIONS, {"prompt": "x", "max_tokens": "x"}, 400),
    ("7 max_tokens 1e9", COMPLETIONS, {"prompt": "x", "max_tokens": 10**9}, 400),
    ("7 chat max_tokens 0", CHAT, _chat(max_tokens=0), 400),
    ("8 temperature -1", COMPLETIONS, P | {"temperature": -1}, 400),
    ("8 temperature 1e9", COMPLETIONS, P | {"temperature": 1e9}, 400),
    ("9 top_p 0", COMPLETIONS, P | {"top_p": 0}, 400),
    ("9 top_p 2", COMPLETIONS, P | {"top_p": 2}, 400),
    ("9 top_k -2", COMPLETIONS, P | {"top_k": -2}, 400),
    ("9 min_p 2", COMPLETIONS, P | {"min_p": 2}, 400),
    ("9 repetition_penalty 0", COMPLETIONS, P | {"repetition_penalty": 0}, 400),
    ("9 presence_penalty 3", COMPLETIONS, P | {"presence_penalty": 3}, 400),
    ("10 n 0", COMPLETIONS, P | {"n": 0}, 400),
    ("10 n 129", COMPLETIONS, P | {"n": 129}, 400),
    ("10 n 1e6", COMPLETIONS, P | {"n": 10**6}, 400),
    ("10 n huge times prompts", COMPLETIONS, {"prompt": ["x"] * 100, "n": 100}, 400),
    ("11 seed 2^80", COMPLETIONS, P | {"seed": 2**80}, 400),
    ("12 logit_bias key a word", COMPLETIONS, P | {"logit_bias": {"AI": 1}}, 400),
    ("12 logit_bias outside the vocabulary", COMPLETIONS, P | {"logit_bias": {"99999": 1}}, 400),
    ("12 logit_bias negative key", COMPLETIONS, P | {"logit_bias": {"-1": 1}}, 400),
    ("12 logit_bias too large", COMPLETIONS, P | {"logit_bias": {"1": 1000}}, 400),
    ("12 logit_bias 10k entries", COMPLETIONS, P | {"logit_bias": {str(i): 1 for i in range(10000)}}, 400),
    ("13 top_logprobs without logprobs", CHAT, _chat(top_logprobs=2), 400),
    ("13 top_logprobs 10000", CHAT, _chat(logprobs=True, top_logprobs=10000), 400),
    ("13 logprobs 10000", COMPLETIONS, P | {"logprobs": 10000}, 400),
    ("13 prompt_logprobs -1", COMPLETIONS, {"prompt": [5] * 400, "prompt_logprobs": -1}, 400),
    ("13 prompt_logprobs in a stream", COMPLETIONS, P | {"prompt_logprobs": 1, "stream": True}, 400),
    ("14 stop empty", COMPLETIONS, P | {"stop": ""}, 400),
    ("14 stop empty in a list", COMPLETIONS, P | {"stop": ["a", ""]}, 400),
    ("14 stop 1000 x 10 kB", COMPLETIONS, P | {"stop": ["x" * 10000] * 1000}, 400),
    ("15 schema not a schema", COMPLETIONS, P | _fmt({"type": "nonsense"}), 400),
    ("15 schema a list", COMPLETIONS, P | _fmt([1]), 400),
    ("15 schema missing", COMPLETIONS, P | {"response_format": {"type": "json_schema"}}, 400),
    ("15 schema 200 deep", COMPLETIONS, P | _fmt(_deep(200)), 400),
    ("15 unknown format", COMPLETIONS, P | {"response_format": {"type": "xml"}}, 400),
    ("15 regex foo**", COMPLETIONS, P | {"structured_outputs": {"regex": "foo**("}}, 400),
    ("15 regex too long", COMPLETIONS, P | {"structured_outputs": {"regex": "a" * 100000}}, 400),
    ("15 grammar broken", COMPLETIONS, P | {"structured_outputs": {"grammar": "start: ((("}}, 400),
    ("15 two constraints", COMPLETIONS, P | {"structured_outputs": {"regex": "a", "choice": ["b"]}}, 400),
    ("16 tool_choice without tools", CHAT, _chat(tool_choice="required"), 400),
    ("16 unknown tool", CHAT, _chat(tools=[TOOL], tool_choice={"type": "function", "function": {"name": "g"}}), 400),
    ("16 a tool whose arguments are no object", CHAT, _chat(tools=[LIST_TOOL]), 400),
    ("16 tools broken", CHAT, _chat(tools=[{"type": "function"}]), 400),
    (
        "16 bad JSON in a past tool call",
        CHAT,
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
        400,
    ),
    ("17 stream_options without stream", COMPLETIONS, P | {"stream_options": {"include_usage": True}}, 400),
    ("18 limit + 1", COMPLETIONS, {"prompt": [5] * 513, "max_tokens": 1}, 400),
    ("18 prompt + max_tokens over the limit", COMPLETIONS, {"prompt": [5] * 500, "max_tokens": 13}, 400),
    ("21 unknown template flag", CHAT, _chat(chat_template="{{ 1 }}"), 400),
    ("21 template kwargs", CHAT, _chat(chat_template_kwargs={"tokenize": True}), 400),
    ("23 image to a text model", CHAT, _image(_png(1, 1)), 400),
    ("23 not base64", CHAT, _image("data:image/png;base64,%%%%"), 400),
    ("23 30000 x 30000", CHAT, _image(_png(30000, 30000)), 400),
    ("23 0 x 0", CHAT, _image(_png(0, 0)), 400),
    ("23 1000 images", CHAT, {"messages": [_image(_png(1, 1))["messages"][0]] * 1000}, 400),
    ("24 loopback", CHAT, _image("http://127.0.0.1:1/x.png"), 400),
    ("24 metadata service", CHAT, _image("http://169.254.169.254/latest"), 400),
    ("24 decimal address", CHAT, _image("http://2130706433/"), 400),
    ("24 file", CHAT, _image("file:///etc/passwd"), 400),
    ("24 backslash", CHAT, _image("http:\\\\127.0.0.1\\x"), 400),
    ("24 bare path", CHAT, _image("/etc/passwd"), 400),
    ("24 url a number", CHAT, _image(7), 400),
    ("repetition_penalty tiny", COMPLETIONS, P | {"repetition_penalty": 5e-324}, 400),
    ("min_tokens with a grammar", COMPLETIONS, P | {"min_tokens": 1, "structured_outputs": {"choice": ["a"]}}, 400),
    ("min_tokens above max_tokens", COMPLETIONS, P | {"min_tokens": 3}, 400),
    ("suffix", COMPLETIONS, P | {"suffix": "y"}, 400),
    ("best_of", COMPLETIONS, P | {"best_of": 4}, 400),
    ("usage in every event of no stream", COMPLETIONS, P | {"stream_options": {"continuous_usage_stats": True}}, 400),
    ("guided_json", COMPLETIONS, P | {"guided_json": {"type": "integer"}}, 400),
    ("guided_regex", COMPLETIONS, P | {"guided_regex": "a+"}, 400),
    ("functions", CHAT, _chat(functions=[{"name": "f"}]), 400),
    ("user of 2,000 characters", COMPLETIONS, P | {"user": "u" * 2000}, 400),
    ("prompt_embeds", COMPLETIONS, P | {"prompt_embeds": "AAAA"}, 400),
    ("length_penalty", COMPLETIONS, P | {"length_penalty": 0.5}, 400),
    ("messages in a completion", COMPLETIONS, P | {"messages": [{"role": "user", "content": "x"}]}, 400),
    ("another side", COMPLETIONS, P | {"truncation_side": "middle"}, 400),
    ("top_logprobs -1 above the limit", CHAT, _chat(logprobs=True, top_logprobs=-1), 400),
    ("an invocation of nothing", "/invocations", {"input": "x"}, 400),
    ("audio", "/v1/audio/transcriptions", {}, 404),
    ("scores", "/v1/score", {"text_1": "a", "text_2": "b"}, 404),
    ("audio answers", CHAT, _chat(modalities=["text", "audio"], audio={"voice": "x", "format": "wav"}), 400),
    ("a template for tokens", "/tokenize", {"messages": [{"role": "user", "content": "x"}], "chat_template": "x"}, 400),
    ("a priority that no scheduler looks at", COMPLETIONS, P | {"priority": 3}, 400),
    ("another server's constraint", CHAT, _chat(regex="a+"), 400),
    ("a known name spelled otherwise", COMPLETIONS, P | {"topP": 0.5}, 400),
    ("a schema in text", CHAT, _chat(response_format={"type": "text", "json_schema": {"schema": {}}}), 400),
    ("two lengths", CHAT, _chat(max_completion_tokens=3), 400),
    ("tokenize a prompt with tools", "/tokenize", {"prompt": "x", "tools": [TOOL]}, 400),
    ("tokenize a prompt cut to a word", "/tokenize", {"prompt": "x", "truncate_prompt_tokens": "x"}, 400),
    ("bad_words without one", COMPLETIONS, P | {"bad_words": [" "]}, 400),
    ("bad_words with a schema", COMPLETIONS, P | {"bad_words": ["x"], "structured_outputs": {"regex": "a"}}, 400),
    ("allowed_token_ids outside", COMPLETIONS, P | {"allowed_token_ids": [99999]}, 400),
    ("stop token outside the vocabulary", COMPLETIONS, P | {"stop_token_ids": [4096]}, 400),
    ("tokenize nothing", "/tokenize", {}, 400),
    ("detokenize outside", "/detokenize", {"tokens": [99999]}, 400),
    ("no such path", "/v1/embeddings", {"input": "x"}, 404),
]


def assert_error(response: httpx.Response, status: int) -> dict:
    assert response.status_code == status, response.text[:500]
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and len(error["message"]) <= 1000
    assert "Traceback" not in error["message"]
    return error


@pytest.mark.parametrize(("path", "body", "status"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_case(server, path, body, status):
    assert_error(server.post(path, body), status)


def test_what_changes_nothing_is_accepted(server):
    same = {"length_penalty": 1.0, "early_stopping": False, "truncation_side": "left", "prompt_embeds": None}
    assert server.post(COMPLETIONS, P | same | {"never_heard_of": [1]}).status_code == 200
    chat = {"modalities": ["text"], "store": False, "metadata": {}, "echo": False, "logprobs": False, "top_logprobs": 0}
    answer = server.post(CHAT, _chat(**chat))
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["logprobs"] is None
    assert server.post(COMPLETIONS, P | {"logprobs": False}).json()["choices"][0]["logprobs"] is None
    whole = server.post("/tokenize", {"prompt": "The function"}).json()["tokens"]
    cut = server.post("/tokenize", {"prompt": "The function", "truncate_prompt_tokens": 1}).json()["tokens"]
    assert cut == whole[-1:]


def test_what_is_wrong_is_named_in_full(server):
    def said(**body):
        return server.post(COMPLETIONS, body).json()["error"]["message"]

    assert "99999, which is out of vocabulary" in said(prompt=[99999])
    keys = said(prompt="x", logit_bias={"bad1": 1, "5": 1, "bad2": 1})
    assert "'bad1', 'bad2' is not a token id" in keys


def test_and_then_a_normal_request_is_served(server):
    server.assert_alive()


RAW = [
    ("1 empty body", b"", 400),
    ("1 broken", b'{"prompt": "x"', 400),
    ("1 array", b"[]", 400),
    ("1 string", b'"x"', 400),
    ("1 null", b"null", 400),
    ("1 not UTF-8", b'{"prompt": "\xff"}', 400),
    ("3 100k deep", b'{"prompt": "x", "a": ' + b"[" * 100000 + b"]" * 100000 + b"}", 400),
    ("3 300 deep in a known field", b'{"prompt": ' + b"[" * 300 + b"]" * 300 + b"}", 400),
    ("8 NaN", b'{"prompt": "x", "temperature": NaN}', 400),
    ("8 Infinity", b'{"prompt": "x", "temperature": Infinity}', 400),
    ("8 1e999", b'{"prompt": "x", "temperature": 1e999}', 400),
    ("21 lone surrogate", b'{"prompt": "\\ud800"}', 400),
]


@pytest.mark.parametrize(("data", "status"), [case[1:] for case in RAW], ids=[case[0] for case in RAW])
def test_raw_body(server, data, status):
    headers = {"content-type": "application/json"}
    assert_error(server.client.post(COMPLETIONS, content=data, headers=headers), status)
    assert_error(server.client.post(CHAT, content=data, headers=headers), 400)


def test_2_wrong_content_type(server):
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        assert_error(server.client.post(COMPLETIONS, content=b"prompt=x", headers={"content-type": kind}), 415)


def test_18_the_limit_itself_is_served(server):
    assert server.complete([5] * 508, max_tokens=4).status_code == 200
    error = assert_error(server.complete([5] * 512, max_tokens=4), 400)
    assert error["code"] == "context_length_exceeded"
    assert "This model's maximum context length is 512 tokens" in error["message"]


def test_15_an_exploding_regex_holds_nobody_up(server):
    front, before = server.front(), sum(server.front().cpu_times()[:2])
    specs = [{"regex": "(a+)+" * 30 + "b"}, {"regex": "((a{1,300}){1,300}){1,300}"}, {"regex": "(.*a){25}"}]
    for spec in specs:
        response = server.complete(structured_outputs=spec, max_tokens=3)
        assert response.status_code in (200, 400), response.text
    assert sum(front.cpu_times()[:2]) - before < 5
    server.assert_alive()


def test_21_odd_text_is_only_text(server):
    for text in ("\x00", "\u202e\u2066x", "<|im_end|><|endoftext|>", "\ufffd\ufeff", "a\u0300" * 100):
        assert server.complete(text).status_code == 200
        assert server.post(CHAT, _chat() | {"messages": [{"role": "user", "content": text}]}).status_code == 200


@pytest.mark.parametrize(
    "path",
    ("/v1/models", "/v1/completions", "/tokenize", "/nope", "/dashboard/events", "/%2Fmetrics", "/metrics/", "/docs/x"),
)
def test_25_every_path_but_the_open_ones_asks_for_the_key(server, path):
    for key in (None, "wrong", "TEST-KEY", "test-key-", "test-ke", "k\xe9y"):
        headers = {} if key is None else {"Authorization": f"Bearer {key}".encode("latin-1")}
        with httpx.Client(base_url=server.url) as client:
            error = assert_error(client.get(path, headers=headers), 401)
            assert key is None or not key.strip() or key not in error["message"]
    with httpx.Client(base_url=server.url) as client:
        for other in (
            "/health",
            "/ready",
            "/ping",
            "/metrics",
            "/version",
            "/docs",
            "/openapi.json",
            "/",
            "/dashboard",
        ):
            for method in ("GET", *(() if other == "/openapi.json" else ("HEAD",))):
                assert client.request(method, other).status_code == 200, (method, other)
        assert client.get("/v1/models", headers={"Authorization": "Bearer second-key"}).status_code == 200
    assert "test-key" not in server.log


def _raw(server, data: bytes, seconds: float = 5.0) -> bytes:
    with socket.create_connection(("127.0.0.1", server.port), timeout=seconds) as sock:
        sock.sendall(data)
        with contextlib.suppress(OSError):  # the server may have hung up by now
            sock.shutdown(socket.SHUT_WR)
        answer = b""
        try:
            while chunk := sock.recv(65536):
                answer += chunk
        except (TimeoutError, ConnectionError):
            pass
        return answer


def test_26_malformed_http_is_refused(server):
    key = b"Authorization: Bearer test-key\r\n"
    many = b"".join(b"X-%d: y\r\n" % i for i in range(10000))
    requests = [
        b"GET /v1/models HTTP/1.1\r\nHost: x\r\n" + key + many + b"\r\n",
        b"GET /v1/models HTTP/1.1\r\nHost: x\r\n" + key + b"X: " + b"y" * (1 << 20) + b"\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n" + key + b"Content-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n" + key + b"Content-Length: abc\r\n\r\n{}",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n" + key + b"Transfer-Encoding: chunked\r\n\r\nzzz\r\n",
        b"\x16\x03\x01\x02\x00garbage\r\n\r\n",
    ]
    for request in requests:
        status = _raw(server, request).split(b"\r\n")[0]
        assert status == b"" or b" 4" in status, status
    server.assert_alive()


def test_27_request_ids_are_sanitised(server):
    def echoed(value: str) -> str:
        return server.client.get("/v1/models", headers={"X-Request-Id": value}).headers["x-request-id"]

    assert echoed("abc-1.2:3_4") == "abc-1.2:3_4"
    for bad in ("x" * 4096, "a b", 'a"b', "a;b", "<script>"):
        assert echoed(bad) != bad
    raw = _raw(server, b"GET /health HTTP/1.1\r\nHost: x\r\nX-Request-Id: a\r\n evil: b\r\nConnection: close\r\n\r\n")
    assert b"evil" not in raw


def test_28_other_methods(server):
    for method in ("GET", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH"):
        response = server.client.request(method, COMPLETIONS)
        assert response.status_code == 405
        assert "POST" in response.headers["allow"]
        assert "access-control-allow-origin" not in response.headers
        if method != "HEAD":
            assert json.loads(response.content)["error"]["message"]


def test_35_the_same_request_id_twice_at_once(server):
    import concurrent.futures

    def one(_):
        body = {"prompt": "The", "max_tokens": 20, "temperature": 0}
        return server.post(COMPLETIONS, body, headers={"X-Request-Id": "same"}).json()["choices"][0]["text"]

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(one, range(4)))) == 1
