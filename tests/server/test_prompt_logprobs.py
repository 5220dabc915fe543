"""Log-probabilities of prompts, for each of several choices that share one prompt."""

from __future__ import annotations

import pytest
from test_bad_requests import CHAT, COMPLETIONS

IDS = [(i * 37) % 1900 + 20 for i in range(300)]  # more than one step computes
SAMPLED = {"temperature": 1.0, "seed": 3, "max_tokens": 2}


@pytest.mark.parametrize("n", (1, 3))
def test_every_choice_has_those_of_its_prompt(server, n):
    answer = server.post(COMPLETIONS, SAMPLED | {"prompt": [IDS, IDS[:7]], "n": n, "prompt_logprobs": 2}).json()
    rows = [choice["prompt_logprobs"] for choice in answer["choices"]]
    assert [len(row) for row in rows] == [300] * n + [7] * n
    assert all(row == rows[0] for row in rows[:n])
    echoed = server.post(COMPLETIONS, SAMPLED | {"prompt": IDS, "n": n, "echo": True, "logprobs": 2}).json()
    for choice in echoed["choices"]:
        logprobs = choice["logprobs"]["token_logprobs"]
        assert logprobs[0] is None
        for position in range(1, 300):
            expected = rows[0][position][str(IDS[position])]["logprob"]
            assert logprobs[position] == pytest.approx(expected, abs=1e-4)


def test_an_echo_and_the_prompt_s_own_are_each_as_many_as_was_asked(server):
    body = {"prompt": IDS[:9], "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1}
    [one] = server.post(COMPLETIONS, body | {"prompt_logprobs": 3}).json()["choices"]
    assert [len(top or ()) in (1, 2) for top in one["logprobs"]["top_logprobs"]] == [False] + [True] * 9
    assert all(len(row) in (3, 4) for row in one["prompt_logprobs"][1:]) and len(one["prompt_logprobs"]) == 9
    [without] = server.post(COMPLETIONS, body).json()["choices"]
    assert without["logprobs"] == one["logprobs"] and without["prompt_logprobs"] is None


def test_of_a_chat_with_several_choices(server):
    body = {"messages": [{"role": "user", "content": "word " * 200}], "n": 3, "prompt_logprobs": 1}
    answer = server.post(CHAT, SAMPLED | body).json()
    assert len(answer["prompt_logprobs"]) == answer["usage"]["prompt_tokens"]
    server.assert_alive()
