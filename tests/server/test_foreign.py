"""What would change an answer on another server is honoured or a 400, at any depth; what asks for nothing is taken."""

from __future__ import annotations

import pytest

from kvarena.allocators.paged import PagedAllocator
from kvarena.engine.errors import RequestError
from kvarena.engine.server.api.foreign import check_foreign
from kvarena.engine.server.api.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from kvarena.engine.server.api.structured import JSON_OBJECT, from_response_format
from kvarena.engine.server.front.http import validated
from kvarena.engine.server.shared.errors import ApiError
from kvarena.schedulers.chunked import ChunkedScheduler
from kvarena.schedulers.fair import FairScheduler
from kvarena.schedulers.priority import PriorityScheduler

MESSAGE = {"role": "user", "content": "x"}
BODIES = {
    CompletionRequest: {"prompt": "x"},
    ChatCompletionRequest: {"messages": [MESSAGE]},
    TokenizeRequest: {"prompt": "x"},
    DetokenizeRequest: {"tokens": [1]},
}
BOTH = (CompletionRequest, ChatCompletionRequest)
# A key, a value that counts, values that ask for nothing.
FOREIGN = [
    ("regex", "a+", [None, ""]),
    ("ebnf", 'root ::= "a"', [None]),
    ("json_schema", "{}", [None, {}]),
    ("grammar", 'root ::= "a"', [""]),
    ("structural_tag", "{}", [None]),
    ("stop_regex", "a", [None, []]),
    ("min_new_tokens", 3, [0, None]),
    ("max_new_tokens", 3, [None]),
    ("num_beams", 2, [1]),
    ("typical_p", 0.5, [1, 1.0]),
    ("typical_p", 0, []),
    ("no_repeat_ngram_size", 2, [0]),
    ("lora_path", "x", [None]),
    ("custom_logit_processor", "x", [None]),
    ("mirostat", 2, [0, False]),
    ("mirostat", True, []),
    ("guided_json", {"type": "integer"}, [None]),
    ("guidedRegex", "a", [None]),
    ("do_sample", False, [True, None]),
    ("separate_reasoning", "yes", [True, False]),  # vllm-router sends true with every chat
    ("top_n_sigma", 1.5, [-1, 0]),
    ("options", {"num_predict": 3}, [{}]),
    ("extra_body", {"top_k": 3}, [{}]),
    ("sampling_params", {"top_k": 3}, [None]),
    ("stop_sequences", ["x"], [[]]),
    ("topP", 0.5, [None]),
    ("max-tokens", 3, [None]),
    ("MaxTokens", 3, [None]),
    ("xtc_probability", 0.5, [0.0]),
    ("verbosity", "low", ["medium"]),
]


def check(kind, **keys):
    check_foreign(validated(BODIES[kind] | keys, kind))


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize(("key", "value", "nothing"), FOREIGN)
def test_other_servers_parameters(kind, key, value, nothing):
    with pytest.raises(ApiError, match=key) as caught:
        check(kind, **{key: value})
    assert (caught.value.status, caught.value.param) == (400, key)
    for one in nothing:
        check(kind, **{key: one})


def test_the_error_says_what_to_use():
    for key, value, instead in (
        ("max_new_tokens", 3, "use max_tokens"),
        ("regex", "a", "use structured_outputs.regex"),
        ("topP", 0.5, "spelled top_p"),
        ("extra_body", {"a": 1}, "top-level keys"),
    ):
        with pytest.raises(ApiError, match=instead):
            check(ChatCompletionRequest, **{key: value})


OTHER_ENDPOINTS = [
    (CompletionRequest, {"messages": [MESSAGE]}),
    (CompletionRequest, {"max_completion_tokens": "x", "truncate_prompt_tokens": -1}),
    (CompletionRequest, {"tools": [{}]}),
    (CompletionRequest, {"top_logprobs": 3}),
    (ChatCompletionRequest, {"prompt": "x"}),
    (ChatCompletionRequest, {"suffix": "x"}),
    (TokenizeRequest, {"documents": [{"text": "x"}]}),
    (TokenizeRequest, {"reasoning_effort": "low"}),
    (CompletionRequest, {"reasoning_effort": "low"}),
    (CompletionRequest, {"enable_thinking": False}),
    (CompletionRequest, {"include_reasoning": False}),
    (TokenizeRequest, {"addSpecialTokens": True}),
    (DetokenizeRequest, {"skipSpecialTokens": True}),
]


