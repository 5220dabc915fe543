"""Parameters beyond the OpenAI API, and routes about the server itself, on one running server."""

from __future__ import annotations

import json

import numpy as np
import pytest
from test_bad_requests import CHAT, COMPLETIONS

from kvarena.engine.server.api.protocol import CompletionRequest
from kvarena.engine.server.api.sampling import sampling_params
from kvarena.engine.server.engine.token_lists import TokenLists
from kvarena.engine.server.shared.config import ServerConfig
from kvarena.engine.server.shared.errors import ApiError
from kvarena.engine.server.shared.ipc import EngineInfo

USER = [{"role": "user", "content": "Hello!"}]


def events(answer):
    assert answer.status_code == 200, answer.text
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize(("path", "asked"), [(COMPLETIONS, {"prompt": "The"}), (CHAT, {"messages": USER})])
def test_every_event_counts(server, path, asked):
    body = asked | {"max_tokens": 5, "ignore_eos": True, "stream": True, "temperature": 0}
    options = {"include_usage": True, "continuous_usage_stats": True}
    shown = events(server.post(path, body | {"stream_options": options}))
    counts = [one["usage"]["completion_tokens"] for one in shown]
    assert counts == sorted(counts) and counts[-1] == 5 and shown[-1]["choices"] == []
    assert all(
        one["usage"]["total_tokens"] == one["usage"]["prompt_tokens"] + n for one, n in zip(shown, counts, strict=True)
    )
    alone = events(server.post(path, body | {"stream_options": {"continuous_usage_stats": True}}))
    assert not any("usage" in one for one in alone)  # as vLLM has it: without include_usage it asks for nothing

    def text(chunks):
        parts = [choice for one in chunks for choice in one["choices"]]
        return "".join(part.get("text") or part.get("delta", {}).get("content") or "" for part in parts)

    assert text(shown) == text(alone)


def test_only_allowed_tokens_come(server):
    body = {
        "prompt": [20] * 4,
        "max_tokens": 12,
        "ignore_eos": True,
        "return_token_ids": True,
        "temperature": 1,
        "n": 2,
    }
    choices = server.post(COMPLETIONS, body | {"allowed_token_ids": [33, 40, 33]}).json()["choices"]
    assert all(set(choice["token_ids"]) <= {33, 40} and len(choice["token_ids"]) == 12 for choice in choices)


def test_bad_words_do_not_come(server):
    body = {"prompt": "The", "max_tokens": 24, "ignore_eos": True, "temperature": 0}
    words = server.post(COMPLETIONS, body).json()["choices"][0]["text"].split()
    tokens = [(word, server.post("/tokenize", {"prompt": f" {word}", "add_special_tokens": False})) for word in words]
    bad = next(word for word, answer in tokens if answer.json()["count"] == 1)
    changed = server.post(COMPLETIONS, body | {"bad_words": [bad]}).json()["choices"][0]["text"]
    assert bad not in changed.split()
    assert server.post(CHAT, {"messages": USER, "max_tokens": 3, "bad_words": [bad]}).status_code == 200


def test_named_tokens_are_what_log_probabilities_are_of(server):
    """Beside the sampled one, in whole answers and streams of both kinds; -inf of a barred one is JSON's -9999."""
    named = {"logprob_token_ids": [500, 30, 30], "return_tokens_as_token_ids": True, "allowed_token_ids": [42, 30]}
    named |= {"max_tokens": 2, "ignore_eos": True, "temperature": 0}
    asked = [(COMPLETIONS, {"prompt": "The", "logprobs": 5}), (CHAT, {"messages": USER, "logprobs": True})]
    for path, body in asked:
        for stream in (False, True):
            answer = server.post(path, body | named | {"stream": stream})
            found = [one["choices"][0]["logprobs"] for one in (events(answer) if stream else [answer.json()])]
            if path == COMPLETIONS:
                shown = [top for one in found if one for top in one["top_logprobs"]]
            else:
                tops = [entry["top_logprobs"] for one in found if one for entry in one["content"]]
                shown = [{one["token"]: one["logprob"] for one in top} for top in tops]
            assert len(shown) == 2
            assert all({"token_id:500", "token_id:30"} <= set(top) <= {f"token_id:{i}" for i in (500, 30, 42)}
                       for top in shown)  # fmt: skip
            assert all(top["token_id:500"] == -9999.0 and top["token_id:30"] <= 0 for top in shown)


