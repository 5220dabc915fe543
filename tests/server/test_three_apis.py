"""The Responses and the Messages API, by their own clients, unmodified: one text, the same tokens, each in its form."""

from __future__ import annotations

import json

import pytest

openai = pytest.importorskip("openai")
anthropic = pytest.importorskip("anthropic")

from openai.types.responses import ResponseStreamEvent  # noqa: E402
from pydantic import TypeAdapter  # noqa: E402
from waiting import wait_for  # noqa: E402

HELLO = [{"role": "user", "content": "Hello!"}]
TOOL = {"type": "object", "properties": {"x": {"enum": [1, 2]}}, "required": ["x"], "additionalProperties": False}
FUNCTION = {"type": "function", "name": "f", "description": "d", "parameters": TOOL}
GREEDY = {"extra_body": {"temperature": 0}}  # which the newest anthropic client does not know
EVENT = TypeAdapter(ResponseStreamEvent)


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="test-key", max_retries=0)


@pytest.fixture(scope="module")
def claude(server):
    return anthropic.Anthropic(base_url=server.url, api_key="test-key", max_retries=0)


def chat(client, **more):
    return client.chat.completions.create(**{"model": "demo", "messages": HELLO, "temperature": 0} | more)


def checked(events):
    """The events of a stream, each held to the client's types and numbered without a gap."""
    made = list(events)
    for event in made:
        EVENT.validate_python(event.model_dump(warnings="error"), strict=False)
    assert [event.sequence_number for event in made] == list(range(len(made)))
    return made


@pytest.mark.parametrize("more", ({}, {"temperature": 1.0, "seed": 5}), ids=("greedy", "seeded"))
def test_three_apis_give_one_text_and_one_usage(client, claude, more):
    rest = {"extra_body": {"temperature": 0} | more}
    one = chat(client, max_tokens=12, **rest)
    two = client.responses.create(model="demo", input="Hello!", max_output_tokens=12, **rest)
    three = claude.messages.create(model="demo", messages=HELLO, max_tokens=12, **rest)
    text, usage = one.choices[0].message.content, one.usage
    assert text == two.output_text == "".join(block.text for block in three.content)
    assert usage.completion_tokens == two.usage.output_tokens == three.usage.output_tokens
    read, made = three.usage.cache_read_input_tokens, three.usage.cache_creation_input_tokens
    assert usage.prompt_tokens == two.usage.input_tokens == three.usage.input_tokens + read + made
    ends = {"stop": ("completed", "end_turn"), "length": ("incomplete", "max_tokens")}
    assert (two.status, three.stop_reason) == ends[one.choices[0].finish_reason]


def test_a_stream_of_a_response_has_every_event_in_order(client):
    request = {"model": "demo", "input": "Hello!", "temperature": 0}
    whole = client.responses.create(**request)
    events = checked(client.responses.create(**request, stream=True))
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "completed"]
    assert set(kinds[4:-4]) == {"output_text.delta"}
    assert "".join(event.delta for event in events if event.type.endswith("text.delta")) == whole.output_text
    done = events[-1].response
    assert (done.output_text, done.usage) == (whole.output_text, whole.usage.model_copy(update={
        "input_tokens_details": done.usage.input_tokens_details}))  # fmt: skip
    with client.responses.stream(**request) as stream:  # the client's own accumulation
        for _ in stream:
            pass
        assert stream.get_final_response().output_text == whole.output_text


