"""The runner's interface. Free of torch."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np

from kvarena.engine.contract import KVAllocator, StepPlan


class TokenLogprobs(NamedTuple):
    """Log-probabilities at one sampled position, natural logarithm, after penalties and bias, before temperature.

    Attributes:
        token_id: the sampled token.
        logprob: its log-probability.
        rank: its rank, 1 for the most likely token.
        top: (token id, log-probability) of the most likely tokens, best first.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


class TokenScores(NamedTuple):
    """The best scores at S sampled positions, best first (`engine/sampling/scores.py`), for whoever judges differences.

    Attributes:
        token_ids: int32 [S, K].
        values: float64 [S, K].
    """

    token_ids: np.ndarray
    values: np.ndarray


class StepResult(NamedTuple):
    """What a step produced, aligned with `plan.scheduled`.

    Attributes:
        token_ids: the sampled token, or None where the entry did not reach its last token.
        logprobs: for entries whose request asked for them; None when no request of the step did.
        prompt_logprobs: for entries whose request asked for them, those of the prompt tokens at positions
            [start + 1, min(start + num_new_tokens + 1, num_prompt_tokens)): the token at position p is predicted by
            position p - 1, so the step that computes p - 1 answers for p. None when no request of the step did.
        copy_time: seconds that the step spent on `plan.copies` (swaps, copy-on-write).
        scores: of the entries that sampled, in order; None unless the runner was made to keep them.
        num_experts_read: experts that had a token, all layers together; of a simulated step as expected.
        num_kv_saved: tokens of context whose KV was not read for a request, because it was read for another one too.
    """

    token_ids: list[int | None]
    logprobs: list[TokenLogprobs | None] | None = None
    prompt_logprobs: list[list[TokenLogprobs] | None] | None = None
    copy_time: float = 0.0
    scores: TokenScores | None = None
    num_experts_read: float = 0.0
    num_kv_saved: int = 0


class PendingTokens(Protocol):
    """A step in flight."""

    def result(self) -> StepResult:
        """Wait for the step's tokens. Raises EngineError when the device failed."""
        ...


class ModelRunner(Protocol):
    """Executes step plans. Sees plans and block tables, never a scheduler's or an allocator's type."""

    def execute(self, plan: StepPlan, allocator: KVAllocator) -> PendingTokens:
        """Launch one step: apply `plan.copies`, write the KV of the new tokens, sample where `plan.samples`."""
        ...

    def release(self, request_ids: list[str]) -> None:
        """Forget per-request state (sampler counts, swapped blocks' staging) of requests that ended."""
        ...


class ReadyTokens:
    """A step whose result is known already."""

    def __init__(self, result: StepResult) -> None:
        self._result = result

    def result(self) -> StepResult:
        """The tokens."""
        return self._result