@pytest.mark.parametrize(
    ("more", "word"),
    [
        ({}, "logprobs"),
        ({"logprobs": 1, "logprob_token_ids": [5, 10**6]}, "1000000"),
        ({"logprobs": 1, "logprob_token_ids": [-1]}, "logprob_token_ids"),
        ({"logprobs": 1, "logprob_token_ids": list(range(129))}, "128"),
        ({"logprobs": 1, "echo": True, "max_tokens": 0}, "no output tokens are generated"),
    ],
)
def test_named_tokens_that_cannot_be_are_refused(server, more, word):
    answer = server.complete(**({"logprob_token_ids": [5]} | more))
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "logprob_token_ids" and word in answer.json()["error"]["message"]


@pytest.mark.parametrize(("seed", "word"), [(2**63, "less_than_equal"), (-(2**63) - 1, "greater_than_equal")])
def test_bounds_are_named_as_programs_look_for_them(server, seed, word):
    answer = server.complete(seed=seed)
    assert answer.status_code == 400 and word in answer.json()["error"]["message"]


def test_a_response_shows_what_the_model_read_and_wrote(server):
    body = {"input": "Hello?", "max_output_tokens": 6, "ignore_eos": True, "temperature": 0}
    shown = server.post("/v1/responses", body | {"enable_response_messages": True}).json()
    (read,), (written,) = shown["input_messages"], shown["output_messages"]
    assert read["type"] == written["type"] == "raw_message_tokens"
    assert (len(read["tokens"]), len(written["tokens"])) == (shown["usage"]["input_tokens"], 6)
    whole = server.post("/detokenize", {"tokens": read["tokens"] + written["tokens"], "skip_special_tokens": False})
    assert read["message"] + written["message"] == whole.json()["prompt"]
    assert "Hello?" in read["message"]
    assert "input_messages" not in server.post("/v1/responses", body).json()