def test_log_probabilities_of_a_response_are_a_chat_s(client):
    request = {"model": "demo", "input": "Hello!", "temperature": 0, "top_logprobs": 2, "max_output_tokens": 6}
    request["include"] = ["message.output_text.logprobs"]
    whole = client.responses.create(**request).output[0].content[0].logprobs
    events = checked(client.responses.create(**request, stream=True))
    deltas = [one for event in events if event.type == "response.output_text.delta" for one in event.logprobs]
    chatted = chat(client, max_tokens=6, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert len(whole) == len(deltas) == len(chatted) == 6
    assert [(one.token, one.logprob) for one in whole] == [(one.token, one.logprob) for one in chatted]
    assert [one.logprob for one in deltas] == [one.logprob for one in whole] and len(whole[0].top_logprobs) == 2


def test_a_stream_of_a_message_is_what_its_client_expects(claude):
    request = {"model": "demo", "messages": HELLO, "max_tokens": 12, **GREEDY}
    whole = claude.messages.create(**request)
    with claude.messages.stream(**request) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    assert [kind for kind in kinds if kind.endswith(("start", "stop"))] == [
        "message_start", "content_block_start", "content_block_stop", "message_stop",
    ]  # fmt: skip
    assert final.content[0].text == whole.content[0].text
    assert (final.stop_reason, final.usage.output_tokens) == (whole.stop_reason, whole.usage.output_tokens)
    assert kinds[-2:] == ["message_delta", "message_stop"]


def test_stop_sequences_and_cached_tokens(claude, client):
    text = {"type": "text", "text": "Tell me about it, please. " * 20, "cache_control": {"type": "ephemeral"}}
    long = [{"role": "user", "content": [text]}]
    request = {"model": "demo", "messages": long, "max_tokens": 12, **GREEDY}
    first = claude.messages.create(**request)
    stop = first.content[0].text[3:6]
    second = claude.messages.create(**request, stop_sequences=[stop])
    assert (second.stop_reason, second.stop_sequence) == ("stop_sequence", stop)
    assert second.usage.cache_read_input_tokens > 50
    total = first.usage.input_tokens + first.usage.cache_read_input_tokens
    assert second.usage.input_tokens + second.usage.cache_read_input_tokens == total
    counted = claude.messages.count_tokens(model="demo", messages=long)
    assert counted.input_tokens == total
    response = client.responses.create(model="demo", input=text["text"], max_output_tokens=2)
    assert (response.usage.input_tokens, response.usage.input_tokens_details.cached_tokens > 50) == (total, True)


def test_tools_that_must_be_called(claude, client):
    forced = {"model": "demo", "input": "Hello!", "tools": [FUNCTION], "temperature": 0}
    for choice in ("required", {"type": "function", "name": "f"}):
        response = client.responses.create(**forced, tool_choice=choice, parallel_tool_calls=False)
        [call] = response.output
        assert (call.type, call.name, json.loads(call.arguments)["x"] in (1, 2)) == ("function_call", "f", True)
        events = checked(client.responses.create(**forced, tool_choice=choice, parallel_tool_calls=False, stream=True))
        assert events[-1].response.output[0].arguments == call.arguments
        deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
        assert "".join(deltas) == call.arguments
    tools = [{"name": "f", "input_schema": TOOL}]
    asked = {"model": "demo", "messages": HELLO, "max_tokens": 60, "tools": tools, **GREEDY}
    for choice in ({"type": "any"}, {"type": "tool", "name": "f"}):
        choice = choice | {"disable_parallel_tool_use": True}
        message = claude.messages.create(**asked, tool_choice=choice)
        assert (message.stop_reason, message.content[0].name, message.content[0].input) == ("tool_use", "f", {
            "x": json.loads(call.arguments)["x"]})  # fmt: skip
        with claude.messages.stream(**asked, tool_choice=choice) as stream:
            assert stream.get_final_message().content[0].input == message.content[0].input


def test_a_format_for_text_beside_a_forced_call_is_taken(client):
    """As instructor sends it: no text is written that it could hold."""
    named = {"type": "json_schema", "name": "n", "schema": {"type": "object"}}
    for text in ({"format": {"type": "json_object"}}, {"format": named}):
        response = client.responses.create(
            model="demo", input="Hello!", tools=[FUNCTION], tool_choice="required", parallel_tool_calls=False,
            text=text, temperature=0,
        )  # fmt: skip
        assert [one.type for one in response.output] == ["function_call"]


def test_the_history_of_calls_is_taken_in_either_form(claude, client):
    """What the answer's own client sends back: the same prompt in both."""
    items = [
        {"role": "user", "content": "Hi"},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"x": 1}'},
        {"type": "function_call_output", "call_id": "c1", "output": "7"},
        {"role": "assistant", "content": [{"type": "output_text", "text": "It is 7."}]},
        {"role": "user", "content": [{"type": "input_text", "text": "Sure?"}]},
    ]
    response = client.responses.create(model="demo", input=items, temperature=0, max_output_tokens=5)
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "Hm.", "signature": "s"},
            {"type": "tool_use", "id": "c1", "name": "f", "input": {"x": 1}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1", "content": "7"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "It is 7."}]},
        {"role": "user", "content": [{"type": "text", "text": "Sure?"}]},
    ]  # fmt: skip
    message = claude.messages.create(model="demo", messages=messages, max_tokens=5, **GREEDY)
    assert message.content[0].text == response.output_text
    assert message.usage.input_tokens + message.usage.cache_read_input_tokens == response.usage.input_tokens


