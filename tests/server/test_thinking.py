"""Thoughts from a running server: apart from the answer in every API, bounded, and before what a grammar holds."""

from __future__ import annotations

import json

import pytest
from server_harness import RunningServer
from test_bad_requests import CHAT, assert_error
from test_three_apis import TOOL, checked

openai = pytest.importorskip("openai")
anthropic = pytest.importorskip("anthropic")

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n"
    "</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% else %}<think>\n{% endif %}"
    "{% endif %}"
)
HELLO = [{"role": "user", "content": "Hello!"}]
LONG = {"temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def thinker(tmp_path_factory):
    """The demo model, taught by its template to think; it never closes a thought by itself."""
    file = tmp_path_factory.mktemp("template") / "think.jinja"
    file.write_text(TEMPLATE)
    running = RunningServer("--max-model-len", "512", "--chat-template", str(file))
    yield running
    running.wait_idle()
    assert running.stop() == 0


def chat(server, **more):
    answer = server.post(CHAT, {"messages": HELLO, "max_tokens": 24} | LONG | more)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_thought_is_apart_from_the_answer_and_as_long_as_it_may_be(thinker):
    body = chat(thinker, thinking_token_budget=6)
    message = body["choices"][0]["message"]
    assert message["reasoning"] and message["content"] and "think" not in message["content"]
    assert 0 < body["usage"]["completion_tokens_details"]["reasoning_tokens"] <= 6
    client = openai.OpenAI(base_url=f"{thinker.url}/v1", api_key="test-key")
    more = {"ignore_eos": True, "thinking_token_budget": 6}
    request = {"model": "demo", "messages": HELLO, "max_tokens": 24, "temperature": 0}
    deltas = [c.choices[0].delta for c in client.chat.completions.create(**request, stream=True, extra_body=more)]
    assert "".join(getattr(delta, "reasoning", None) or "" for delta in deltas) == message["reasoning"]
    assert "".join(delta.content or "" for delta in deltas) == message["content"]
    hidden = chat(thinker, thinking_token_budget=6, include_reasoning=False)["choices"][0]["message"]
    assert hidden == {"role": "assistant", "content": message["content"]}
    # One that is never closed is all there is.
    endless = chat(thinker)["choices"][0]["message"]
    assert endless["reasoning"] and not endless["content"]


def test_the_other_apis_show_it_in_their_form(thinker):
    message = chat(thinker, thinking_token_budget=6)["choices"][0]["message"]
    more = {"ignore_eos": True, "thinking_token_budget": 6}
    client = openai.OpenAI(base_url=f"{thinker.url}/v1", api_key="test-key", max_retries=0)
    request = {"model": "demo", "input": "Hello!", "max_output_tokens": 24, "temperature": 0, "extra_body": more}
    response = client.responses.create(**request)
    assert [item.type for item in response.output] == ["reasoning", "message"]
    assert response.output[0].content[0].text == message["reasoning"]
    assert response.output_text == message["content"]
    assert 0 < response.usage.output_tokens_details.reasoning_tokens <= 6
    events = checked(client.responses.create(**request, stream=True))
    kinds = [event.type for event in events]
    assert kinds.index("response.reasoning_text.done") < kinds.index("response.output_text.delta")
    thought = "".join(event.delta for event in events if event.type == "response.reasoning_text.delta")
    assert thought == message["reasoning"]
    claude = anthropic.Anthropic(base_url=thinker.url, api_key="test-key", max_retries=0)
    asked = {"model": "demo", "messages": HELLO, "max_tokens": 24, "thinking": {"type": "enabled", "budget_tokens": 6}}
    asked["extra_body"] = LONG
    whole = claude.messages.create(**asked)
    assert [block.type for block in whole.content] == ["thinking", "text"]
    assert (whole.content[0].thinking, whole.content[1].text) == (message["reasoning"], message["content"])
    with claude.messages.stream(**asked) as stream:
        thought, text = stream.get_final_message().content
    assert (thought, text.text) == (whole.content[0], message["content"])


def test_a_grammar_holds_what_follows_the_thought(thinker):
    asked = {"type": "json_schema", "json_schema": {"name": "n", "schema": TOOL}}
    more = {"max_tokens": 60, "ignore_eos": False}
    message = chat(thinker, thinking_token_budget=6, response_format=asked, **more)["choices"][0]["message"]
    assert message["reasoning"] and json.loads(message["content"])["x"] in (1, 2)
    tools = [{"type": "function", "function": {"name": "f", "parameters": TOOL}}]
    for choice in ("required", {"type": "function", "function": {"name": "f"}}):
        message = chat(
            thinker, thinking_token_budget=6, tools=tools, tool_choice=choice, parallel_tool_calls=False, **more
        )["choices"][0]["message"]
        assert message["reasoning"] and json.loads(message["tool_calls"][0]["function"]["arguments"])["x"] in (1, 2)


def test_a_template_is_told_to_think_or_not_to(thinker, server):
    for more in ({"enable_thinking": False}, {"reasoning_effort": "none"},
                 {"chat_template_kwargs": {"enable_thinking": False}}):  # fmt: skip
        message = chat(thinker, **more)["choices"][0]["message"]
        assert message["content"] and "reasoning" not in message
    assert chat(thinker, reasoning_effort="low")["choices"][0]["message"]["reasoning"]
    for more in ({"enable_thinking": True}, {"reasoning_effort": "low"}, {"chat_template_kwargs": {"deeply": True}}):
        error = assert_error(server.post(CHAT, {"messages": HELLO, "max_tokens": 2} | more), 400)
        assert error["param"] == next(iter(more)) and "knows" in error["message"]
    for more in ({"enable_thinking": False}, {"reasoning_effort": "none"}, {"include_reasoning": False},
                 {"thinking_token_budget": 5}, {"chat_template_kwargs": {"enable_thinking": False}}):  # fmt: skip
        assert "reasoning" not in chat(server, **more)["choices"][0]["message"]  # they ask for nothing


def test_past_thoughts_reach_the_template(thinker):
    turn = {"role": "assistant", "content": "Hi."}
    counts = [
        thinker.post("/tokenize", {"messages": [*HELLO, turn | more, *HELLO]}).json()["count"]
        for more in ({}, {"reasoning": "Hm."}, {"reasoning_content": "Hm."})
    ]
    assert counts[0] < counts[1] == counts[2]


def test_calls_are_read_and_held_of_a_model_that_makes_none(server):
    """What a demo model says with tools is text; that nothing is in its way shows that free text is free."""
    tools = [{"type": "function", "function": {"name": "f", "parameters": TOOL}}]
    free = chat(server, temperature=0)["choices"][0]["message"]["content"]
    assert chat(server, tools=tools, min_tokens=3)["choices"][0]["message"]["content"] == free
    odd = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {
        "x": {"type": "string", "pattern": "(?=a)b"}}}}}]  # fmt: skip
    assert chat(server, tools=odd)["choices"][0]["message"]["content"] == free  # no grammar knows it: read alone
