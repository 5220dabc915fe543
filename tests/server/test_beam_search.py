"""Beam search over HTTP, held against transformers on the demo model's weights in float32."""

import asyncio

import httpx
import pytest
import torch
from server_harness import PATIENCE
from test_bad_requests import CHAT, COMPLETIONS, TOOL, assert_error
from transformers import AutoModelForCausalLM

from kvarena.engine.checkpoints.directory import resolve_directory

PROMPT = list(range(300, 321))
USER = [{"role": "user", "content": "Hello!"}]


@pytest.fixture(scope="module")
def module():
    directory = resolve_directory("models/demo")
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.mark.parametrize(("width", "penalty", "early"), [(2, 1.0, False), (4, 0.0, True), (6, 2.0, "never")])
def test_texts_and_scores_are_those_of_transformers(server, module, width, penalty, early):
    stops = [2, 13, 200, 262]  # the end of the text, and some that come often
    ids = torch.tensor([PROMPT])
    wanted = module.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, num_beams=width,
        num_return_sequences=width, length_penalty=penalty, early_stopping=early, eos_token_id=stops, pad_token_id=0,
        return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    body = {
        "prompt": PROMPT, "max_tokens": 12, "use_beam_search": True, "n": width, "length_penalty": penalty,
        "early_stopping": early, "stop_token_ids": stops, "logprobs": 1, "return_token_ids": True,
    }  # fmt: skip
    answer = server.post(COMPLETIONS, body).json()
    scores = []
    for choice, row in zip(answer["choices"], wanted.sequences[:, len(PROMPT) :].tolist(), strict=True):
        tokens = choice["token_ids"]
        assert tokens == row[: len(tokens)]
        assert set(row[len(tokens) :]) <= {0, stops[0]}  # what it is padded with
        assert (choice["finish_reason"] == "stop") == (tokens[-1] in stops)
        parts = choice["logprobs"]["token_logprobs"]
        assert len(parts) == len(tokens)
        scores.append(sum(parts) / len(tokens) ** penalty)
    assert scores == pytest.approx(wanted.sequences_scores.tolist(), abs=1e-4)
    assert answer["usage"]["completion_tokens"] == sum(len(choice["token_ids"]) for choice in answer["choices"])


def test_the_best_of_more_beams_are_the_answer(server):
    body = {"prompt": PROMPT, "max_tokens": 8, "use_beam_search": True, "ignore_eos": True, "temperature": 0}
    whole = server.post(COMPLETIONS, body | {"n": 4}).json()["choices"]
    assert len({choice["text"] for choice in whole}) > 1
    some = server.post(COMPLETIONS, body | {"n": 2, "best_of": 4}).json()
    assert [choice["text"] for choice in some["choices"]] == [choice["text"] for choice in whole[:2]]
    assert some["usage"]["completion_tokens"] == 16
    # Several prompts; what only drawing needs says nothing, as in vLLM.
    drawn = {"temperature": 0.7, "top_p": 0.5, "top_k": 3, "seed": 1}
    many = server.post(COMPLETIONS, body | drawn | {"prompt": [PROMPT] * 2, "n": 4}).json()["choices"]
    assert [choice["text"] for choice in many] == [choice["text"] for choice in whole] * 2
    server.wait_idle()


def test_a_prompts_own_scores_come_with_beams(server):
    body = {"prompt": PROMPT, "max_tokens": 3, "temperature": 0, "echo": True, "logprobs": 1}
    [alone] = server.post(COMPLETIONS, body).json()["choices"]
    for choice in server.post(COMPLETIONS, body | {"use_beam_search": True, "n": 3}).json()["choices"]:
        scores = choice["logprobs"]["token_logprobs"]
        assert len(scores) == len(PROMPT) + 3
        assert scores[1 : len(PROMPT)] == pytest.approx(alone["logprobs"]["token_logprobs"][1 : len(PROMPT)], abs=1e-4)
        assert choice["text"].startswith(alone["text"][:10])


def test_chats_search_beams(server):
    body = {"messages": USER, "max_tokens": 8, "use_beam_search": True, "n": 2}
    answer = server.post(CHAT, body | {"logprobs": True, "top_logprobs": 2}).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    first, second = (choice["logprobs"]["content"] for choice in answer["choices"])
    assert all(len(entry["top_logprobs"]) == 2 for entry in first)

    def score(entries):
        return sum(entry["logprob"] for entry in entries) / len(entries)

    assert score(first) >= score(second)


@pytest.mark.parametrize(
    ("path", "more", "named"),
    [
        (COMPLETIONS, {"stream": True}, "stream"),
        (COMPLETIONS, {"stop": ["x"]}, "stop"),
        (COMPLETIONS, {"n": 4, "best_of": 2}, "best_of"),
        (COMPLETIONS, {"allowed_token_ids": [5]}, "allowed_token_ids"),
        (COMPLETIONS, {"bad_words": ["x"]}, "bad_words"),
        (COMPLETIONS, {"logprobs": 1, "logprob_token_ids": [5]}, "logprob_token_ids"),
        (COMPLETIONS, {"structured_outputs": {"regex": "a+"}}, "use_beam_search"),
        (COMPLETIONS, {"best_of": 1000}, "best_of"),
        (COMPLETIONS, {"early_stopping": "later"}, "early_stopping"),
        (COMPLETIONS, {"length_penalty": 1000}, "length_penalty"),
        (CHAT, {"stream": True}, "stream"),
        (CHAT, {"tools": [TOOL], "tool_choice": "required"}, "use_beam_search"),
    ],
)
def test_what_does_not_go_with_beams_is_named(server, path, more, named):
    asked = {"prompt": "The"} if path == COMPLETIONS else {"messages": USER}
    error = assert_error(server.post(path, asked | {"max_tokens": 4, "use_beam_search": True} | more), 400)
    assert named in error["param"]


@pytest.mark.parametrize(("name", "value"), [("best_of", 4), ("length_penalty", 0.5), ("early_stopping", True)])
def test_what_is_a_searchs_is_nothing_without_one(server, name, value):
    assert assert_error(server.post(COMPLETIONS, {"prompt": "The", "max_tokens": 4, name: value}), 400)["param"] == name


def test_beams_that_can_never_fit_are_refused(server):
    # 2,048 slots, and in the worst case six beams of 508 tokens that share nothing but their prompt.
    body = {"prompt": PROMPT, "max_tokens": 480, "use_beam_search": True, "n": 6}
    assert "6 beams" in assert_error(server.post(COMPLETIONS, body), 400)["message"]
    server.assert_alive()


def test_a_client_that_leaves_takes_its_beams_along(server):
    """Beams that nobody waits for own no slot: hidden ones (best_of) as little as those that were asked for."""

    async def leave() -> None:
        async with httpx.AsyncClient(base_url=str(server.client.base_url)) as client:
            body = {
                "prompt": PROMPT,
                "max_tokens": 300,
                "use_beam_search": True,
                "n": 2,
                "best_of": 4,
                "ignore_eos": True,
            }
            asked = asyncio.create_task(client.post(COMPLETIONS, json=body | {"ignore_eos": True}, timeout=PATIENCE))
            end = asyncio.get_running_loop().time() + PATIENCE
            while not asked.done() and server.metrics()["vllm:num_requests_running"] < 4:
                assert asyncio.get_running_loop().time() < end
                await asyncio.sleep(0.01)
            asked.cancel()

    asyncio.run(leave())
    server.wait_idle()
