"""Bodies as large as the server takes, or larger: they are refused or served, and nobody waits for them.

What takes a second of the event loop delays every open stream and `/health` by as much: the loop goes through a body
a few times, whatever is in it.
"""

from __future__ import annotations

import gc
import time

import orjson
import pytest
from server_footprint import loop_is_not_held_up
from test_bad_requests import CHAT, COMPLETIONS, assert_error

JSON = {"content-type": "application/json"}
HELLO = b'"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2'


def _many(item: bytes, size: int = 6 << 20) -> bytes:
    """A JSON list of as many items as `size` bytes hold."""
    return b"[" + b",".join([item] * (size // (len(item) + 1))) + b"]"


def _parsing(data: bytes) -> float:
    """Processor seconds that it takes to parse a body and to forget it, which the front's loop cannot do without."""
    gc.disable()
    try:
        before = time.process_time()
        orjson.loads(data)
        return time.process_time() - before
    finally:
        gc.enable()


def test_19_large_bodies_do_not_stop_health(server):
    text = "word " * 1_000_000
    with loop_is_not_held_up(server):
        assert_error(server.complete(text), 400)
        # Half a MB that is tokenized in full.
        assert server.post("/tokenize", {"prompt": text[:500_000]}).json()["count"] > 50_000
        assert_error(server.client.post(COMPLETIONS, content=b"x" * (50 << 20), headers=JSON), 413)


@pytest.mark.parametrize(
    ("path", "body"),
    (
        (CHAT, lambda: b'{"messages": ' + _many(b"1") + b"}"),
        (CHAT, lambda: b'{"messages": ' + _many(b'{"role": "user", "content": "a"}') + b"}"),
        (CHAT, lambda: b'{"messages": [{"role": "user", "content": ' + _many(b'"a"') + b"}]}"),
        (CHAT, lambda: b"{" + HELLO + b', "tools": ' + _many(b'{"function": {"name": "f"}}') + b"}"),
        (CHAT, lambda: b"{" + HELLO + b', "tools": [{"function": {"name": "f", "x": ' + _many(b"[1]") + b"}}]}"),
        (COMPLETIONS, lambda: b'{"prompt": ' + _many(b"[5]") + b"}"),
        (COMPLETIONS, lambda: b'{"prompt": "x", "stop": ' + _many(b"1") + b"}"),
        (COMPLETIONS, lambda: b'{"prompt": "x", "logit_bias": {' + _many(b'"1": "a"')[1:-1] + b"}}"),
        (COMPLETIONS, lambda: b'{"prompt": ' + _many(b'"' + b"word " * 1600 + b'"', 8 << 20) + b"}"),
        ("/detokenize", lambda: b'{"tokens": ' + _many(b"5") + b"}"),
        ("/tokenize", lambda: b'{"prompt": "' + b"a " * (7 << 20) + b'"}'),
    ),
    ids=("messages wrong", "messages", "parts", "tools", "a large tool", "prompts", "stop", "logit_bias",
         "long prompts", "tokens", "text"),
)  # fmt: skip
def test_19_millions_of_values_are_refused_at_once(server, path, body):
    data = body()
    with loop_is_not_held_up(server, 4 * _parsing(data) + 0.3):
        assert_error(server.client.post(path, content=data, headers=JSON), 400)
    server.assert_alive()


def test_19_a_long_text_is_tokenized_beside_the_streams(server):
    """4 million characters: seconds of work, in which health goes on."""
    with loop_is_not_held_up(server):
        assert server.post("/tokenize", {"prompt": "word " * 800_000}).json()["count"] == 800_001
        assert server.post("/detokenize", {"tokens": [30] * 1_000_000}).status_code == 200


def test_truncation_takes_the_end_of_a_text_beyond_the_context(server):
    ids = server.post("/tokenize", {"prompt": "word " * 20_000 + "The function"}).json()["tokens"]
    body = {"prompt": "word " * 20_000 + "The function", "truncate_prompt_tokens": 7, "return_token_ids": True}
    answer = server.post(COMPLETIONS, body | {"max_tokens": 2, "temperature": 0}).json()
    assert answer["choices"][0]["prompt_token_ids"] == ids[-7:]
    chat = {"messages": [{"role": "user", "content": "word " * 600}], "truncate_prompt_tokens": -1}
    answer = server.post(CHAT, chat | {"max_completion_tokens": 20, "ignore_eos": True}).json()
    assert answer["usage"]["prompt_tokens"] == 512 - 20
    assert answer["usage"]["completion_tokens"] == 20
