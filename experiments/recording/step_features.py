"""What a step's time depends on: recorded of every step, and the input of the simulator's step times. Free of torch."""

from __future__ import annotations

from typing import NamedTuple

from kvarena.engine.contract import StepPlan


class StepFeatures(NamedTuple):
    """What a step's time depends on.

    Attributes:
        num_prefill_tokens: new tokens of requests that compute more than one.
        num_decode_requests: requests that compute one token.
        num_kv_tokens: tokens whose KV attention reads, each once per request.
        num_attention_pairs: (query, key) pairs of the prefill tokens.
        num_copied_blocks: blocks copied before the forward.
        num_prefill_requests: requests that compute more than one token.
        longest_prefill: most tokens that a query of these may attend to: the longest of their contexts.
        num_saved_kv_tokens: of `num_kv_tokens`, those that are not read again, as another request's read serves.
    """

    num_prefill_tokens: int
    num_decode_requests: int
    num_kv_tokens: int
    num_attention_pairs: int
    num_copied_blocks: int
    num_prefill_requests: int
    longest_prefill: int = 0
    num_saved_kv_tokens: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens computed."""
        return self.num_prefill_tokens + self.num_decode_requests

    @property
    def num_distinct_kv_tokens(self) -> int:
        """Tokens whose KV is read, each once."""
        return self.num_kv_tokens - self.num_saved_kv_tokens

    @property
    def num_requests(self) -> int:
        """Requests in the step's batch."""
        return self.num_prefill_requests + self.num_decode_requests


def step_features(plan: StepPlan, sum_of_starts: int | None = None, num_saved: int = 0) -> StepFeatures:
    """The features of `plan`, of which `num_saved` tokens of KV are not read again.

    Who has added up the starts of its entries already may say so.
    """
    scheduled = plan.scheduled
    prefill = pairs = num_prefills = longest = 0
    for _, start, num_new in scheduled[plan.num_decodes :]:
        if num_new > 1:
            num_prefills += 1
            prefill += num_new
            pairs += num_new * start + num_new * (num_new + 1) // 2
            longest = max(longest, start + num_new)
    num_decodes = len(scheduled) - num_prefills
    if sum_of_starts is None:
        sum_of_starts = sum([start for _, start, _ in scheduled])
    kv = sum_of_starts + prefill + num_decodes
    return StepFeatures(prefill, num_decodes, kv, pairs, len(plan.copies), num_prefills, longest, num_saved)
