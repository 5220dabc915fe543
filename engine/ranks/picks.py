"""Tokens from logits of which each rank has some columns.

    greedy, temperature     each rank's best (score, token), gathered: every rank takes the best of these
    whatever filters,       the row is gathered; the planning rank picks, and tells the others
    edits or asks more

The gathered row is a seam: only `_pick_whole` knows of it. A score is that of one device, bit by bit: of temperature
rows the largest logit of the whole row is taken off first.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvarena.engine.models.spec import LoadedModel
from kvarena.engine.parallel.groups import Group
from kvarena.engine.parallel.shard import Shard
from kvarena.engine.request import Request
from kvarena.engine.runner.prompt_logprobs import PromptLogprobs, PromptRows
from kvarena.engine.runner.request_rows import RequestRows
from kvarena.engine.sampling.output import HostTokens, SampledTokens
from kvarena.engine.sampling.sampler import Sampler
from kvarena.engine.sampling.streams import log_exponentials, stream_keys
from kvarena.engine.sampling.transfer import to_device


class SharedPicks:
    """Makes a runner pick tokens together with the other ranks of its stage: the first of its bases."""

    model: LoadedModel
    _rows: RequestRows
    _device: torch.device
    _sampler: Sampler

    @property
    def _shard(self) -> Shard:
        assert self.model.shard is not None
        return self.model.shard

    @property
    def _group(self) -> Group:
        assert self.model.groups is not None
        return self.model.groups.tensor

    @property
    def _is_alone(self) -> bool:
        """The stage's logits are whole."""
        return self._group.size == 1

    def _pick(self, requests: list[Request], rows: np.ndarray, stops: np.ndarray, logits: Tensor) -> HostTokens:
        """As `TorchRunner._pick`, of logits [n, `Shard.width`]."""
        at = to_device(rows, self._device)
        return self._keep(at, self._picked(requests, rows, stops, logits))  # type: ignore[attr-defined]

    def _picked(self, requests: list[Request], rows: np.ndarray, stops: np.ndarray, logits: Tensor) -> SampledTokens:
        """The tokens of all rows, on every rank of the stage."""
        is_plain = self._is_plain(rows)
        if is_plain.all():
            tokens, is_valid = self._pick_plain(rows, stops, logits)
            return SampledTokens(tokens, is_valid, None, [req.request_id for req in requests])
        others = np.flatnonzero(~is_plain)
        if len(others) == len(rows):
            return self._pick_whole(requests, rows, stops, logits)
        index = to_device(others, self._device)
        whole = self._pick_whole([requests[i] for i in others.tolist()], rows[others], stops[others], logits[index])
        own = np.flatnonzero(is_plain)
        told = torch.stack(self._pick_plain(rows[own], stops[own], logits[to_device(own, self._device)]))
        return self.merged([req.request_id for req in requests], told, whole, others)

    def merged(self, ids: list[str], told: Tensor, picked: SampledTokens, others: np.ndarray) -> SampledTokens:
        """All rows' tokens: those of the rows `others` as they were `picked`, and `told` [2, n] the rest in order."""
        index = to_device(others, self._device)
        rest = to_device(np.setdiff1d(np.arange(len(ids)), others), self._device)
        both = torch.stack([picked.token_ids, picked.is_valid.long()])
        found = torch.empty(2, len(ids), dtype=torch.int64, device=self._device)
        found[:, index], found[:, rest] = both, told
        logprobs = picked.logprobs
        if logprobs is not None:
            logprobs = logprobs._replace(rows=[int(others[row]) for row in logprobs.rows])
        # Whoever keeps scores has picked all rows.
        return SampledTokens(found[0], found[1].bool(), logprobs, ids, picked.scores)

    def _is_plain(self, rows: np.ndarray) -> np.ndarray:
        """Bool [n]: whose token is the best of scores that each rank computes for itself."""
        if self._sampler.num_scores:
            return np.zeros(len(rows), np.bool_)
        return self._rows.columns["is_plain"][rows]

    def _pick_plain(self, rows: np.ndarray, stops: np.ndarray, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens int64 [n], and whether each could be picked; greedy where the temperature is 0."""
        shard, columns = self._shard, self._rows.columns
        logits = logits[:, : shard.cuts.num_tokens]
        best = logits.max(dim=-1)
        temperature = columns["temperature"][rows]
        values, tokens = best.values.float(), best.indices
        peaks = self._group.gather(values).amax(0)
        drawn = np.flatnonzero(temperature > 0)
        if len(drawn):
            index = to_device(drawn, self._device)
            keys = stream_keys(columns["seed"][rows[drawn]], stops[drawn] - columns["num_prompt"][rows[drawn]])
            scaled = (logits[index].float() - peaks[index, None]) / to_device(temperature[drawn], self._device)[:, None]
            noise = log_exponentials(to_device(keys, self._device), scaled.shape[1], shard.cuts.first_token)
            race = (scaled - noise).max(-1)
            values = values.index_copy(0, index, race.values)
            tokens = tokens.index_copy(0, index, race.indices)
        # A token's number and a float32 are both exact in float64; of equals the lower rank has the lower tokens.
        pairs = self._group.gather(torch.stack([values.double(), (tokens + shard.cuts.first_token).double()]))
        winner = pairs[:, 0].max(dim=0).indices
        picked = pairs[:, 1].gather(0, winner[None])[0].long()
        return picked, peaks.isfinite()

    def _pick_whole(
        self, requests: list[Request], rows: np.ndarray, stops: np.ndarray, logits: Tensor
    ) -> SampledTokens:
        """Any tokens: the planning rank has the whole rows, and what is known of their requests."""
        whole = self._whole(logits)
        ids = [req.request_id for req in requests]
        told = torch.empty(2, len(rows), dtype=torch.int64, device=self._device)
        sampled: SampledTokens | None = None
        if self._group.rank == 0:
            at = to_device(rows, self._device)
            sampled = self._sampled(requests, rows, at, stops, whole)  # type: ignore[attr-defined]
            told[0], told[1] = sampled.token_ids, sampled.is_valid
        self._group.broadcast(told)
        return SampledTokens(told[0], told[1].bool(), None, ids) if sampled is None else sampled

    def _whole(self, logits: Tensor) -> Tensor:
        """[n, vocab_size]: the whole rows, of which `logits` are this rank's columns."""
        parts: Any = self._group.gather(logits)
        return parts.transpose(0, 1).reshape(len(logits), self._group.size * self._shard.cuts.width)[
            :, : self._shard.cuts.vocab_size
        ]

    def _prompts(self, logits: Tensor, rows: PromptRows) -> PromptLogprobs | None:
        """As `TorchRunner._prompts`; the planning rank alone has them."""
        whole = self._whole(logits)
        return PromptLogprobs(whole, rows) if self._group.rank == 0 else None
