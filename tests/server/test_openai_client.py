"""The `openai` client, unmodified: parameters, streams, error classes, retries."""

from __future__ import annotations

import asyncio
import json

import pytest

openai = pytest.importorskip("openai")


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="test-key", max_retries=0)


def test_models(client, server):
    models = client.models.list().data
    assert [model.id for model in models] == ["demo"]
    assert models[0].max_model_len == 512
    assert client.models.retrieve("demo").id == "demo"


def test_completion_and_its_stream_give_the_same_text(client):
    request = {"model": "demo", "prompt": "The function", "max_tokens": 20, "temperature": 0}
    whole = client.completions.create(**request)
    assert whole.usage.completion_tokens == 20
    assert whole.choices[0].finish_reason == "length"
    chunks = list(client.completions.create(**request, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 20
    assert len({chunk.id for chunk in chunks}) == 1
    finishes = [c.choices[0].finish_reason for c in chunks if c.choices]
    assert finishes[-1] == "length"
    assert finishes[:-1] == [None] * (len(finishes) - 1)


def test_chat_stream(client):
    messages = [{"role": "user", "content": "Hello!"}]
    whole = client.chat.completions.create(model="demo", messages=messages, temperature=0)
    assert whole.choices[0].finish_reason == "stop"
    chunks = list(client.chat.completions.create(model="demo", messages=messages, temperature=0, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_content_parts_and_continued_messages(client):
    parts = [{"type": "text", "text": "Hello!"}]
    one = client.chat.completions.create(model="demo", messages=[{"role": "user", "content": parts}], temperature=0)
    two = client.chat.completions.create(model="demo", messages=[{"role": "user", "content": "Hello!"}], temperature=0)
    assert one.choices[0].message.content == two.choices[0].message.content
    going_on = client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hello! How"}],
        temperature=0,
        max_tokens=3,
        extra_body={"continue_final_message": True, "add_generation_prompt": False},
    )
    assert two.choices[0].message.content.startswith("Hello! How" + going_on.choices[0].message.content)


def test_n_choices_are_seeded(client):
    request = {"model": "demo", "prompt": "A list of", "max_tokens": 12, "temperature": 1.2, "seed": 7, "n": 4}
    request["extra_body"] = {"ignore_eos": True}
    one, two = client.completions.create(**request), client.completions.create(**request)
    texts = [choice.text for choice in one.choices]
    assert texts == [choice.text for choice in two.choices]
    assert len(set(texts)) > 1
    assert [choice.index for choice in one.choices] == [0, 1, 2, 3]
    assert one.usage.completion_tokens == 48
    streamed = ["", "", "", ""]
    for chunk in client.completions.create(**request, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == texts


def test_prompts_as_strings_lists_and_ids(client, server):
    ids = server.post("/tokenize", {"prompt": "The function"}).json()["tokens"]
    request = {"model": "demo", "max_tokens": 6, "temperature": 0}
    text = client.completions.create(prompt="The function", **request).choices[0].text
    assert client.completions.create(prompt=ids, **request).choices[0].text == text
    many = client.completions.create(prompt=["The function", "A list"], **request)
    assert [choice.index for choice in many.choices] == [0, 1]
    assert many.choices[0].text == text
    assert client.completions.create(prompt=[ids, ids], **request).choices[1].text == text


def test_stop_strings_end_the_text_and_are_not_shown(client):
    request = {"model": "demo", "prompt": "The function", "max_tokens": 30, "temperature": 0}
    free = client.completions.create(**request).choices[0].text
    stop = free[8:13]
    end = free.index(stop)
    stopped = client.completions.create(**request, stop=[stop, "never seen"])
    assert stopped.choices[0].text == free[:end]
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.choices[0].stop_reason == stop
    chunks = client.completions.create(**request, stop=stop, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == free[:end]
    kept = client.completions.create(**request, stop=stop, extra_body={"include_stop_str_in_output": True})
    assert kept.choices[0].text == free[: end + len(stop)]


def test_stop_tokens_min_tokens_and_ignore_eos(client):
    request = {"model": "demo", "messages": [{"role": "user", "content": "Hello!"}], "temperature": 0, "max_tokens": 20}
    free = client.chat.completions.create(**request, extra_body={"return_token_ids": True})
    assert free.choices[0].finish_reason == "stop"
    ids = free.choices[0].token_ids
    stopped = client.chat.completions.create(**request, extra_body={"stop_token_ids": [ids[3]]})
    assert stopped.choices[0].stop_reason == ids[3]
    assert stopped.usage.completion_tokens == ids.index(ids[3]) + 1
    longer = client.chat.completions.create(**request, extra_body={"ignore_eos": True})
    assert longer.usage.completion_tokens == 20
    at_least = client.chat.completions.create(**request, extra_body={"min_tokens": len(ids) + 3})
    assert at_least.usage.completion_tokens >= len(ids) + 3


def test_logprobs_of_both_kinds(client):
    old = client.completions.create(model="demo", prompt="The", max_tokens=5, temperature=0, logprobs=3)
    lists = old.choices[0].logprobs
    assert "".join(lists.tokens) == old.choices[0].text
    assert all(len(top) in (3, 4) for top in lists.top_logprobs)
    assert lists.text_offset[0] == 0
    for token, logprob, top in zip(lists.tokens, lists.token_logprobs, lists.top_logprobs, strict=True):
        assert top[token] == logprob == max(top.values()) <= 0
    chat = client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": "Hello!"}],
        temperature=0,
        max_tokens=4,
        logprobs=True,
        top_logprobs=2,
    )
    content = chat.choices[0].logprobs.content
    assert len(content) == 4
    for entry in content:
        assert entry.token == entry.top_logprobs[0].token
        assert bytes(entry.bytes).decode() == entry.token


def test_echo_scores_the_prompt(client):
    text = "The function returns"
    scored = client.completions.create(model="demo", prompt=text, max_tokens=0, echo=True, logprobs=1)
    lists = scored.choices[0].logprobs
    assert scored.choices[0].text == "".join(lists.tokens) == text
    assert lists.token_logprobs[0] is None
    assert all(value <= 0 for value in lists.token_logprobs[1:])
    assert scored.usage.completion_tokens == 0
    with_output = client.completions.create(
        model="demo", prompt=text, max_tokens=2, echo=True, logprobs=1, temperature=0
    )
    longer = with_output.choices[0].logprobs
    assert longer.token_logprobs[: len(lists.tokens)] == pytest.approx(lists.token_logprobs, abs=1e-4, nan_ok=True)
    assert len(longer.tokens) == len(lists.tokens) + 2
    only = client.completions.create(model="demo", prompt=text, max_tokens=0, echo=True)
    assert only.choices[0].text == text


def test_prompt_logprobs(client):
    answer = client.completions.create(
        model="demo",
        prompt="The function returns",
        max_tokens=1,
        extra_body={"prompt_logprobs": 2, "return_token_ids": True},
    )
    choice = answer.choices[0]
    assert choice.prompt_logprobs[0] is None
    for token, row in zip(choice.prompt_token_ids[1:], choice.prompt_logprobs[1:], strict=True):
        assert row[str(token)]["logprob"] <= 0
        assert len(row) in (2, 3)


def test_logit_bias_and_penalties(client, server):
    token = server.post("/tokenize", {"prompt": "x", "add_special_tokens": False}).json()["tokens"][0]
    forced = client.completions.create(
        model="demo", prompt="The", max_tokens=3, temperature=0, logit_bias={str(token): 100}
    )
    assert forced.choices[0].text == "xxx"
    varied = client.completions.create(
        model="demo", prompt="The", max_tokens=30, temperature=0, presence_penalty=2, frequency_penalty=2,
        extra_body={"repetition_penalty": 1.5, "top_k": 40, "min_p": 0.01, "return_token_ids": True},
    )  # fmt: skip
    ids = varied.choices[0].token_ids
    assert max(ids.count(i) for i in ids) <= 3


@pytest.mark.parametrize("api", ("chat", "completions"))
def test_json_schema(client, api):
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "maximum": 99}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    fmt = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema, "strict": True}}
    if api == "chat":
        answer = client.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": "Who?"}], response_format=fmt, max_tokens=200, seed=1
        )
        text, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
    else:
        answer = client.completions.create(
            model="demo", prompt="Who?", max_tokens=200, seed=1, extra_body={"response_format": fmt}
        )
        text, reason = answer.choices[0].text, answer.choices[0].finish_reason
    value = json.loads(text)
    assert set(value) == {"name", "age"}
    assert isinstance(value["age"], int)
    assert reason == "stop"


