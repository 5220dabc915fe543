"""Token counts of the requests that use penalties, kept on the device from step to step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvarena.engine.errors import EngineError
from kvarena.engine.request import Request
from kvarena.engine.sampling.transfer import to_device


@dataclass(slots=True)
class _Counted:
    """Where a request's counts lie, and how many of its output tokens are in them."""

    slot: int
    num_counted: int = 0


class TokenCounts:
    """Per request row: which tokens the prompt holds, and how often each occurs in the output.

    A slot of 5 bytes per vocabulary entry for each row that uses penalties; none for the others.

    Args:
        vocab_size: number of tokens V.
        device: where the counts live.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.in_prompt = torch.zeros(0, vocab_size, dtype=torch.bool, device=device)
        self.counts = torch.zeros(0, vocab_size, dtype=torch.int32, device=device)
        self._of_row: dict[int, _Counted] = {}
        self._free: list[int] = []

    def release(self, rows: Iterable[int]) -> None:
        """Give the slots of request rows back; does nothing for one without."""
        self._free += [self._of_row.pop(row).slot for row in rows if row in self._of_row]

    def update(
        self,
        requests: Sequence[Request],
        request_rows: Sequence[int],
        rows: Sequence[int],
        num_outputs: Sequence[int],
        pending: Tensor | None,
    ) -> Tensor:
        """Bring the counts of some rows of a batch up to date.

        Args:
            requests: the batch's requests.
            request_rows: where what is kept of each lies.
            rows: the batch rows to update.
            num_outputs: per batch row, the output tokens to count.
            pending: int64 [N] on the device; a row's last output token where the host has not seen it.

        Returns:
            int64 [len(rows)] on the device: each row's slot in `in_prompt` and `counts`.
        """
        self._reserve([(request_rows[row], requests[row], num_outputs[row]) for row in rows])
        slots: list[int] = []
        seen_slots: list[int] = []
        seen_tokens: list[int] = []
        late_slots: list[int] = []
        late_rows: list[int] = []
        for row in rows:
            counted, output = self._of_row[request_rows[row]], requests[row].output_token_ids
            slots.append(counted.slot)
            tokens = output[counted.num_counted : num_outputs[row]]
            seen_tokens += tokens
            seen_slots += [counted.slot] * len(tokens)
            if num_outputs[row] > max(len(output), counted.num_counted):
                late_slots.append(counted.slot)
                late_rows.append(row)
            counted.num_counted = num_outputs[row]
        if seen_tokens:
            self._add(seen_slots, self._index(seen_tokens))
        if late_rows:
            if pending is None:
                raise EngineError("a request has tokens that the host has not seen, and they were not passed on")
            self._add(late_slots, pending[self._index(late_rows)])
        return self._index(slots)

    def _add(self, slots: list[int], tokens: Tensor) -> None:
        one = torch.ones((), dtype=torch.int32, device=self.counts.device)
        self.counts.index_put_((self._index(slots), tokens), one, accumulate=True)

    def _index(self, values: Sequence[object]) -> Tensor:
        return to_device(np.array(values, dtype=np.int64), self.counts.device)

    def _reserve(self, wanted: Sequence[tuple[int, Request, int]]) -> None:
        """Slots for new rows, with the prompt in them; rows whose count would have to shrink start over.

        `wanted`: request row, request and how many of its output tokens are to be counted.
        """
        self.release([row for row, _, count in wanted if row in self._of_row and self._of_row[row].num_counted > count])
        fresh = [(row, req) for row, req, _ in wanted if row not in self._of_row]
        if not fresh:
            return
        self._grow(len(fresh))
        slots, tokens = [], []
        for row, req in fresh:
            counted = self._of_row[row] = _Counted(self._free.pop())
            slots += [counted.slot] * len(req.prompt_token_ids)
            tokens += req.prompt_token_ids
        cleared = self._index([self._of_row[row].slot for row, _ in fresh])
        self.in_prompt[cleared] = False
        self.counts[cleared] = 0
        self.in_prompt[self._index(slots), self._index(tokens)] = True

    def _grow(self, num_needed: int) -> None:
        missing = num_needed - len(self._free)
        if missing <= 0:
            return
        old = len(self.counts)
        new = max(old + missing, 2 * old)
        for name in ("in_prompt", "counts"):
            tensor: Tensor = getattr(self, name)
            grown = tensor.new_zeros(new, tensor.shape[1])
            grown[:old] = tensor
            setattr(self, name, grown)
        self._free += range(old, new)
