"""litellm, unmodified, against a running server. Runs in an environment of its own: see `make test-clients`.

    KVARENA_URL=http://127.0.0.1:8000 KVARENA_KEY=KEY python -m pytest --noconftest tests/clients/check_litellm.py

The server serves models/demo as `demo` with a context of 512 tokens.
"""

from __future__ import annotations

import asyncio
import json
import os

import litellm
import pytest

URL, KEY = os.environ["KVARENA_URL"], os.environ["KVARENA_KEY"]
HELLO = [{"role": "user", "content": "Hello!"}]
LONG = [{"role": "user", "content": "word " * 600}]
TOOL = {
    "type": "function",
    "function": {
        "name": "age_of",
        "parameters": {
            "type": "object",
            "properties": {"known": {"type": "boolean"}},
            "required": ["known"],
            "additionalProperties": False,
        },
    },
}


def _args(**more):
    values = {"model": "openai/demo", "api_base": f"{URL}/v1", "api_key": KEY, "max_retries": 0, "temperature": 0}
    return values | {"messages": HELLO} | more


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setattr(litellm, "suppress_debug_info", True)


def test_chat_and_the_stream_rebuilt():
    whole = litellm.completion(**_args())
    assert whole.choices[0].finish_reason == "stop"
    assert whole.usage.completion_tokens > 0
    chunks = list(litellm.completion(**_args(), stream=True, stream_options={"include_usage": True}))
    rebuilt = litellm.stream_chunk_builder(chunks, messages=HELLO)
    assert rebuilt.choices[0].message.content == whole.choices[0].message.content
    assert rebuilt.choices[0].finish_reason == "stop"
    assert rebuilt.usage.completion_tokens == whole.usage.completion_tokens


def test_a_cut_answer_says_so():
    assert litellm.completion(**_args(max_tokens=2)).choices[0].finish_reason == "length"
    chunks = list(litellm.completion(**_args(max_tokens=2), stream=True))
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "length"


def test_the_async_client():
    async def run():
        whole = await litellm.acompletion(**_args())
        chunks = [chunk async for chunk in await litellm.acompletion(**_args(), stream=True)]
        return whole, "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    whole, streamed = asyncio.run(run())
    assert whole.choices[0].message.content == streamed


def test_text_completion():
    made = litellm.text_completion(
        model="text-completion-openai/demo", api_base=f"{URL}/v1", api_key=KEY, prompt="The function", max_tokens=5,
        temperature=0, n=1,
    )  # fmt: skip
    assert made.usage.completion_tokens == 5
    assert made.choices[0].text


def test_tools_and_json_schema():
    called = litellm.completion(**_args(max_tokens=200, tools=[TOOL], tool_choice="required"))
    call = called.choices[0].message.tool_calls[0]
    assert call.function.name == "age_of"
    assert set(json.loads(call.function.arguments)) == {"known"}
    chunks = list(litellm.completion(**_args(max_tokens=200, tools=[TOOL], tool_choice="required"), stream=True))
    rebuilt = litellm.stream_chunk_builder(chunks, messages=HELLO).choices[0].message.tool_calls[0]
    assert (rebuilt.function.name, rebuilt.function.arguments) == (call.function.name, call.function.arguments)
    schema = {"type": "object", "properties": {"age": {"type": "integer", "maximum": 9}}, "required": ["age"]}
    fmt = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema, "strict": True}}
    answer = litellm.completion(**_args(max_tokens=200, response_format=fmt))
    assert json.loads(answer.choices[0].message.content)["age"] <= 9


@pytest.mark.parametrize(
    ("change", "kind"),
    (
        ({"messages": LONG}, litellm.ContextWindowExceededError),
        ({"temperature": -1}, litellm.BadRequestError),
        ({"model": "openai/nope"}, litellm.NotFoundError),
        ({"api_key": "wrong"}, litellm.AuthenticationError),
    ),
)
def test_errors_are_of_the_right_class(change, kind):
    for stream in (False, True):
        with pytest.raises(kind):
            list(litellm.completion(**_args() | change, stream=stream))