@pytest.mark.parametrize(
    ("spec", "pattern"),
    (
        ({"choice": ["yes", "no", "maybe"]}, r"yes|no|maybe"),
        ({"regex": r"[0-9]{3}-[a-f]{2}"}, r"[0-9]{3}-[a-f]{2}"),
        ({"grammar": 'start: "a" "b"+'}, r"ab+"),
        ({"grammar": 'root ::= "x" [0-9] [0-9]'}, r"x[0-9][0-9]"),
    ),
)
def test_structured_outputs(client, spec, pattern):
    import re

    answer = client.completions.create(
        model="demo", prompt="Answer:", max_tokens=40, temperature=0.7, seed=3, extra_body={"structured_outputs": spec}
    )
    text = answer.choices[0].text
    if answer.choices[0].finish_reason == "stop":
        assert re.fullmatch(pattern, text)
    else:
        assert re.match(pattern, text)


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a city",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "enum": ["Paris", "Oslo"]}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
]


@pytest.mark.parametrize("choice", ("required", {"type": "function", "function": {"name": "weather"}}))
def test_forced_tool_calls(client, choice):
    request = {
        "model": "demo",
        "messages": [{"role": "user", "content": "Weather in Paris?"}],
        "tools": TOOLS,
        "tool_choice": choice,
        "parallel_tool_calls": False,
        "max_tokens": 120,
        "seed": 5,
    }
    answer = client.chat.completions.create(**request)
    call = answer.choices[0].message.tool_calls[0]
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Oslo")
    assert answer.choices[0].finish_reason == ("tool_calls" if choice == "required" else "stop")
    name, arguments = "", ""
    for chunk in client.chat.completions.create(**request, stream=True):
        for part in chunk.choices[0].delta.tool_calls or ():
            name += part.function.name or ""
            arguments += part.function.arguments or ""
    assert name == "weather"
    assert arguments == call.function.arguments


