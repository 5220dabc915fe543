"""`kvarena.LLM` beside the server: the same tokens, texts, reasons and refusals, without HTTP."""

import asyncio
import subprocess
import sys

import pytest
from server_harness import ROOT

import kvarena
from kvarena import LLM, SamplingParams
from kvarena.allocators.paged import PagedAllocator

PROMPT = "The engine keeps"
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say é ☕ and more."}]
CASES = {
    "defaults": {"seed": 1},
    "greedy": {"temperature": 0, "max_tokens": 24},
    "drawn": {"temperature": 0.9, "top_p": 0.9, "top_k": 50, "min_p": 0.01, "seed": 7, "max_tokens": 24},
    "samples": {"n": 3, "seed": 5, "max_tokens": 12},
    "stops": {"temperature": 0, "max_tokens": 60, "stop": ["e", "the "]},
    "kept stop": {"temperature": 0, "max_tokens": 60, "stop": "a", "include_stop_str_in_output": True, "min_tokens": 5},
    "penalties": {"temperature": 0, "max_tokens": 24, "presence_penalty": 1.0, "frequency_penalty": 0.5,
                  "repetition_penalty": 1.2, "logit_bias": {300: 2.0, 301: -5}},
    "goes on": {"temperature": 0, "max_tokens": 40, "ignore_eos": True, "skip_special_tokens": False},
    "beams": {"use_beam_search": True, "n": 2, "best_of": 3, "length_penalty": 0.5, "max_tokens": 12, "logprobs": 1},
    "scores": {"temperature": 0, "max_tokens": 6, "logprobs": 2, "prompt_logprobs": 1},
}  # fmt: skip


@pytest.fixture(scope="module")
def llm():
    return LLM("models/demo", max_model_len=512, num_gpu_blocks_override=128)


def served(server, path: str, params: dict, **body):
    if "logit_bias" in params:
        params = params | {"logit_bias": {str(token): bias for token, bias in params["logit_bias"].items()}}
    answer = server.post(path, body | params | {"return_token_ids": True})
    assert answer.status_code == 200, answer.text
    return answer.json()


def same(output, answer: dict, text_of) -> None:
    assert [one.text for one in output.outputs] == [text_of(choice) for choice in answer["choices"]]
    for one, choice in zip(output.outputs, answer["choices"], strict=True):
        assert one.token_ids == choice["token_ids"]
        assert (one.finish_reason, one.stop_reason) == (choice["finish_reason"], choice["stop_reason"])


@pytest.mark.parametrize("name", CASES)
def test_completions_are_those_of_the_server(server, llm, name):
    prompts = [PROMPT, "Blocks, tokens and"]
    outputs = llm.generate(prompts, SamplingParams(**CASES[name]))
    for prompt, output in zip(prompts, outputs, strict=True):
        answer = served(server, "/v1/completions", CASES[name], prompt=prompt)
        same(output, answer, lambda choice: choice["text"])
        assert output.prompt == prompt and output.prompt_token_ids == answer["choices"][0]["prompt_token_ids"]
        if name == "scores":
            lists, ours = answer["choices"][0]["logprobs"], output.outputs[0].logprobs
            chosen = [of[token].logprob for token, of in zip(output.outputs[0].token_ids, ours, strict=True)]
            assert chosen == pytest.approx(lists["token_logprobs"], abs=1e-4)
            assert output.outputs[0].cumulative_logprob == pytest.approx(sum(chosen))
            theirs = answer["choices"][0]["prompt_logprobs"]
            assert len(theirs) == len(output.prompt_logprobs) and output.prompt_logprobs[0] is theirs[0] is None
            for mine, row in zip(output.prompt_logprobs[1:], theirs[1:], strict=True):
                assert {str(token): (one.rank, one.decoded_token) for token, one in mine.items()} == {
                    token: (one["rank"], one["decoded_token"]) for token, one in row.items()
                }


@pytest.mark.parametrize("name", ["greedy", "drawn", "stops", "samples"])
def test_chats_are_those_of_the_server(server, llm, name):
    [output] = llm.chat(MESSAGES, SamplingParams(**CASES[name]))
    answer = served(server, "/v1/chat/completions", CASES[name], messages=MESSAGES)
    same(output, answer, lambda choice: choice["message"]["content"])
    assert output.prompt_token_ids == answer["prompt_token_ids"] and output.prompt is None


def test_a_chat_may_take_the_rest_of_the_context_as_on_the_server(server, llm):
    greedy = {"temperature": 0, "ignore_eos": True}
    going_on = [*MESSAGES, {"role": "assistant", "content": "It is"}]
    first, second = llm.chat([MESSAGES, going_on[:2]], SamplingParams(**greedy))
    assert first.outputs[0].token_ids == second.outputs[0].token_ids
    assert len(first.prompt_token_ids) + len(first.outputs[0].token_ids) == 512
    [output] = llm.chat(going_on, SamplingParams(temperature=0, max_tokens=8), continue_final_message=True)
    answer = served(server, "/v1/chat/completions", {"temperature": 0, "max_tokens": 8}, messages=going_on,
                    continue_final_message=True)  # fmt: skip
    same(output, answer, lambda choice: choice["message"]["content"])


def test_prompts_in_every_form(llm):
    greedy = SamplingParams(temperature=0, max_tokens=5)
    [text] = llm.generate(PROMPT, greedy)
    ids = text.prompt_token_ids
    forms = [ids, [ids], [{"prompt": PROMPT}], {"prompt_token_ids": ids}, [PROMPT]]
    found = [llm.generate(form, greedy) for form in forms]
    assert all(one.outputs[0].token_ids == text.outputs[0].token_ids for [one] in found)
    mixed = llm.generate([PROMPT, PROMPT], [greedy, SamplingParams(temperature=0, max_tokens=2)])
    assert [len(one.outputs[0].token_ids) for one in mixed] == [5, 2]
    assert mixed[1].request_id != mixed[0].request_id and mixed[1].prompt == PROMPT
    assert llm.generate([]) == []


