"""Random constraints through the way that a request's takes, from its body to the masks of a step:

    kvarena check constraints --seconds 1200 --seed 0 --jobs 2

A body is read as the server reads it, its constraint is tried out in the server's own worker, compiled, and followed
by several choices that sample at random. Two things are failures: an answer that would be a 500, and a step of which
the constraints take more than STEP_BOUND seconds of processor time. Each failure prints the seed that makes it again
(`--seed N --bodies 1`). The last line of stdout is JSON; exit code 1 when anything failed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import multiprocessing
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import torch
from pydantic import ValidationError

from kvarena.engine.errors import KvarenaError
from kvarena.engine.request import Request
from kvarena.engine.runner.constraints import allowed_tokens
from kvarena.engine.server.api.constraints import Constraints
from kvarena.engine.server.api.protocol import ChatCompletionRequest, CompletionRequest
from kvarena.engine.server.api.spoken import Spoken
from kvarena.engine.server.engine.compiled import make_compiler
from kvarena.engine.server.engine.grammar_checks import CheckedGrammar
from kvarena.engine.server.engine.grammars import GrammarCompiler
from kvarena.engine.server.shared.config import ServerConfig
from kvarena.engine.server.shared.errors import ApiError
from kvarena.engine.server.text.tokenization import TokenizerService
from kvarena.experiments.fuzzing.random_constraints import random_body
from kvarena.experiments.jobs.output import progress_bar
from kvarena.experiments.tools import tool_parser

STEP_BOUND = 0.2
_KEPT_FAILURES = 20


@dataclass
class Findings:
    """What some bodies came to.

    Attributes:
        answers: how many got which answer: a status, or how following it ended.
        failures: lines with the seed.
        longest_step: the most processor time that the constraints took of one step, and the seed.
        longest_compile: the most processor time that one took in the worker, and the seed.
    """

    answers: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    longest_step: tuple[float, int] = (0.0, -1)
    longest_compile: tuple[float, int] = (0.0, -1)
    num_steps: int = 0
    processor_seconds: float = 0.0

    def add(self, other: Findings) -> None:
        """Take those of another process in."""
        self.answers += other.answers
        self.failures += other.failures
        self.longest_step = max(self.longest_step, other.longest_step)
        self.longest_compile = max(self.longest_compile, other.longest_compile)
        self.num_steps += other.num_steps
        self.processor_seconds += other.processor_seconds


class Fuzzer:
    """Tries bodies, one after the other.

    Args:
        model: a model directory; its tokenizer is used.
        num_choices: choices that follow each constraint side by side.
        num_tokens: most tokens of a choice.
    """

    def __init__(self, model: str, num_choices: int, num_tokens: int) -> None:
        tokenizer = TokenizerService(model)
        self._num_choices, self._num_tokens = num_choices, num_tokens
        self._vocab_size = len(tokenizer.tokenizer)
        self._eos = frozenset((tokenizer.tokenizer.eos_token_id,))
        info = SimpleNamespace(constraints=True, vocab_size=self._vocab_size, eos_token_ids=sorted(self._eos))
        spoken = Spoken(tokenizer, ServerConfig())
        self._constraints = Constraints(SimpleNamespace(info=info), tokenizer, spoken)  # type: ignore[arg-type]
        made = make_compiler(tokenizer.tokenizer, self._vocab_size, self._eos)
        if made is None:
            raise SystemExit(f"the tokenizer of {model} cannot constrain tokens")
        self._compile: GrammarCompiler = made
        self.findings = Findings()

    async def run(self, seeds: Sequence[int], until: float, progress: bool = False) -> None:
        """Try the bodies of `seeds` until `until` seconds of processor time are spent, the worker's included."""
        start = processor_seconds()
        total = math.ceil(until)
        bar = progress_bar("constraints", total, "s", enabled=progress)
        for seed in seeds:
            await self._try(seed)
            self.findings.processor_seconds = processor_seconds() - start
            bar.update(min(int(self.findings.processor_seconds), total) - bar.n)
            if self.findings.processor_seconds >= until or len(self.findings.failures) >= _KEPT_FAILURES:
                break
        bar.close()
        self._constraints.close()

    async def _try(self, seed: int) -> None:
        found = self.findings
        kind, body = random_body(seed)
        try:
            checked = await self._check(kind, body)
        except (ApiError, ValidationError) as error:
            status = error.status if isinstance(error, ApiError) else 400
            found.answers[str(status)] += 1
            if status == 500:
                found.failures.append(f"seed {seed}: 500: {error}")
            return
        # Anything else would be a 500.
        except Exception as error:
            found.answers["500"] += 1
            found.failures.append(f"seed {seed}: 500: {type(error).__name__}: {error}"[:300])
            return
        found.longest_compile = max(found.longest_compile, (checked.seconds, seed))
        found.answers[self._follow(seed, checked)] += 1

    async def _check(self, kind: str, body: dict[str, Any]) -> CheckedGrammar:
        if kind == "completions":
            checked = await self._constraints.of(CompletionRequest.model_validate(body))
        else:
            checked = await self._constraints.of_chat(ChatCompletionRequest.model_validate(body), [])
        if checked is None:
            raise AssertionError("a body without a constraint")
        return checked

    def _follow(self, seed: int, checked: CheckedGrammar) -> str:
        """Sample at random from the masks; how it ended."""
        rng = np.random.default_rng(seed)
        try:
            grammar = self._compile(checked.kind, checked.grammar)
        except KvarenaError as error:
            self.findings.failures.append(f"seed {seed}: compiled in the worker and not in the engine: {error}")
            return "not compiled"
        running = [Request(f"{seed}-{i}", [1]) for i in range(self._num_choices)]
        for req in running:
            req.constraint = grammar.start()
        ended: set[str] = set()
        for _ in range(2 * self._num_tokens):  # late masks take steps, too
            start = time.thread_time()
            mask = allowed_tokens(running, self._vocab_size, torch.device("cpu"))
            seconds = time.thread_time() - start
            self.findings.num_steps += 1
            self.findings.longest_step = max(self.findings.longest_step, (seconds, seed))
            if seconds > STEP_BOUND:
                self.findings.failures.append(f"seed {seed}: constraints took {seconds:.2f} s of a step")
                return "slow step"
            assert mask is not None
            running = [req for i, req in enumerate(running) if self._goes_on(req, mask[i].numpy(), rng, ended)]
            if not running:
                break
        return "failed later" if "failed" in ended else "followed"

    def _goes_on(self, req: Request, allowed: np.ndarray, rng: np.random.Generator, ended: set[str]) -> bool:
        constraint = req.constraint
        assert constraint is not None
        if constraint.num_late:
            return True
        token = int(rng.choice(np.flatnonzero(allowed)))
        req.output_token_ids.append(token)
        if token in self._eos:
            ended.add("failed" if constraint.failure else "complete")
            return False
        constraint.accept(token)
        return len(req.output_token_ids) < self._num_tokens


