"""litellm, langchain-openai and schemathesis, unmodified. Each is skipped where it is not installed."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

LONG = [{"role": "user", "content": "word " * 600}]
HELLO = [{"role": "user", "content": "Hello!"}]


@pytest.fixture
def litellm(server, monkeypatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    module = pytest.importorskip("litellm")
    module.suppress_debug_info = True
    return module


def _litellm_args(server, **more):
    return {"model": "openai/demo", "api_base": f"{server.url}/v1", "api_key": "test-key", "max_retries": 0} | more


def test_litellm_chat_and_stream(litellm, server):
    args = _litellm_args(server, messages=HELLO, temperature=0)
    whole = litellm.completion(**args)
    assert whole.choices[0].finish_reason == "stop"
    chunks = list(litellm.completion(**args, stream=True, stream_options={"include_usage": True}))
    rebuilt = litellm.stream_chunk_builder(chunks, messages=HELLO)
    assert rebuilt.choices[0].message.content == whole.choices[0].message.content
    assert rebuilt.choices[0].finish_reason == "stop"


def test_litellm_maps_errors(litellm, server):
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(**_litellm_args(server, messages=LONG))
    with pytest.raises(litellm.BadRequestError):
        litellm.completion(**_litellm_args(server, messages=HELLO, temperature=-1))
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(**_litellm_args(server, messages=HELLO) | {"model": "openai/nope"})
    with pytest.raises(litellm.AuthenticationError):
        litellm.completion(**_litellm_args(server, messages=HELLO) | {"api_key": "wrong"})


@pytest.fixture
def langchain(server):
    module = pytest.importorskip("langchain_openai")

    def make(**more):
        values = {"base_url": f"{server.url}/v1", "api_key": "test-key", "model": "demo", "temperature": 0}
        return module.ChatOpenAI(**values | {"max_retries": 0} | more)

    return make


def test_langchain_chat_stream_and_usage(langchain):
    chat = langchain()
    whole = chat.invoke("Hello!")
    assert whole.response_metadata["finish_reason"] == "stop"
    assert whole.usage_metadata["output_tokens"] > 0
    assert "".join(chunk.content for chunk in chat.stream("Hello!")) == whole.content
    limited = langchain(max_tokens=2).invoke("Hello!")
    assert limited.response_metadata["finish_reason"] == "length"


def test_langchain_structured_output_and_tools(langchain):
    from pydantic import BaseModel, Field

    class Person(BaseModel):
        """A person."""

        age: int = Field(ge=0, le=99)
        known: bool

    person = langchain(max_tokens=100).with_structured_output(Person, method="json_schema").invoke("Who?")
    assert 0 <= person.age <= 99
    called = langchain(max_tokens=100).bind_tools([Person], tool_choice="Person").invoke("Who?")
    assert called.tool_calls[0]["name"] == "Person"
    assert set(called.tool_calls[0]["args"]) == {"age", "known"}


def test_langchain_recognises_an_overflow(langchain):
    from langchain_core.exceptions import ContextOverflowError

    with pytest.raises(ContextOverflowError):
        langchain().invoke("word " * 600)


@pytest.mark.parametrize(
    ("phases", "examples"), (("fuzzing", 12), pytest.param("examples,coverage,fuzzing", 100, marks=pytest.mark.slow))
)
def test_schemathesis_finds_no_500_and_no_undocumented_answer(server, phases, examples):
    pytest.importorskip("schemathesis")
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    command = [
        sys.executable, "-c", "from schemathesis.cli import schemathesis as st; st()", "run",
        f"{server.url}/openapi.json", "-H", "Authorization: Bearer test-key", "--checks", checks,
        "--phases", phases, "--max-examples", str(examples), "--seed", "7",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    server.assert_alive()


def test_the_openapi_document_is_whole(server):
    document = server.client.get("/openapi.json").json()
    text = json.dumps(document)
    for reference in {part.split('"')[0] for part in text.split('"$ref": "#/components/schemas/')[1:]}:
        assert reference in document["components"]["schemas"]
    for path in ("/v1/completions", "/v1/chat/completions"):
        assert {"200", "400", "401", "404", "413", "503"} <= set(document["paths"][path]["post"]["responses"])
