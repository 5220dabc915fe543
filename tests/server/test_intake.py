"""What the engine's loop takes in between two steps is bounded; grammars are compiled elsewhere, once."""

from __future__ import annotations

import itertools
import threading
import time
from dataclasses import fields

import numpy as np
import pytest
from transformers import AutoTokenizer
from waiting import PATIENCE, wait_for

from kvarena.engine.errors import RequestError
from kvarena.engine.request import ImageSpan, SamplingParams
from kvarena.engine.server.engine import intake as intake_module
from kvarena.engine.server.engine.compiled import make_compiler
from kvarena.engine.server.engine.grammars import to_grammar
from kvarena.engine.server.engine.intake import ROUND_SECONDS, Intake
from kvarena.engine.server.processes.process import freeze_heap
from kvarena.engine.server.shared.ipc import AddFrame, EngineInfo, FrameDecoder, ToEngine, encode, pack_ids, pack_image
from kvarena.experiments.serving.stub_engine import StubOptions, build
from kvarena.experiments.serving.words import in_flags

HANDLES = itertools.count(1)


@pytest.fixture(scope="module")
def compiler():
    tokenizer = AutoTokenizer.from_pretrained("experiments/models/demo")
    return make_compiler(tokenizer, len(tokenizer), frozenset({tokenizer.eos_token_id}))


class Compiles:
    """Counts, and waits for `go`."""

    def __init__(self, compiler):
        self.compiler, self.threads, self.go = compiler, [], threading.Event()
        self.go.set()

    def __call__(self, kind, grammar):
        self.threads.append(threading.current_thread())
        assert self.go.wait(PATIENCE)
        return self.compiler(kind, grammar)


@pytest.fixture
def compiles(compiler):
    return Compiles(compiler)


@pytest.fixture
def intake(compiles):
    served = build(StubOptions(2048))
    object.__setattr__(served, "compile_grammar", compiles)
    return Intake(served, 2, 100_000)


def constraint(key="k", text="[a-z]{1,9}", seconds=0.0):
    return [ToEngine.CONSTRAINT, key, "regex", to_grammar("regex", text), seconds]


def add(key="k", n=1, handle=None):
    first = next(HANDLES) * 1000 if handle is None else handle
    sampling = SamplingParams(n=n, max_tokens=4)
    return [
        ToEngine.ADD,
        *AddFrame(first, f"r{first}", pack_ids([5]), sampling, time.monotonic(), 0, "", "", key),
    ]


