"""Beam search gives transformers' texts and scores, whatever forks, copies, preempts or waits for it."""

import pytest
import torch
from checkpoints import random_prompts, write_checkpoint
from transformers import AutoModelForCausalLM

from kvarena.engine.beams import BeamSearch
from kvarena.engine.clock import VirtualClock
from kvarena.engine.core import run_to_completion
from kvarena.engine.errors import EngineError, NotDefined, RequestError, RequestRejected
from kvarena.engine.ledger import MemoryLedger
from kvarena.engine.model_runner import TokenLogprobs
from kvarena.engine.models import load_model
from kvarena.engine.pool.kv_pool import KVPool
from kvarena.engine.request import FinishReason, Request, SamplingParams, expand
from kvarena.engine.runner.torch_runner import TorchRunner
from kvarena.experiments.correctness.oracle import OracleRunner
from kvarena.experiments.settings.strategies import Strategy, build_allocator, build_scheduler

PROMPTS = random_prompts((13, 5, 1))
NUM_TOKENS = 11
END = (7, 19, 33, 50, 77, 91, 104)  # of a random model a single one would hardly come
SIZE = 4
# width, length penalty, early stopping
SEARCHES = ((2, 1.0, False), (4, 0.0, True), (6, 2.0, "never"), (4, -0.7, False), (2, 0.6, True))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def model(directory):
    return load_model(directory)


@pytest.fixture(scope="module")
def wanted(directory):
    """Texts and scores of each prompt and search."""
    module = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    return {(prompt, search): reference(module, prompt, search) for prompt in PROMPTS for search in SEARCHES}


def reference(module, prompt, search):
    width, penalty, early = search
    ids = torch.tensor([prompt])
    found = module.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_TOKENS, do_sample=False, num_beams=width,
        num_return_sequences=width, length_penalty=penalty, early_stopping=early, eos_token_id=list(END),
        pad_token_id=0, return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    texts = []
    for row in found.sequences[:, len(prompt) :].tolist():
        ends = [i for i, token in enumerate(row) if token in END]
        texts.append(row[: ends[0] + 1] if ends else row)
    return texts, found.sequences_scores.tolist()


def beams(prompt, search, name="r", **sampling):
    width, penalty, early = search
    params = SamplingParams(
        max_tokens=NUM_TOKENS, beams=width, length_penalty=penalty, early_stopping=early, **sampling
    )
    return expand(Request(name, list(prompt), params, eos_token_ids=frozenset(END)))


def make_engine(model, allocator, scheduler, *, num_blocks, overlap=False, options=None, **more):
    options = {"swap_blocks": 100 if more.get("preemption") == "swap" else 0} | (options or {})
    pool = build_allocator(allocator, num_blocks=num_blocks, block_size=SIZE, max_model_len=64, **options)
    policy = build_scheduler(scheduler, pool, max_model_len=64, **{"max_num_seqs": 40, "watermark": 0.0} | more)
    spec = model.spec
    memory = KVPool(
        num_blocks=num_blocks, block_size=SIZE, num_layers=spec.num_layers, num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim, dtype=spec.dtype, device=model.device, num_swap_blocks=pool.num_host_blocks,
    )  # fmt: skip
    engine = Strategy(pool, policy).engine(TorchRunner(model, memory), VirtualClock(), overlap=overlap)
    engine.ledger = MemoryLedger()
    return engine


def check(engine, wanted, requests):
    """All at once: the texts, their scores, and a pool that is whole."""
    outputs = run_to_completion(engine, [req for of in requests.values() for req in of])
    for (prompt, search), of in requests.items():
        texts, scores = wanted[prompt, search]
        assert [req.output_token_ids for req in of] == texts
        assert [text.score for text in of[0].search.winners] == pytest.approx(scores, abs=2e-5, rel=2e-5)
        for req in of:
            stopped = req.output_token_ids[-1] in END
            assert req.finish_reason is (FinishReason.STOP if stopped else FinishReason.LENGTH)
    usage = engine.allocator.usage()
    assert usage.owned == usage.shared_saved == 0
    assert usage.free + usage.cached == usage.total
    engine.ledger.settle()
    return outputs


