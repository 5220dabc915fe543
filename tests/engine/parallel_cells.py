"""Engines over several ranks, which are threads here, and what one rank gives for the same requests."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from checkpoints import random_prompts

from kvarena.engine.core import Engine, StepOutput
from kvarena.engine.request import Request, SamplingParams
from kvarena.experiments.building.build import build_engine
from kvarena.experiments.building.shared import SharedParts
from kvarena.experiments.settings.compose import load_run

# Shared beginnings, and more than fit at once into the short pools below.
LENS = (23, 9, 30, 5, 17, 26)
MAX_TOKENS = 9
SHORT = "kv_cache.num_slots=80"
THREADS = ("parallel.executor=threads", "parallel.check_plans=true")
COMMON = ("engine.dtype=float32", "engine.max_model_len=64", "driver.warmup=false")
SAMPLINGS = {
    "greedy": {},
    "temperature": {"temperature": 0.9, "seed": 5},
    "top_p": {"temperature": 0.9, "seed": 5, "top_p": 0.8, "top_k": 40, "min_p": 0.01},
    "edits": {"repetition_penalty": 1.3, "logit_bias": {7: 2.0}, "logprobs": 2, "presence_penalty": 0.4},
}
# Main cells of the strategy matrix: allocator, scheduler, overlap, more; and what must have happened.
CELLS: dict[str, tuple[tuple[str, ...], str]] = {
    "recompute": (("allocator=paged", "scheduler=continuous", "engine.overlap=true", SHORT), "preempted"),
    "swap": (
        ("allocator=paged", "scheduler=continuous", "scheduler.preemption=swap", "allocator.swap_blocks=12",
         "kv_cache.num_slots=128"),
        "swapped",
    ),
    "prefix": (
        ("allocator=paged_prefix", "scheduler=chunked", "engine.overlap=true", "scheduler.max_num_seqs=2",
         "scheduler.max_num_batched_tokens=16", "kv_cache.num_slots=320"), "cached",
    ),
    "radix": (("allocator=radix", "scheduler=fair", "scheduler.max_num_seqs=2", "kv_cache.num_slots=320"), "cached"),
    "static": (("allocator=contiguous", "scheduler=static", "runner.layout=contiguous", "kv_cache.num_slots=256"), ""),
    "virtual": (("allocator=virtual", "scheduler=priority", "kv_cache.num_slots=320"), ""),
}  # fmt: skip


def requests(vocab_size: int = 128, **sampling: Any) -> list[Request]:
    """The requests of a cell: some begin alike, and every other one samples as `sampling` says."""
    prompts = [list(prompt) for prompt in random_prompts(LENS, vocab_size)]
    shared = prompts[0][:16]
    odd = {"max_tokens": MAX_TOKENS} | sampling
    found = []
    for i, prompt in enumerate(prompts):
        ids = shared + prompt if i % 2 else prompt
        given = odd if i % 3 != 2 else {"max_tokens": MAX_TOKENS}
        found.append(Request(f"r{i}", ids, SamplingParams(**given)))
    return found


def of_model(directory: Path, *overrides: str) -> Any:
    return load_run([f"model.path={directory}", *COMMON, *overrides])


def run(engine: Engine, asked: list[Request], abort: dict[int, str] | None = None) -> list[StepOutput]:
    """Run the requests to their ends; `abort`: by the number of steps, who goes then."""
    for req in asked:
        engine.add(req)
    steps: list[StepOutput] = []
    while engine.has_work:
        if abort is not None and len(steps) in abort:
            engine.abort(abort.pop(len(steps)))
        if (output := engine.step()) is not None:
            steps.append(output)
        elif engine.has_work and not engine.in_flight:
            wake = engine.wake_time(engine.clock.now())
            assert wake is not None
            engine.clock.sleep_until(wake)
    return steps


def alone(directory: Path, asked: list[Request], *overrides: str) -> list[list[int]]:
    """What one rank with room for everyone gives: computed once, for every cell that asks for the same."""
    key = (directory, overrides, *((req.request_id, tuple(req.prompt_token_ids), repr(req.sampling)) for req in asked))
    assert not any(req.images for req in asked)  # which the key does not tell apart
    if key not in _alone:
        engine = build_engine(of_model(directory, "kv_cache.num_slots=2048", *overrides), SharedParts()).engine
        copies = [replace(req, output_token_ids=[]) for req in asked]
        run(engine, copies)
        _alone[key] = [req.output_token_ids for req in copies]
    return [list(ids) for ids in _alone[key]]


_alone: dict[tuple[Any, ...], list[list[int]]] = {}


def happened(asked: list[Request], steps: list[StepOutput]) -> set[str]:
    """Which of the paths the steps took."""
    kinds = {copy.kind.value for step in steps for copy in step.plan.copies}
    found = {"swapped"} if {"swap_in", "swap_out"} <= kinds else set()
    found |= {"preempted"} if any(req.num_preemptions for req in asked) else set()
    return found | ({"cached"} if any(req.num_cached_tokens for req in asked) else set())
