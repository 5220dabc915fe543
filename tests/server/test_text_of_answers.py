"""A server of a model whose tokenizer strips a blank: what it sends is the tokenizer's decode of prompt + output."""

from __future__ import annotations

import json

import pytest
from prometheus_client.parser import text_string_to_metric_families

from kvarena.engine.errors import ModelError
from kvarena.engine.server.api.protocol import CompletionRequest
from kvarena.engine.server.api.sampling import sampling_params
from kvarena.engine.server.shared.config import ServerConfig
from kvarena.engine.server.shared.ipc import EngineInfo
from kvarena.engine.server.text.tokenization import generation_defaults
from tests import tokenizer_kinds
from tests.checkpoints import write_checkpoint
from tests.server.server_harness import RunningServer, stream_events

PROMPT = "the a and"
LENGTH = 5


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_kinds.llama()


@pytest.fixture(scope="module")
def server(tmp_path_factory, tokenizer):
    directory = tmp_path_factory.mktemp("llama")
    # Neither config names the tokenizer's own end token, and the embedding is padded.
    write_checkpoint(directory, vocab_size=len(tokenizer) + 5, num_hidden_layers=1, eos_token_id=0)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(directory)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": 0, "max_new_tokens": LENGTH}))
    running = RunningServer(model=str(directory), key=None)
    yield running
    assert running.stop() == 0


def forced(tokenizer, token, **body):
    """A request whose every token is `token`."""
    bias = {str(tokenizer.convert_tokens_to_ids(token)): 100}
    return {"prompt": PROMPT, "max_tokens": 3, "temperature": 0, "logit_bias": bias} | body