ROOMY, TIGHT = 400, 27
WAYS = [
    pytest.param("paged", "continuous", False, ROOMY, "recompute", id="paged"),
    pytest.param("paged", "chunked", True, TIGHT, "recompute", id="paged-tight-overlap"),
    pytest.param("paged", "continuous", False, TIGHT, "swap", id="paged-swap"),
    pytest.param("paged_prefix", "chunked", True, ROOMY, "recompute", id="prefix-overlap"),
    pytest.param("paged_prefix", "continuous", False, TIGHT, "swap", id="prefix-swap"),
    pytest.param("radix", "fair", False, TIGHT, "recompute", id="radix-tight"),
    pytest.param("radix", "continuous", True, TIGHT, "swap", id="radix-swap-overlap"),
]


@pytest.mark.parametrize(("allocator", "scheduler", "overlap", "num_blocks", "preemption"), WAYS)
def test_texts_and_scores_are_those_of_transformers(
    model, wanted, allocator, scheduler, overlap, num_blocks, preemption
):
    engine = make_engine(model, allocator, scheduler, num_blocks=num_blocks, overlap=overlap, preemption=preemption)
    requests = {key: beams(*key, name=f"r{i}") for i, key in enumerate(wanted)}
    outputs = check(engine, wanted, requests)
    # Nobody is judged by a run that did not do what it is here for.
    preempted = sum(req.search is not None for output in outputs for req in output.plan.preempted)
    assert (preempted > 0) == (num_blocks == TIGHT)
    assert any(output.plan.forked for output in outputs)
    assert max(output.usage.shared_saved for output in outputs) > 0
    if preemption == "swap":
        assert any(copy.kind.value == "swap_in" for output in outputs for copy in output.plan.copies)


def test_beams_share_steps_with_other_requests(model, wanted):
    engine = make_engine(model, "paged_prefix", "chunked", num_blocks=60, overlap=True)
    alone = [Request("alone", list(PROMPTS[0]), SamplingParams(max_tokens=NUM_TOKENS))]
    run_to_completion(engine, alone)
    others = [Request(f"o{i}", list(PROMPTS[0]), SamplingParams(max_tokens=NUM_TOKENS)) for i in range(6)]
    for req in others:
        engine.add(req)
    check(engine, wanted, {key: beams(*key, name=f"r{i}") for i, key in enumerate(list(wanted)[:3])})
    assert all(req.output_token_ids == alone[0].output_token_ids for req in others)


def test_penalties_follow_the_tokens_that_a_beam_took_over(model):
    """A beam's logits are those of the same tokens in a request of their own: nothing is kept of the tokens before."""
    engine = make_engine(model, "paged", "continuous", num_blocks=ROOMY)
    of = beams(PROMPTS[1], (4, 0.0, True), repetition_penalty=1.7, min_tokens=4, logprobs=0)
    outputs = run_to_completion(engine, of)
    assert any(output.plan.forked for output in outputs)
    for text in of[0].search.winners:
        assert len(text.tokens) > 4
        for i, token in enumerate(text.tokens):
            params = SamplingParams(max_tokens=i + 1, repetition_penalty=1.7, logprobs=128, min_tokens=min(4, i + 1))
            alone = Request(f"alone{i}", list(PROMPTS[1]), params, eos_token_ids=frozenset(END))
            alone.output_token_ids += text.tokens[:i]
            entry = run_to_completion(engine, [alone])[-1].result.logprobs[0]
            assert dict(entry.top)[token] == pytest.approx(text.entries[i].logprob, abs=1e-4)
        assert text.score == pytest.approx(sum(entry.logprob for entry in text.entries))


@pytest.mark.parametrize("at", [1, 2, 5, 9])
@pytest.mark.parametrize("beam", [0, 2])
def test_one_beams_end_is_all_of_theirs(model, at, beam):
    """A client that leaves in the middle leaves no slot, no row and no waiting beam behind."""
    engine = make_engine(model, "radix", "chunked", num_blocks=TIGHT, overlap=True, preemption="swap")
    of, other = beams(PROMPTS[0], (4, 1.0, False)), beams(PROMPTS[1], (6, 2.0, "never"), name="other")
    for req in [*of, *other]:
        engine.add(req)
    for _ in range(at):
        engine.step()
    assert engine.abort(of[beam].request_id) is of[beam]
    assert all(req.finish_reason is FinishReason.ABORT for req in of)
    assert engine.abort(of[0].request_id) is None
    while engine.has_work:
        engine.step()
    assert all(req.finish_reason in (FinishReason.STOP, FinishReason.LENGTH) for req in other)
    assert engine.allocator.usage().owned == 0
    assert not engine.runner._rows.known(req.request_id for req in [*of, *other])