def test_lists_of_tokens_bar_a_sequence_at_its_last_token():
    lists = TokenLists((), ((5,), (7, 8, 70)))
    bits = np.zeros(3, dtype=np.int32)

    def is_set(token):
        lists.fill(bits)
        return bool(bits.view(np.uint32)[token // 32] >> np.uint32(token % 32) & np.uint32(1))

    assert not is_set(5) and is_set(70) and is_set(31)
    for token in (7, 8):
        assert is_set(70)
        lists.accept(token)
    assert not is_set(70) and is_set(8)
    lists.accept(8)
    assert is_set(70)
    both = TokenLists((31, 32, 95), ((32,),))
    both.fill(bits)
    assert [int(word) for word in bits.view(np.uint32)] == [1 << 31, 0, 1 << 31]


def test_tokens_by_their_ids(server):
    body = {"prompt": "The", "max_tokens": 3, "temperature": 0, "logprobs": 2, "return_tokens_as_token_ids": True}
    choice = server.post(COMPLETIONS, body | {"return_token_ids": True}).json()["choices"][0]
    assert choice["logprobs"]["tokens"] == [f"token_id:{token}" for token in choice["token_ids"]]
    assert all(name.startswith("token_id:") for top in choice["logprobs"]["top_logprobs"] for name in top)
    asked = {"messages": USER, "max_tokens": 2, "logprobs": True, "top_logprobs": 1, "return_tokens_as_token_ids": True}
    content = server.post(CHAT, asked).json()["choices"][0]["logprobs"]["content"]
    assert all(one["token"].startswith("token_id:") and one["top_logprobs"] for one in content)


def test_a_prompt_is_cut_on_either_side(server):
    ids = list(range(20, 30))
    for side, kept in ((None, ids[-3:]), ("left", ids[-3:]), ("right", ids[:3])):
        body = {"prompt": ids, "max_tokens": 1, "truncate_prompt_tokens": 3, "return_token_ids": True}
        choice = server.post(COMPLETIONS, body | ({} if side is None else {"truncation_side": side})).json()["choices"][
            0
        ]
        assert choice["prompt_token_ids"] == kept, side
    whole = server.post("/tokenize", {"prompt": "one two three four"}).json()["tokens"]
    asked = {"prompt": "one two three four", "truncate_prompt_tokens": 2, "truncation_side": "right"}
    assert server.post("/tokenize", asked).json()["tokens"] == whole[:2]


@pytest.mark.parametrize("streams", [False, True])
def test_a_chat_echoes_the_assistant_s_own_message(server, streams):
    messages = [*USER, {"role": "assistant", "content": "Well, "}]
    body = {"messages": messages, "max_tokens": 4, "temperature": 0, "stream": streams, "ignore_eos": True}
    body |= {"continue_final_message": True, "add_generation_prompt": False}

    def text(**more):
        answer = server.post(CHAT, body | more)
        if not streams:
            return answer.json()["choices"][0]["message"]["content"]
        return "".join(one["choices"][0]["delta"].get("content") or "" for one in events(answer))

    assert text(echo=True) == "Well, " + text()
    asked = {"messages": USER, "max_tokens": 4, "temperature": 0}
    same = [server.post(CHAT, asked | more).json()["choices"][0]["message"] for more in ({}, {"echo": True})]
    assert same[0] == same[1]


def test_stop_strings_wait_for_min_tokens(server):
    body = {"prompt": "The", "max_tokens": 12, "ignore_eos": True, "temperature": 0}
    text = server.post(COMPLETIONS, body).json()["choices"][0]["text"]
    stop = text.strip()[0]
    early = server.post(COMPLETIONS, body | {"stop": stop}).json()
    late = server.post(COMPLETIONS, body | {"stop": stop, "min_tokens": 6}).json()
    assert early["usage"]["completion_tokens"] < 6 <= late["usage"]["completion_tokens"]
    assert late["choices"][0]["text"].startswith(text[:4])


def test_minus_one_is_the_whole_vocabulary_where_the_operator_allows_it():
    req = CompletionRequest(prompt="x", logprobs=-1, prompt_logprobs=-1)
    limits = EngineInfo(64, 64, 50)
    made = sampling_params(req, ServerConfig(max_logprobs=-1), limits, max_tokens=4, logprobs=req.logprobs)
    assert (made.logprobs, made.prompt_logprobs) == (50, 50)
    for config in (ServerConfig(), ServerConfig(max_logprobs=49)):
        with pytest.raises(ApiError, match="--max-logprobs -1 allows"):
            sampling_params(req, config, limits, max_tokens=4, logprobs=req.logprobs)


def test_the_server_tells_of_itself(server):
    info = server.client.get("/server_info").json()
    assert info["server"]["max_num_queued_requests"] == 300 and info["engines"][0]["max_model_len"] == 512
    assert info["has_api_keys"] and "test-key" not in json.dumps(info) and "api_keys" not in info["server"]
    told = server.client.get("/tokenizer_info").json()
    assert "messages" in told["chat_template"] and told["special_tokens"] and told["vocab_size"] > 1000
    assert server.client.get("/load").json() == {"server_load": 0}
    for path in ("/load", "/server_info", "/tokenizer_info"):
        assert server.client.get(path, headers={"Authorization": "Bearer wrong"}).status_code == 401


def test_an_invocation_is_what_its_body_holds(server):
    text = server.post("/invocations", {"prompt": "The", "max_tokens": 3}).json()
    chat = server.post("/invocations", {"messages": USER, "max_tokens": 3}).json()
    assert (text["object"], chat["object"]) == ("text_completion", "chat.completion")
    assert len(events(server.post("/invocations", {"prompt": "The", "max_tokens": 3, "stream": True}))) > 0


def test_the_load_comes_as_a_header_where_it_is_asked_for(server):
    def header(kind):
        asked = {"endpoint-load-metrics-format": kind}
        return server.client.post(COMPLETIONS, json={"prompt": "a", "max_tokens": 1}, headers=asked).headers.get(
            "endpoint-load-metrics"
        )

    assert header("TEXT").startswith("TEXT named_metrics.kv_cache_usage_perc=")
    kind, _, body = header("json").partition(" ")
    assert kind == "JSON" and set(json.loads(body)["named_metrics"]) == {"kv_cache_usage_perc", "num_requests_waiting"}
    assert header("xml") is None


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/audio/speech", "/rerank", "/v1/score", "/pooling"])
def test_what_other_models_make_is_said(server, path):
    answer = server.post(path, {})
    assert answer.status_code == 404 and "not made by this server" in answer.json()["error"]["message"]