def whole(server, body, path="/v1/completions"):
    answer = server.post(path, body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def streamed(server, body, path="/v1/completions"):
    with server.client.stream("POST", path, json=body | {"stream": True}) as response:
        return [json.loads(line) for line in stream_events(response) if line != "[DONE]"]


def ids_of(tokenizer, output, prompt=PROMPT):
    return tokenizer.encode(prompt) + [tokenizer.convert_tokens_to_ids(token) for token in output]


@pytest.mark.parametrize("given", ("text", "ids"))
@pytest.mark.parametrize("echo", (False, True))
def test_text_goes_on_from_the_prompt(server, tokenizer, given, echo):
    prompt = PROMPT if given == "text" else tokenizer.encode(PROMPT)
    body = forced(tokenizer, "\u2581the", prompt=prompt, echo=echo, n=2)
    expected = tokenizer.decode(ids_of(tokenizer, ["\u2581the"] * 3), skip_special_tokens=True)
    assert expected == PROMPT + " the the the"
    if not echo:
        expected = expected.removeprefix(PROMPT)
    choices = whole(server, body)["choices"]
    assert [choice["text"] for choice in choices] == [expected] * 2
    texts = ["", ""]
    for chunk in streamed(server, body):
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == [expected] * 2


def test_a_final_message_goes_on(server, tokenizer):
    chat = {"messages": [{"role": "user", "content": "b "}, {"role": "assistant", "content": "the a"}]}
    body = forced(tokenizer, "\u2581the") | chat | {"continue_final_message": True, "add_generation_prompt": False}
    body.pop("prompt")
    answer = whole(server, body, "/v1/chat/completions")
    assert answer["choices"][0]["message"]["content"] == " the the the"
    chunks = streamed(server, body, "/v1/chat/completions")
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == " the the the"


@pytest.mark.parametrize("end", ("\n", "\n\n", "\u4f61", " ", "x"))
def test_what_the_prompt_ends_in_is_no_part_of_the_text(server, tokenizer, end):
    """Byte tokens are complete only when another token follows; the prompt's own are not the answer's."""
    body = forced(tokenizer, "\u2581the", prompt=PROMPT + end, max_tokens=2)
    assert whole(server, body)["choices"][0]["text"] == " the the"
    assert whole(server, body | {"echo": True})["choices"][0]["text"] == PROMPT + end + " the the"
    assert "".join(event["choices"][0]["text"] for event in streamed(server, body)) == " the the"


def test_a_character_begun_in_the_prompt(server, tokenizer):
    prompt = ids_of(tokenizer, ["<0xC3>"])
    body = forced(tokenizer, "<0xA9>", prompt=prompt, max_tokens=1)
    assert whole(server, body)["choices"][0]["text"] == "\u00e9"
    run = body | {"prompt": ids_of(tokenizer, ["<0x41>", "<0xC3>"])}
    assert whole(server, run)["choices"][0]["text"] == "\u00e9"
    assert whole(server, body | {"echo": True})["choices"][0]["text"] == PROMPT + "\u00e9"
    events = streamed(server, body | {"echo": True})
    assert [event["choices"][0]["text"] for event in events] == [PROMPT, "\u00e9"]
    # Nothing follows: the prompt's own end is what it is alone.
    none = whole(server, body | {"echo": True, "max_tokens": 0})["choices"][0]["text"]
    assert none == tokenizer.decode(prompt, skip_special_tokens=True) == PROMPT + "\ufffd"


def test_a_stop_string_of_byte_tokens_ends_at_its_last_byte(server, tokenizer):
    body = forced(tokenizer, "<0x0A>", max_tokens=9, stop=["\n\n"])
    answer = whole(server, body)
    assert answer["choices"][0] | {"text": "", "finish_reason": "stop", "stop_reason": "\n\n"} == answer["choices"][0]
    assert answer["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize("token", ("\u2581the", "<0xE4>", "\u2581"))
@pytest.mark.parametrize("echo", (False, True))
def test_log_probabilities_lose_no_token_and_lie_where_the_text_is(server, tokenizer, token, echo):
    body = forced(tokenizer, token, prompt=ids_of(tokenizer, ["<0xF0>", "<0x9F>", "a"]), echo=echo, logprobs=20)
    choice = whole(server, body)["choices"][0]
    lists = choice["logprobs"]
    assert {len(column) for column in lists.values()} == {3 + echo * len(body["prompt"])}
    assert all(top is None or len(top) in (20, 21) for top in lists["top_logprobs"])
    assert not any("\ufffd" in name for name in lists["tokens"])
    ends = [*lists["text_offset"][1:], len(choice["text"])]
    for name, start, end in zip(lists["tokens"], lists["text_offset"], ends, strict=True):
        shown = choice["text"][start:end]
        assert shown == ("\ufffd" if name.startswith("bytes:") else "" if name == "<s>" else name)
    if not echo:
        events = streamed(server, body)
        for key, column in lists.items():
            parts = [event["choices"][0]["logprobs"] for event in events]
            assert [value for part in parts if part for value in part[key]] == column
    chat = {key: value for key, value in body.items() if key not in ("prompt", "echo")}
    chat |= {"messages": [{"role": "user", "content": "the"}], "logprobs": True, "top_logprobs": 20}
    for entry in whole(server, chat, "/v1/chat/completions")["choices"][0]["logprobs"]["content"]:
        names = [top["token"] for top in entry["top_logprobs"]]
        assert len(set(names)) == len(names) == 20
        assert not any("\ufffd" in name for name in names)


@pytest.mark.parametrize("echo", (False, True))
def test_tokens_that_a_stop_string_cuts_off_begin_at_the_texts_end(server, tokenizer, echo):
    body = forced(tokenizer, "\u2581the", max_tokens=4, stop=["e the t"], logprobs=0, echo=echo)
    choice = whole(server, body)["choices"][0]
    start = PROMPT if echo else ""
    assert choice["text"] == start + " th"
    assert choice["logprobs"]["text_offset"][-3:] == [len(start), len(start) + 3, len(start) + 3]
    if not echo:
        parts = [event["choices"][0]["logprobs"] for event in streamed(server, body)]
        assert [place for part in parts if part for place in part["text_offset"]] == choice["logprobs"]["text_offset"]


def test_the_tokenizers_own_end_ends_an_answer(server, tokenizer):
    body = forced(tokenizer, "</s>")
    choice = whole(server, body)["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("", "stop", None)
    # An end that the request itself names while it ignores the model's is a stop token like any other.
    choice = whole(server, body | {"ignore_eos": True, "stop_token_ids": [tokenizer.eos_token_id]})["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", tokenizer.eos_token_id)


def test_the_models_default_length(server, tokenizer):
    body = forced(tokenizer, "a", max_tokens=None)
    assert whole(server, body)["usage"]["completion_tokens"] == LENGTH
    chat = {key: value for key, value in body.items() if key != "prompt"}
    chat |= {"messages": [{"role": "user", "content": "the"}]}
    assert whole(server, chat, "/v1/chat/completions")["usage"]["completion_tokens"] == LENGTH


@pytest.mark.parametrize(
    ("content", "says"),
    (
        ("[1]", "must hold a JSON object"),
        ('{"max_new_tokens": true}', "max_new_tokens=True must be a whole number"),
        ('{"max_new_tokens": Infinity}', "max_new_tokens=inf must be a whole number"),
        ('{"max_new_tokens": 0}', "max_new_tokens=0 must be at least 1"),
        ('{"top_k": 2.5}', "top_k=2.5 must be a whole number"),
        ('{"temperature": NaN}', "temperature=nan must be a finite number"),
        ('{"top_p": 3}', "top_p=3 must be in (0, 1]"),
    ),
)
def test_a_wrong_generation_config_is_one_line(tmp_path, content, says):
    file = tmp_path / "generation_config.json"
    file.write_text(content)
    with pytest.raises(ModelError) as caught:
        generation_defaults(str(tmp_path))
    assert str(file) in str(caught.value)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    file.write_text('{"max_new_tokens": null, "top_k": -1, "temperature": 0.5}')
    assert generation_defaults(str(tmp_path)) == {"top_k": -1, "temperature": 0.5}


def test_a_seed_of_minus_one_is_none():
    limits = EngineInfo(64, 64, 10, prompt_logprobs=True)
    for given, expected in ((-1, None), (None, None), (0, 0), (-2, 2**63 - 2)):
        req = CompletionRequest(prompt="a", seed=given)
        assert sampling_params(req, ServerConfig(), limits, max_tokens=4, logprobs=None).seed == expected


def test_shapes(server, tokenizer):
    """What clients of vLLM look up is null and not absent, and the finish reason comes with the last text."""
    body = forced(tokenizer, "a")
    choice = whole(server, body)["choices"][0]
    assert [choice[key] for key in ("prompt_logprobs", "prompt_token_ids", "token_ids")] == [None] * 3
    chat = {key: value for key, value in body.items() if key != "prompt"}
    chat |= {"messages": [{"role": "user", "content": "the"}]}
    answer = whole(server, chat, "/v1/chat/completions")
    assert [answer["prompt_logprobs"], answer["prompt_token_ids"], answer["choices"][0]["token_ids"]] == [None] * 3
    for path, request in (("/v1/completions", body), ("/v1/chat/completions", chat)):
        for extra in ({}, {"logprobs": 1} if "prompt" in request else {"logprobs": True}, {"return_token_ids": True}):
            events = streamed(server, request | extra, path)
            last = events[-1]["choices"][0]
            assert (last["finish_reason"], last["stop_reason"]) == ("length", None)
            # A front that is late merges tokens: how many chunks there are is not known.
            assert set(last["text"] if "prompt" in request else last["delta"]["content"]) == {"a"}
            assert not any(event["choices"][0]["finish_reason"] for event in events[:-1])
            assert all("token_ids" in event["choices"][0] for event in events)
    ids = whole(server, chat | {"return_token_ids": True}, "/v1/chat/completions")["prompt_token_ids"]
    events = streamed(server, chat | {"return_token_ids": True}, "/v1/chat/completions")
    assert events[0]["prompt_token_ids"] == ids
    assert streamed(server, body | {"return_token_ids": True})[0]["choices"][0]["prompt_token_ids"]


def test_tokenize_gives_the_vocabularys_strings(server, tokenizer):
    answer = whole(server, {"prompt": "the \u4f61", "return_token_strs": True}, "/tokenize")
    assert answer["token_strs"] == tokenizer.convert_ids_to_tokens(answer["tokens"])
    assert answer["token_strs"][:2] == ["<s>", "\u2581the"]


def test_the_cache_has_vllms_labels(server):
    families = text_string_to_metric_families(server.client.get("/metrics").text)
    labels = next(family.samples[0].labels for family in families if family.name == "vllm:cache_config_info")
    wanted = {"block_size", "cache_dtype", "enable_prefix_caching", "gpu_memory_utilization", "is_attention_free"}
    wanted |= {"num_cpu_blocks", "num_gpu_blocks", "num_gpu_blocks_override", "prefix_caching_hash_algo"}
    wanted |= {"sliding_window", "kv_cache_memory_bytes", "kv_cache_size_tokens", "kv_cache_max_concurrency"}
    assert wanted <= set(labels)
    assert int(labels["kv_cache_size_tokens"]) == int(labels["num_gpu_blocks"]) * int(labels["block_size"])