def test_several_engines_are_a_servers_business():
    with pytest.raises(kvarena.KvarenaError, match=r"one engine: leave router\.num_replicas=3 out"):
        kvarena.LLM("models/demo", router="least_kv", overrides=["router.num_replicas=3"])


@pytest.mark.parametrize(
    ("body", "params"),
    [
        ({"prompt": [1] * 600}, {"max_tokens": 2}),
        ({"prompt": PROMPT}, {"max_tokens": 600}),
        ({"prompt": [999999]}, {}),
        ({"prompt": ""}, {}),
        ({"prompt": PROMPT}, {"logprobs": 500}),
        ({"prompt": PROMPT}, {"n": 500}),
        ({"prompt": PROMPT}, {"stop": [""]}),
        ({"prompt": PROMPT}, {"stop_token_ids": [10**6]}),
    ],
)
def test_what_the_server_refuses_is_an_error_with_its_words(server, llm, body, params):
    answer = server.post("/v1/completions", body | params)
    assert answer.status_code == 400
    with pytest.raises(kvarena.KvarenaError) as caught:
        llm.generate([PROMPT, body["prompt"]], SamplingParams(**params))
    assert str(caught.value) == answer.json()["error"]["message"]
    assert not llm._engine.has_work


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: SamplingParams(temperature=-1), "temperature"),
        (lambda: SamplingParams(max_tokens=0), "max_tokens"),
        (lambda: LLM("/nowhere"), "/nowhere"),
        (lambda: LLM(dtype="int3"), "dtype"),
        (lambda: LLM(tensor_parallel_size=3), "tensor_parallel_size=3 does not divide the 4 attention heads"),
        (lambda: LLM(max_modle_len=3), "max_modle_len"),
        (lambda: LLM(allocator="nope"), "allocator=nope: there is no such choice"),
        (lambda: LLM(runner="simulated"), "computes no tokens"),
    ],
)
def test_a_mistake_is_a_line(make, line):
    with pytest.raises(kvarena.KvarenaError) as caught:
        make()
    assert line in str(caught.value) and "\n" not in str(caught.value)


def test_an_interrupted_call_leaves_nothing_behind_and_loops_do_not_matter(llm, monkeypatch):
    greedy = SamplingParams(temperature=0, max_tokens=20)
    [before] = llm.generate(PROMPT, greedy)
    step, steps = llm._engine.step, iter(range(4))

    def interrupted():
        if next(steps) == 3:
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(llm._engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([PROMPT, "Other"], greedy)
    monkeypatch.undo()

    async def in_a_notebook():
        return llm.generate(PROMPT, greedy)

    [after] = asyncio.run(in_a_notebook())
    assert after.outputs == before.outputs
    usage = llm._engine.allocator.count()
    assert usage.free + usage.cached == 128 * 16


class OwnAllocator(PagedAllocator):
    """A caller's own."""


def test_any_strategy_gives_the_same_texts(llm):
    greedy = SamplingParams(temperature=0, max_tokens=12)
    own = LLM(allocator=OwnAllocator, scheduler="continuous", max_model_len=512, engine={"overlap": False})
    assert type(own._engine.allocator) is OwnAllocator
    assert own.generate(PROMPT, greedy)[0].outputs == llm.generate(PROMPT, greedy)[0].outputs


TWO_NAMES = """
import os, sys
import kvarena
import kvarena.engine.server.processes.front, kvarena.experiments.cli
old = {"allocator._target_": "allocators.contiguous.ContiguousAllocator"}
kvarena.run("contiguous", workload="fixed", report={"pages": False}, driver={"probe": False, "warmup": False},
            **old | {"workload.num_requests": 1, "workload.prompt_len": 8, "workload.output_len": 2})
kvarena.LLM(max_model_len=64).generate("The", kvarena.SamplingParams(max_tokens=2))
files = {}
for name, module in list(sys.modules.items()):
    if name != "__main__" and getattr(module, "__file__", None):
        files.setdefault(os.path.realpath(module.__file__), set()).add(module.__name__)
rooms = tuple(os.path.join(sys.argv[1], room, "") for room in sys.argv[2:])  # an environment may lie in the checkout
ours = {file: names for file, names in files.items() if file.startswith(rooms)}
assert len(ours) > 80, len(ours)
print({file: names for file, names in ours.items() if len(names) > 1} or "one name each")
"""


@pytest.mark.slow  # an interpreter of its own; test_import_rule.py reads every import in `make test`
def test_no_module_is_loaded_under_two_names(tmp_path):
    rooms = ["kvarena", *sorted(link.name for link in (ROOT / "kvarena").iterdir() if link.is_symlink())]
    command = [sys.executable, "-c", TWO_NAMES, str(ROOT), *rooms]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert run.stdout.splitlines()[-1:] == ["one name each"], run.stdout + run.stderr


def test_two_ranks_give_the_same_texts(llm):
    """Ranks that are threads here, as the settings say; with vLLM's names for the sizes."""
    shared = LLM(tensor_parallel_size=2, pipeline_parallel_size=2, parallel={"executor": "threads"}, max_model_len=512)
    params = [
        SamplingParams(temperature=0, max_tokens=8),
        SamplingParams(temperature=0.8, seed=1, max_tokens=8, top_p=0.9),
    ]
    prompts = [PROMPT, "Once upon a time"]
    found, wanted = (one.generate(prompts, params) for one in (shared, llm))
    assert [one.outputs[0].text for one in found] == [one.outputs[0].text for one in wanted]
    shared._engine.runner.outbox.close()
