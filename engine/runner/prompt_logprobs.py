"""Log-probabilities of prompt tokens, for requests that ask for them.

The token at position p is predicted by position p - 1, so the step that computes positions [start, stop) answers for
prompt tokens at [start + 1, min(stop + 1, num_prompt_tokens)). Their logits are computed behind those of the sampled
tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvarena.engine.contract import StepPlan
from kvarena.engine.model_runner import TokenLogprobs
from kvarena.engine.sampling.output import to_pinned
from kvarena.engine.sampling.transfer import to_device

# Rows of logits that are turned into fp32 probabilities at once.
ROWS_AT_ONCE = 256


class PromptRows(NamedTuple):
    """Which logits a step computes for prompt log-probabilities.

    Attributes:
        indices: int64, flat tokens whose logits are wanted, entry after entry.
        targets: the token that each of them predicts.
        entries: of each entry that wants them: its index in the plan, how many rows it has, how many top tokens.
    """

    indices: np.ndarray
    targets: list[int]
    entries: list[tuple[int, int, int]]


def prompt_rows(plan: StepPlan, query_start_loc: np.ndarray) -> PromptRows | None:
    """The rows of a plan; None when nobody asks."""
    indices: list[np.ndarray] = []
    targets: list[int] = []
    entries: list[tuple[int, int, int]] = []
    for i, (req, start, num_new) in enumerate(plan.scheduled):
        if req.sampling.prompt_logprobs is None:
            continue
        wanted = req.prompt_token_ids[start + 1 : start + num_new + 1]
        indices.append(np.arange(query_start_loc[i], query_start_loc[i] + len(wanted)))
        targets += wanted
        entries.append((i, len(wanted), req.sampling.prompt_logprobs))
    return PromptRows(np.concatenate(indices).astype(np.int64), targets, entries) if entries else None


class PromptLogprobs:
    """A step's prompt log-probabilities, computed on the device and on their way to the host.

    Args:
        logits: [len(rows.targets), V].
        rows: from `prompt_rows`.
    """

    def __init__(self, logits: Tensor, rows: PromptRows) -> None:
        self._rows = rows
        targets = to_device(np.array(rows.targets, dtype=np.int64), logits.device)
        num_top = max(top for _, _, top in rows.entries)
        # Part by part: in fp32, a long prompt's logits are large.
        parts = [
            self._part(logits[at : at + ROWS_AT_ONCE].float().log_softmax(-1), targets[at : at + ROWS_AT_ONCE], num_top)
            for at in range(0, len(targets), ROWS_AT_ONCE)
        ]
        self._tensors = [torch.cat(column) for column in zip(*parts, strict=True)]
        self._done: torch.cuda.Event | None = None
        if logits.device.type == "cuda":
            # Not when they are read: then the next step is running.
            self._tensors = [to_pinned(tensor) for tensor in self._tensors]
            self._done = torch.cuda.Event()
            self._done.record()

    @staticmethod
    def _part(values: Tensor, targets: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of each row: the target's log-probability and rank, the most likely tokens and their log-probabilities."""
        own = values.gather(1, targets[:, None])
        top = values.topk(num_top, dim=-1)
        return own[:, 0], (values > own).sum(-1) + 1, top.indices, top.values

    def result(self, num_entries: int) -> list[list[TokenLogprobs] | None]:
        """Wait for the device; one list per entry of the plan, None where the request did not ask."""
        if self._done is not None:
            self._done.synchronize()
        spread: list[list[TokenLogprobs] | None] = [None] * num_entries
        columns = [tensor.tolist() for tensor in self._tensors] or [[], [], [], []]
        tokens = iter(zip(self._rows.targets, *columns, strict=True))
        for entry, count, num_top in self._rows.entries:
            rows = [next(tokens) for _ in range(count)]
            spread[entry] = [
                TokenLogprobs(token, logprob, rank, tuple(zip(ids[:num_top], values[:num_top], strict=True)))
                for token, logprob, rank, ids, values in rows
            ]
        return spread