def test_heirs_of_a_failed_step_compute_again(model, wanted):
    """Of a step that computed another request and failed nobody knows whether it made the heirs' copies."""
    key = (PROMPTS[0], SEARCHES[1])
    engine = make_engine(model, "paged", "continuous", num_blocks=ROOMY)
    of = beams(*key)
    for req in of:
        engine.add(req)
    failed = 0
    while engine.has_work:
        if engine.scheduler._forked and not failed:
            engine.add(Request("other", list(PROMPTS[1]), SamplingParams(max_tokens=2)))
            plan = engine.scheduler.schedule(0.0)
            assert plan.forked and plan.copies and [entry.req.request_id for entry in plan.scheduled] == ["other"]
            failed = len(plan.forked)
            assert [req.request_id for req in engine.scheduler.fail(plan)] == ["other"]
            assert engine.scheduler.num_waiting == failed
            engine.ledger = None  # which has not seen that step
        engine.step()
    assert failed
    assert [req.output_token_ids for req in of] == wanted[key][0]


def test_a_failed_step_ends_all_beams(model):
    engine = make_engine(model, "paged", "chunked", num_blocks=TIGHT)
    of = beams(PROMPTS[0], (4, 1.0, False))
    for req in of:
        engine.add(req)
    plan = engine.scheduler.schedule(0.0)
    assert len(plan.scheduled) == 1
    assert set(engine.scheduler.fail(plan)) == set(of)
    assert not engine.scheduler.has_work
    assert engine.allocator.usage().owned == 0


@pytest.mark.parametrize(
    ("allocator", "scheduler", "more", "said"),
    [
        ("contiguous", "chunked", {}, "use allocator=paged"),
        ("virtual", "chunked", {}, "use allocator=paged"),
        ("paged", "static", {}, "use scheduler=chunked"),
        ("paged", "chunked", {"max_num_seqs": 3}, "scheduler.max_num_seqs=3"),
    ],
)
def test_a_strategy_that_cannot_search_says_so(allocator, scheduler, more, said):
    pool = build_allocator(allocator, num_blocks=40, block_size=4, max_model_len=64)
    policy = build_scheduler(scheduler, pool, max_model_len=64, **more)
    with pytest.raises(NotDefined, match=said) as raised:
        policy.add(beams(PROMPTS[0], (4, 1.0, False))[0])
    assert "\n" not in str(raised.value)
    assert not policy.has_work


def test_beams_that_may_never_fit_are_refused_at_once():
    pool = build_allocator("paged", num_blocks=11, block_size=4, max_model_len=64)
    policy = build_scheduler("chunked", pool, max_model_len=64)
    # 13 + 11 tokens are 6 blocks; 3 of the prompt are shared: 3 + 4 * 3 may be needed.
    with pytest.raises(RequestRejected, match=r"4 beams .* may need 60 tokens, over the 44"):
        policy.add(beams(PROMPTS[0], (4, 1.0, False))[0])
    assert not policy.has_work


def test_a_runner_without_log_probabilities_says_so():
    class Blind(OracleRunner):
        def execute(self, plan, allocator):
            step = super().execute(plan, allocator)
            step._result = step._result._replace(logprobs=None)
            return step

    pool = build_allocator("paged", num_blocks=40, block_size=4, max_model_len=64)
    engine = Strategy(pool, build_scheduler("chunked", pool, max_model_len=64)).engine(Blind(), VirtualClock())
    with pytest.raises(EngineError, match="needs log-probabilities"):
        run_to_completion(engine, beams(PROMPTS[0], (2, 1.0, False)))


@pytest.mark.parametrize(
    "wrong", [{"beams": -1}, {"beams": 2, "n": 3}, {"length_penalty": float("nan")}, {"early_stopping": "later"}]
)
def test_parameters_of_a_search_are_checked(wrong):
    with pytest.raises(RequestError, match=next(iter(reversed(wrong)))):
        SamplingParams(**wrong)


def drawn(*pairs):
    return TokenLogprobs(pairs[0][0], pairs[0][1], 1, tuple(pairs))


def test_beams_without_enough_tokens_end_there():
    """Where nearly every token is barred no beam can be without an heir: the search ends with what there is."""
    search = BeamSearch(2, ["a", "b"], 9, stop_ids=(5,))
    for beam in range(2):
        search.draw(beam, drawn((5, -0.1), (4, -0.2)))
    assert search.move([[], []]) == []
    assert search.is_over
    assert [text.tokens for text in search.winners] == [[5], [4]]