def test_tools_with_auto_answer_in_text(client):
    answer = client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": "Hello!"}], tools=TOOLS, tool_choice="auto", max_tokens=8
    )
    assert answer.choices[0].message.content


def test_errors_have_the_right_classes(client, server):
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model="demo", prompt="x", temperature=-1)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="nope", prompt="x")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0).models.list()
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="demo", prompt=[5] * 513)
    assert long.value.code == "context_length_exceeded"
    assert "maximum context length is 512 tokens" in str(long.value)


def test_a_bad_request_is_not_retried(server):
    before = server.metrics().get("http_requests_total{/v1/completions,POST,4xx}", 0)
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="test-key", max_retries=2)
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="demo", prompt="x", top_p=2)
    assert server.metrics()["http_requests_total{/v1/completions,POST,4xx}"] == before + 1


def test_request_ids_and_cached_tokens(client):
    raw = client.completions.with_raw_response.create(
        model="demo", prompt=[7] * 100, max_tokens=2, extra_headers={"X-Request-Id": "mine-1"}
    )
    assert raw.headers["x-request-id"] == "mine-1"
    again = client.completions.create(model="demo", prompt=[7] * 100, max_tokens=2)
    assert again._request_id
    assert again.usage.prompt_tokens_details.cached_tokens == 96
    salted = client.completions.create(model="demo", prompt=[7] * 100, max_tokens=2, extra_body={"cache_salt": "other"})
    assert salted.usage.prompt_tokens_details.cached_tokens == 0


def test_async_client_with_many_streams(server):
    async def run():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="test-key", max_retries=0) as client:

            async def one(i):
                text = ""
                stream = await client.completions.create(
                    model="demo", prompt=f"Item {i} is", max_tokens=16, temperature=0, stream=True
                )
                async for chunk in stream:
                    text += chunk.choices[0].text
                return text

            return await asyncio.gather(*(one(i) for i in range(32)))

    texts = asyncio.run(run())
    alone = [server.complete(f"Item {i} is", max_tokens=16).json()["choices"][0]["text"] for i in (0, 9, 31)]
    assert [texts[0], texts[9], texts[31]] == alone


def test_labels_and_unknown_keys_are_accepted(client):
    answer = client.completions.create(
        model="demo", prompt="x", max_tokens=1, user="alice", extra_body={"priority": 0, "store": True, "metadata": {}}
    )
    assert answer.choices[0].finish_reason == "length"


def test_tokens_come_back_as_ids(client, server):
    answer = client.completions.create(
        model="demo", prompt="The function", max_tokens=6, temperature=0, extra_body={"return_token_ids": True}
    )
    choice = answer.choices[0]
    assert len(choice.token_ids) == 6
    assert server.post("/detokenize", {"tokens": choice.token_ids}).json()["prompt"] == choice.text
    assert choice.prompt_token_ids == server.post("/tokenize", {"prompt": "The function"}).json()["tokens"]