def processor_seconds() -> float:
    """Of this process, the worker and the worker's children, those that have ended too (a worker that hangs is killed
    and another started: without its time the clock would go backwards)."""
    total = 0.0
    for process in [psutil.Process(), *psutil.Process().children()]:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


def _run(options: argparse.Namespace, job: int) -> Findings:
    fuzzer = Fuzzer(options.model, options.choices, options.tokens)
    first = options.seed + job * options.bodies
    asyncio.run(fuzzer.run(range(first, first + options.bodies), options.seconds / options.jobs, progress=job == 0))
    return fuzzer.findings


def main(argv: Sequence[str]) -> int:
    """Run; see the module's docstring."""
    parser = tool_parser(__name__, __doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="processor time, of all processes together")
    parser.add_argument("--seed", type=int, default=None, help="of the first body; default: drawn, and printed")
    parser.add_argument("--bodies", type=int, default=10**7, help="most bodies of a process")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--model", default="models/demo", help="a model directory")
    parser.add_argument("--choices", type=int, default=16, help="choices that follow a constraint side by side")
    parser.add_argument("--tokens", type=int, default=24, help="most tokens of a choice")
    options = parser.parse_args(argv)
    if options.seed is None:
        options.seed = random.SystemRandom().randrange(10**9)
    print(f"seed {options.seed}", flush=True)
    found = Findings()
    if options.jobs == 1:
        found.add(_run(options, 0))
    else:
        with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
            for one in pool.starmap(_run, [(options, job) for job in range(options.jobs)]):
                found.add(one)
    for failure in found.failures:
        print(failure, file=sys.stderr)
    print(json.dumps({
        "seed": options.seed, "bodies": found.answers.total(), "answers": dict(found.answers),
        "failures": len(found.failures), "first_failure": found.failures[0] if found.failures else None,
        "steps": found.num_steps, "longest_step_s": round(found.longest_step[0], 4),
        "longest_step_seed": found.longest_step[1], "longest_compile_s": round(found.longest_compile[0], 3),
        "longest_compile_seed": found.longest_compile[1], "processor_seconds": round(found.processor_seconds, 1),
    }))  # fmt: skip
    return 1 if found.failures else 0