def wait_rounds(intake, condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        intake.grammars.bell.setblocking(True)
        intake.grammars.bell.settimeout(PATIENCE)
        assert intake.grammars.bell.recv(1, 2)  # MSG_PEEK
        intake.grammars.bell.setblocking(False)
        intake.unpark()
        intake.run_round(60)


def test_a_grammar_is_compiled_once_for_all_prompts_and_choices_and_not_by_the_loop(intake, compiles):
    intake.receive(0, [constraint(), *(add(n=4) for _ in range(50))])
    intake.receive(1, [constraint(), add()])
    intake.run_round(60)
    wait_rounds(intake, lambda: len(intake.requests) == 201)
    assert len(compiles.threads) == 1
    assert threading.current_thread() not in compiles.threads
    matchers = {req.constraint for req in intake.requests.values()}
    assert len(matchers) == 201  # each follows its own text
    assert sum(len(out.admitted) for out in intake.outs) == 51
    assert all(not reason for out in intake.outs for _, reason, _ in out.admitted)


def test_a_round_costs_a_bounded_time_however_much_has_arrived(intake):
    """1,024 prompts with 16 choices each, all at once: the loop steps between them, and a short request of the other
    front is taken in by the first round."""
    intake.receive(0, [constraint()])
    intake.run_round()
    wait_rounds(intake, lambda: intake.grammars.get("k") is not None)
    intake.receive(0, [add(n=16) for _ in range(1024)])
    intake.receive(1, [add(key=None)])
    costs = []
    freeze_heap()  # as the engine's process does: a pass of the garbage collector over the libraries is no round's cost
    while intake.has_backlog:
        start = time.thread_time()
        intake.run_round()
        costs.append(time.thread_time() - start)
        assert len(intake.outs[1].admitted) == 1
    assert len(intake.requests) == 1024 * 16 + 1
    assert len(costs) > 5
    assert max(costs) < 0.2
    assert sorted(costs)[len(costs) // 2] < 2 * ROUND_SECONDS


def test_slow_grammars_hold_up_no_quick_one(intake, compiles):
    compiles.go.clear()
    for i in range(6):
        intake.receive(0, [constraint(f"slow{i}", "a" * (i + 1), 0.9), add(f"slow{i}")])
    intake.run_round(60)
    wait_for(lambda: compiles.threads, "nothing is compiled")
    intake.grammars._compile = compiles.compiler  # of what begins from now on: the slow one waits for `go`
    intake.receive(1, [constraint("quick", "b", 0.001), add("quick")])
    intake.run_round(60)
    wait_rounds(intake, lambda: len(intake.outs[1].admitted) == 1)
    assert not intake.outs[0].admitted
    compiles.go.set()
    wait_rounds(intake, lambda: len(intake.outs[0].admitted) == 6)


def test_who_left_leaves_nothing(intake, compiles):
    compiles.go.clear()
    intake.receive(
        0, [constraint("a", "a", 0.5), add("a", handle=7), constraint("b", "b", 0.5), add("b", n=2, handle=8)]
    )
    intake.run_round(60)
    intake.receive(0, [[ToEngine.ABORT, [8, 9], False]])
    intake.run_round(60)
    assert not intake.grammars.is_under_way("b")  # had not begun: the other one holds the thread
    compiles.go.set()
    wait_rounds(intake, lambda: len(intake.outs[0].admitted) == 1)
    assert [handle for _, handle in intake.requests] == [7]
    # After the grammar is there and before the request is taken in.
    compiles.go.clear()
    intake.receive(0, [constraint("c", "c"), add("c", handle=20)])
    intake.run_round(60)
    intake.receive(0, [[ToEngine.ABORT, [20], False]])
    compiles.go.set()
    wait_rounds(intake, lambda: intake.grammars.get("c") is not None)
    assert [handle for _, handle in intake.requests] == [7]
    intake.drop_front(0)
    assert not intake.requests
    assert intake.num_parked == 0


def test_what_cannot_be_compiled_here_ends_its_requests_alone(intake, compiles):
    def fails(kind, grammar):
        raise RequestError("no") if len(grammar) % 2 else SystemError("a panic")

    intake.grammars._compile = fails
    intake.receive(0, [constraint("a", "a"), add("a"), constraint("b", "bb"), add("b")])
    intake.run_round(60)
    wait_rounds(intake, lambda: len(intake.outs[0].admitted) == 2)
    assert {reason for _, reason, _ in intake.outs[0].admitted} == {"invalid"}
    intake.receive(0, [add("gone")])
    intake.run_round(60)
    assert intake.outs[0].admitted[-1][1] == "constraint_lost"
    assert not intake.requests


def test_an_automaton_that_failed_is_built_anew(intake, compiles):
    intake.receive(0, [constraint(), add()])
    intake.run_round(60)
    wait_rounds(intake, lambda: len(intake.requests) == 1)
    intake.grammars.get("k").has_failed = True
    intake.receive(0, [constraint(), add()])
    intake.run_round(60)
    wait_rounds(intake, lambda: len(intake.requests) == 2)
    assert len(compiles.threads) == 2


def test_a_refusal_speaks_the_words_of_the_command(intake):
    """What the scheduler says names keys; whoever started the server with flags reads flags."""
    object.__setattr__(intake._served, "words", in_flags)
    message = add(key=None)
    prompt = pack_ids([5] * 8192)
    intake.receive(0, [[*message[:3], prompt, *message[4:]]])
    intake.run_round()
    [(_, reason, text)] = intake.outs[0].admitted
    assert reason == "max_model_len"
    assert "is over --max-model-len 8192" in text


def test_sampling_parameters_arrive_as_they_were_made(monkeypatch):
    """Checked where they are made, not again where they arrive; every field, in its own type."""
    monkeypatch.setattr(SamplingParams, "__post_init__", lambda self: None)  # not all of them go together
    made = SamplingParams(
        temperature=0.5, top_p=0.25, top_k=3, min_p=0.125, seed=2**63 - 1, max_tokens=9, min_tokens=2,
        stop_token_ids=(5, 7), ignore_eos=True, presence_penalty=1.0, frequency_penalty=-1.0, repetition_penalty=1.5,
        logit_bias={3: -100.0, 11: 2.5}, logprobs=4, prompt_logprobs=0, n=6,
        allowed_token_ids=(1, 2), barred=((3,), (4, 5)), logprob_token_ids=(8,),
        beams=2, length_penalty=0.5, early_stopping="never",
    )  # fmt: skip
    assert all(getattr(made, one.name) != getattr(SamplingParams(), one.name) for one in fields(SamplingParams))
    info = EngineInfo(64, 32, 10, (1, 2), facts={"a": "b"}, defaults={"top_p": 0.5})
    data = encode((ToEngine.ADD, *AddFrame(1, "r", pack_ids([5]), made, 0.0, 0, "", "", None))) + encode([info])
    monkeypatch.setattr(SamplingParams, "__post_init__", None)
    message, [told] = FrameDecoder().feed(data)
    arrived = AddFrame(*message[1:])
    assert arrived.sampling == made and type(arrived.sampling.stop_token_ids) is tuple
    assert told == info and type(told.eos_token_ids) is tuple


def test_tiles_of_requests_that_have_not_ended_are_bounded(intake, monkeypatch):
    """A preempted request may need its pixels again, so they stay; a crowd of albums must not fill the memory."""
    monkeypatch.setattr(intake_module, "MAX_IMAGE_BYTES", 1000)
    tile = np.zeros((1, 3, 8, 8), dtype=np.uint8)  # 192 bytes
    album = [pack_image(ImageSpan(0, 1, 1 << 256, 1, tile)), pack_image(ImageSpan(1, 2, 1 << 256, 1, tile))]

    def ask(handle, n=1):
        sampling = SamplingParams(n=n, max_tokens=4)
        prompt = pack_ids([5, 5, 6])
        frame = AddFrame(handle, f"i{handle}", prompt, sampling, time.monotonic(), 0, "", "", None, images=album)
        intake.receive(0, FrameDecoder().feed(encode([ToEngine.ADD, *frame])))
        intake.run_round(60)
        return intake.outs[0].admitted[-1][1]

    assert [ask(1), ask(2), ask(3)] == ["", "", "images_full"]
    [first, second] = intake.requests.values()
    assert first.images[0].pixels.shape == tile.shape and first.images[0].identity == 1 << 256
    intake.receive(0, [[ToEngine.ABORT, [1], False]])
    intake.run_round(60)
    assert ask(4) == ""
    intake.forget(second)
    intake.forget(second)  # once is enough
    assert [ask(5), ask(6)] == ["", "images_full"]
    intake.drop_front(0)
    assert not intake.requests and ask(7, n=2) == "" and ask(8) == "images_full"
