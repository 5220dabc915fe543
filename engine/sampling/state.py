"""From requests to the tensors that the sampler needs.

The work per step is kept small, because it is on the host's critical path: what depends only on which requests are
in the batch is built once and used again while the batch stays the same; a batch that is greedy throughout and
changes no logits needs no tensors at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvarena.engine.errors import EngineError, RequestError
from kvarena.engine.request import Request, SamplingParams
from kvarena.engine.sampling.batch import LogitBias, NamedTokens, Penalties, Rows, RowValues, SamplingBatch
from kvarena.engine.sampling.counts import TokenCounts
from kvarena.engine.sampling.streams import stream_keys
from kvarena.engine.sampling.transfer import to_device


@dataclass(slots=True)
class _Static:
    """What depends only on which requests sit in which row.

    `random`, `top_k`, `top_p` and `min_p` number the rows as follows: `random.host` holds batch rows; the filters'
    rows count among the random rows.
    """

    random: Rows
    seeds: np.ndarray
    temperature: Tensor | None
    top_k: RowValues | None
    top_p: RowValues | None
    min_p: RowValues | None
    penalized: Rows
    penalty_factors: Tensor | None
    bias: LogitBias | None
    min_tokens: list[int]
    logprobs: Rows
    num_top: list[int]
    named: NamedTokens | None


def check_sampling(params: SamplingParams, vocab_size: int) -> None:
    """Raise RequestError when token ids or counts in `params` do not fit the vocabulary."""
    for name in ("logit_bias", "stop_token_ids", "logprob_token_ids"):
        ids = getattr(params, name)
        bad = [token for token in ids if not 0 <= token < vocab_size]
        if bad:
            raise RequestError(
                f"{name} holds token id {bad[0]}; the model's vocabulary has ids 0 to {vocab_size - 1}", param=name
            )
    if params.logprobs is not None and params.logprobs > vocab_size:
        raise RequestError(
            f"logprobs={params.logprobs} is more than the model's {vocab_size} tokens; ask for fewer", param="logprobs"
        )


class SamplerState:
    """Builds batches, and keeps what pays to keep between them, by the requests' rows.

    Args:
        vocab_size: width V of the logits.
        device: where the logits are.
    """

    def __init__(self, vocab_size: int, device: torch.device | str) -> None:
        self.vocab_size = vocab_size
        self.device = torch.device(device)
        self._counts = TokenCounts(vocab_size, self.device)
        self._last: list[Request] = []
        self._static: _Static | None = None

    def release(self, rows: Sequence[int]) -> None:
        """Forget the requests of these rows."""
        self._counts.release(rows)
        self._last, self._static = [], None

    def batch(
        self,
        requests: Sequence[Request],
        rows: Sequence[int],
        seeds: np.ndarray,
        num_outputs: Sequence[int],
        *,
        pending_token_ids: Tensor | None = None,
        allowed_tokens: Tensor | None = None,
        draws: bool = True,
    ) -> SamplingBatch:
        """Prepare to sample one token for each of `requests`, in order.

        Args:
            requests: whose tokens; they have passed `check_sampling`.
            rows: where what is kept of each lies.
            seeds: uint64, of their random streams.
            num_outputs: of each, how many output tokens precede the one to sample: the position in its random
                stream, and what min_tokens and penalties count. With overlap that is
                `start + num_new_tokens - num_prompt_tokens` of the scheduled entry, and may be one more than the
                host has seen.
            pending_token_ids: int64 [N] on the device: the last output token of rows where the host has not seen
                it; other rows' values are not read. Needed when a row with penalties has such a token, so that
                penalties count it exactly.
            allowed_tokens: bool [N, V] on the device; False bars a token (structured output).
            draws: the sampler draws. Else whoever does needs no keys.

        Raises:
            EngineError: `num_outputs` runs further ahead of the host than `pending_token_ids` covers.
        """
        requests = list(requests)
        # Requests compare by identity, so this is one pass over pointers.
        if self._static is None or requests != self._last:
            self._static, self._last = self._build_static(requests, seeds), requests
        static = self._static
        keys = None
        if static.random.host and draws:
            at = np.array([num_outputs[row] for row in static.random.host], dtype=np.uint64)
            keys = to_device(stream_keys(static.seeds, at), self.device)
        return SamplingBatch(
            request_ids=[req.request_id for req in requests],
            random=static.random,
            keys=keys,
            temperature=static.temperature,
            top_k=static.top_k,
            top_p=static.top_p,
            min_p=static.min_p,
            penalties=self._penalties(requests, rows, num_outputs, pending_token_ids),
            bias=static.bias,
            barred=self._barred(requests, num_outputs),
            allowed_tokens=allowed_tokens,
            logprobs=static.logprobs,
            num_top=static.num_top,
            named=static.named,
        )

    def _penalties(
        self, requests: list[Request], rows: Sequence[int], num_outputs: Sequence[int], pending: Tensor | None
    ) -> Penalties | None:
        assert self._static is not None
        penalized, factors = self._static.penalized, self._static.penalty_factors
        if factors is None:
            return None
        for row in penalized.host:
            if num_outputs[row] > len(requests[row].output_token_ids) + 1:
                raise EngineError(
                    f"request {requests[row].request_id!r} is more than one token ahead of the host; the sampler "
                    "counts at most one unseen token per request"
                )
        slots = self._counts.update(requests, rows, penalized.host, num_outputs, pending)
        presence, frequency, repetition = factors.unbind()
        return Penalties(penalized, presence, frequency, repetition, self._counts.in_prompt, self._counts.counts, slots)

    def _barred(self, requests: list[Request], num_outputs: Sequence[int]) -> Tensor | None:
        assert self._static is not None
        pairs = [
            (row, token)
            for row in self._static.min_tokens
            if num_outputs[row] < requests[row].sampling.min_tokens
            for token in requests[row].stop_ids
        ]
        return to_device(np.array(pairs, dtype=np.int64).T.copy(), self.device) if pairs else None

    def _build_static(self, requests: list[Request], seeds: np.ndarray) -> _Static:
        params = [req.sampling for req in requests]
        random = [row for row, p in enumerate(params) if p.temperature > 0]
        drawn = [params[row] for row in random]
        vocab = self.vocab_size
        penalized = [
            row
            for row, p in enumerate(params)
            if p.presence_penalty != 0 or p.frequency_penalty != 0 or p.repetition_penalty != 1
        ]
        factors = [
            (params[r].presence_penalty, params[r].frequency_penalty, params[r].repetition_penalty) for r in penalized
        ]
        wants_logprobs = [row for row, p in enumerate(params) if p.logprobs is not None]
        return _Static(
            random=self._rows(random, len(params)),
            seeds=seeds[random],
            temperature=self._floats([p.temperature for p in drawn]) if drawn else None,
            top_k=self._values([p.top_k if 0 < p.top_k < vocab else None for p in drawn], np.int64),
            top_p=self._values([p.top_p if p.top_p < 1 else None for p in drawn], np.float32),
            min_p=self._values([p.min_p if p.min_p > 0 else None for p in drawn], np.float32),
            penalized=self._rows(penalized, len(params)),
            penalty_factors=self._floats(factors).T.contiguous() if factors else None,
            bias=self._bias(params),
            min_tokens=[row for row, req in enumerate(requests) if req.sampling.min_tokens and req.stop_ids],
            logprobs=self._rows(wants_logprobs, len(params)),
            num_top=[len(params[row].logprob_token_ids) or params[row].logprobs or 0 for row in wants_logprobs],
            named=self._named([params[row].logprob_token_ids for row in wants_logprobs]),
        )

    def _named(self, asked: list[tuple[int, ...]]) -> NamedTokens | None:
        places = [place for place, tokens in enumerate(asked) if tokens]
        if not places:
            return None
        width = max(len(asked[place]) for place in places)
        rows = [[*asked[place], *[0] * (width - len(asked[place]))] for place in places]
        return NamedTokens(places, to_device(np.array(rows, dtype=np.int64), self.device))

    def _bias(self, params: list[SamplingParams]) -> LogitBias | None:
        entries = [(row, token, value) for row, p in enumerate(params) for token, value in p.logit_bias.items()]
        if not entries:
            return None
        rows, tokens, values = zip(*entries, strict=True)
        index = to_device(np.array([rows, tokens], dtype=np.int64), self.device)
        return LogitBias(index[0], index[1], self._floats(values))

    def _rows(self, rows: list[int], num_rows: int) -> Rows:
        if len(rows) in (0, num_rows):
            return Rows(None, rows)
        return Rows(to_device(np.array(rows, dtype=np.int64), self.device), rows)

    def _values(self, values: Sequence[float | None], dtype: type) -> RowValues | None:
        """The rows whose value is not None."""
        used = [(row, value) for row, value in enumerate(values) if value is not None]
        if not used:
            return None
        rows = self._rows([row for row, _ in used], len(values))
        array: np.ndarray = np.array([value for _, value in used], dtype=dtype)
        return RowValues(rows, to_device(array, self.device), float(array.max()))

    def _floats(self, values: Sequence[object]) -> Tensor:
        return to_device(np.array(values, dtype=np.float32), self.device)