@pytest.mark.parametrize(("kind", "keys"), OTHER_ENDPOINTS)
def test_parameters_of_other_endpoints(kind, keys):
    with pytest.raises(ApiError):
        check(kind, **keys)


NESTED = [
    ("structured_outputs", {"regex": "a", "ebnf": "x"}),
    ("structured_outputs", {"json": {}, "whitespace_pattern": " "}),
    ("structured_outputs", {"jsonObject": True, "regex": "a"}),
    ("response_format", {"type": "json_object", "value": {}, "regex": "x"}),
    ("response_format", {"type": "json_schema", "jsonSchema": {"schema": {"type": "object"}}}),
    ("response_format", {"type": "json_schema", "json_schema": {"schema": {}, "ebnf": "x"}}),
    ("stream_options", {"includeUsage": True}),
    ("messages", [MESSAGE, {"role": "assistant", "content": "x", "prefix": True}]),
    ("messages", [MESSAGE, {"role": "assistant", "content": "x", "partial": True}]),
    ("messages", [MESSAGE, {"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}}]),
    ("messages", [MESSAGE | {"toolCallId": "x"}]),
    ("tools", [{"function": {"name": "f", "inputSchema": {"type": "object"}}}]),
    ("tools", [{"function": {"name": "f", "properties": {"x": {}}}}]),
    ("tool_choice", {"function": {"name": "f"}, "disable_parallel_tool_use": True}),
]


@pytest.mark.parametrize(("key", "value"), NESTED)
def test_keys_of_nested_objects(key, value):
    with pytest.raises(ApiError) as caught:
        check(ChatCompletionRequest, **{key: value})
    assert caught.value.param == key


def test_what_asks_for_nothing_or_changes_no_answer():
    labels = {"store": True, "metadata": {"a": 1}, "service_tier": "auto", "prompt_cache_key": "k", "keep_alive": "5m"}
    labels |= {"never_heard_of": [1], "x" * 1000: 1, "user": "u", "seed": 1, "timeout": 3, "cache_prompt": True}
    for kind in BOTH:
        check(kind, **labels)
    check(TokenizeRequest, temperature=3, regex="a", max_tokens="x")  # they make no tokens
    check(
        ChatCompletionRequest,
        structured_outputs={"regex": "a", "disable_any_whitespace": False},
        stream_options={"include_obfuscation": False},
        response_format={"type": "json_schema", "json_schema": {"name": "s", "description": "d", "schema": {}}},
        messages=[MESSAGE | {"cache_control": {"type": "ephemeral"}, "reasoning_content": "hm", "prefix": False}],
        tools=[{"type": "function", "function": {"name": "f", "strict": True}, "cache_control": {}}],
    )


def test_a_schema_in_either_place_of_the_format():
    def constraint(**fmt):
        body = validated({"prompt": "x", "response_format": fmt}, CompletionRequest)
        return from_response_format(body.response_format)

    schema = {"type": "integer"}
    for fmt in ({"type": "json_object", "schema": schema}, {"type": "json_schema", "schema": schema}):
        assert constraint(**fmt) == constraint(type="json_schema", json_schema={"schema": schema})
    assert constraint(type="json_object") == ("json", JSON_OBJECT)
    assert constraint(type="text") is None
    for wrong in (
        {"type": "text", "schema": schema},
        {"type": "text", "json_schema": {"schema": schema}},
        {"type": "json_object", "json_schema": {"schema": schema}},
        {"type": "json_schema", "schema": schema, "json_schema": {"schema": schema}},
        {"type": "json_schema"},
    ):
        with pytest.raises(RequestError):
            constraint(**wrong)


def test_which_schedulers_look_at_priorities():
    allocator = PagedAllocator(num_blocks=8, block_size=4, max_model_len=16)

    def looks(kind, **options):
        return kind(allocator, max_model_len=16, **options).has_priorities

    assert looks(PriorityScheduler)
    assert not looks(ChunkedScheduler)
    assert not looks(FairScheduler)
    assert looks(FairScheduler, victim="lowest_priority")
    assert not looks(ChunkedScheduler, victim="lowest_priority", preemption="none")