def test_instructions_and_a_developer_s_message_are_one_system_message(client):
    items = [{"role": "developer", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    one = client.responses.create(model="demo", instructions="Be brief.", input=items, temperature=0)
    messages = [{"role": "system", "content": "Be brief.\n\nBe kind."}, {"role": "user", "content": "Hi"}]
    two = chat(client, messages=messages)
    assert (one.output_text, one.usage.input_tokens) == (two.choices[0].message.content, two.usage.prompt_tokens)


def test_a_schema_holds_in_either_form(claude, client):
    named = {"type": "json_schema", "name": "n", "schema": TOOL, "strict": True}
    response = client.responses.create(model="demo", input="Hello!", text={"format": named}, temperature=0)
    message = claude.messages.create(
        model="demo", messages=HELLO, max_tokens=60, **GREEDY,
        output_config={"format": {"type": "json_schema", "schema": TOOL}},
    )  # fmt: skip
    assert json.loads(response.output_text)["x"] in (1, 2)
    assert message.content[0].text == response.output_text


def test_a_stored_response_goes_on_is_listed_and_forgotten(client):
    first = client.responses.create(model="demo", input="Hello!", temperature=0)
    assert client.responses.retrieve(first.id) == first
    second = client.responses.create(
        model="demo", input="And now?", temperature=0, previous_response_id=first.id, max_output_tokens=5
    )
    spoken = [*HELLO, {"role": "assistant", "content": first.output_text}, {"role": "user", "content": "And now?"}]
    assert second.output_text == chat(client, messages=spoken, max_tokens=5).choices[0].message.content
    assert second.previous_response_id == first.id
    items = client.responses.input_items.list(second.id, order="asc", limit=2)
    assert [item.type for item in items.data] == ["message", "message"]
    assert [item.role for item in items] == ["user", "assistant", "user"]  # page after page
    client.responses.delete(first.id)
    for ask in (
        lambda: client.responses.retrieve(first.id),
        lambda: client.responses.create(model="demo", input="x", previous_response_id=first.id),
    ):
        with pytest.raises(openai.NotFoundError):
            ask()
    with pytest.raises(openai.BadRequestError, match="synchronous"):
        client.responses.cancel(second.id)
    unkept = client.responses.create(model="demo", input="Hello!", store=False, max_output_tokens=2)
    assert not unkept.store
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(unkept.id)


def test_the_prompt_and_the_answer_as_the_model_has_them_where_asked(server, client):
    request = {"model": "demo", "input": "Hello!", "temperature": 0, "extra_body": {"enable_response_messages": True}}
    whole = client.responses.create(**request)
    raw = server.post("/v1/chat/completions", {"messages": HELLO, "temperature": 0, "return_token_ids": True}).json()
    [one], [two] = whole.input_messages, whole.output_messages
    assert (one["tokens"], two["tokens"]) == (raw["prompt_token_ids"], raw["choices"][0]["token_ids"])
    assert "Hello!" in one["message"] and two["message"].startswith(whole.output_text)
    streamed = checked(client.responses.create(**request, stream=True))[-1].response
    assert (streamed.input_messages, streamed.output_messages) == (whole.input_messages, whole.output_messages)
    assert not hasattr(client.responses.create(model="demo", input="Hello!"), "input_messages")


def test_another_key_does_not_see_a_response(server, client):
    stored = client.responses.create(model="demo", input="Hello!", max_output_tokens=2)
    other = openai.OpenAI(base_url=f"{server.url}/v1", api_key="second-key", max_retries=0)
    for ask in (other.responses.retrieve, other.responses.delete, other.responses.cancel):
        with pytest.raises(openai.NotFoundError):
            ask(stored.id)


def test_a_response_in_the_background_ends_or_is_ended(server, client):
    made = client.responses.create(model="demo", input="Hello!", background=True, temperature=0)
    assert made.status in ("queued", "in_progress")
    wait_for(lambda: client.responses.retrieve(made.id).status not in ("queued", "in_progress"), "it does not end")
    found = client.responses.retrieve(made.id)
    assert found.output_text == client.responses.create(model="demo", input="Hello!", temperature=0).output_text
    long = client.responses.create(
        model="demo", input="Hello!", background=True, extra_body={"ignore_eos": True}, max_output_tokens=480
    )
    assert client.responses.cancel(long.id).status in ("cancelled", "incomplete")
    server.wait_idle()


def test_errors_have_the_form_of_their_api(server, claude):
    with pytest.raises(anthropic.NotFoundError) as raised:
        claude.messages.create(model="gpt-7", messages=HELLO, max_tokens=5)
    assert raised.value.body["error"]["type"] == "not_found_error"
    with pytest.raises(anthropic.AuthenticationError):
        anthropic.Anthropic(base_url=server.url, api_key="no", max_retries=0).messages.create(
            model="demo", messages=HELLO, max_tokens=5
        )
    bearer = anthropic.Anthropic(base_url=server.url, auth_token="test-key", max_retries=0)
    assert bearer.messages.create(model="demo", messages=HELLO, max_tokens=2).stop_reason == "max_tokens"
    clamped = claude.messages.create(model="demo", messages=HELLO, max_tokens=8000, extra_body={"ignore_eos": True})
    assert clamped.stop_reason == "model_context_window_exceeded"


BAD = [
    ("/v1/messages", {"max_tokens": 5, "messages": [{"role": "user", "content": [{"type": "video"}]}]}),
    ("/v1/messages", {"max_tokens": 5, "messages": HELLO, "tools": [{"type": "web_search_20250305", "name": "w"}]}),
    ("/v1/messages", {"max_tokens": 0, "messages": HELLO}),
    ("/v1/messages", {"messages": HELLO}),
    ("/v1/messages", {"max_tokens": 5, "messages": HELLO, "tool_choice": {"type": "many"}}),
    ("/v1/messages", {"max_tokens": 5, "messages": HELLO, "thinking": {"type": "enabled"}}),
    ("/v1/messages", {"max_tokens": 5, "messages": HELLO, "context_management": {"edits": [{"type": "x"}]}}),
    ("/v1/messages", {"max_tokens": 5, "messages": HELLO, "stop_sequences": [""]}),
    ("/v1/messages", {"max_tokens": 5, "messages": [{"role": "user", "content": [
        {"type": "tool_result", "tool_use_id": "1", "content": 7}]}]}),
    ("/v1/messages/count_tokens", {"messages": []}),
    ("/v1/responses", {}),
    ("/v1/responses", {"input": []}),
    ("/v1/responses", {"input": [7]}),
    ("/v1/responses", {"input": [{"type": "computer_call"}]}),
    ("/v1/responses", {"input": [{"type": "function_call"}]}),
    ("/v1/responses", {"input": [{"role": "user", "content": 5}]}),
    ("/v1/responses", {"input": "x", "tools": [{"type": "web_search"}]}),
    ("/v1/responses", {"input": "x", "truncation": "auto"}),
    ("/v1/responses", {"input": "x", "include": ["file_search_call.results"]}),
    ("/v1/responses", {"input": "x", "background": True, "stream": True}),
    ("/v1/responses", {"input": "x", "conversation": "c"}),
    ("/v1/responses", {"input": "x", "max_output_tokens": 0}),
    ("/v1/responses", {"input": "x", "text": {"format": {"type": "json_schema", "name": "n"}}}),
    ("/v1/responses", {"input": "x", "n": 2}),
    ("/v1/responses", {"input": "x", "topP": 0.5}),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body"), BAD)
def test_what_cannot_be_honoured_is_a_400(server, path, body):
    answer = server.post(path, body)
    assert answer.status_code == 400, answer.text
    assert (answer.json().get("type") == "error") == path.startswith("/v1/messages")
    assert answer.json()["error"]["message"]


@pytest.mark.slow
def test_two_hundred_seeded_requests_through_each(server, client, claude):
    for seed in range(200):
        test_three_apis_give_one_text_and_one_usage(client, claude, {"temperature": 1.0, "seed": seed, "top_p": 0.95})
