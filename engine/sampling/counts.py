"""Token counts of the requests that use penalties, kept on the device from step to step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kvarena.engine.errors import EngineError
from kvarena.engine.request import Request
from kvarena.engine.sampling.transfer import to_device


class TokenCounts:
    """Per request: which tokens the prompt holds, and how often each occurs in the output.

    A slot of 5 bytes per vocabulary entry for each request that uses penalties; none for the others.

    Args:
        vocab_size: number of tokens V.
        device: where the counts live.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.in_prompt = torch.zeros(0, vocab_size, dtype=torch.bool, device=device)
        self.counts = torch.zeros(0, vocab_size, dtype=torch.int32, device=device)
        self._slots: dict[str, int] = {}
        self._num_counted: dict[str, int] = {}
        self._free: list[int] = []

    def release(self, request_id: str) -> None:
        """Give a request's slot back; does nothing for one without."""
        slot = self._slots.pop(request_id, None)
        if slot is not None:
            self._num_counted.pop(request_id)
            self._free.append(slot)

    def update(
        self, requests: Sequence[Request], rows: Sequence[int], num_outputs: Sequence[int], pending: Tensor | None
    ) -> Tensor:
        """Bring the counts of some rows up to date.

        Args:
            requests: the batch's requests.
            rows: the rows to update, at most one per request.
            num_outputs: per batch row, the output tokens to count.
            pending: int64 [N] on the device; a row's last output token where the host has not seen it.

        Returns:
            int64 [len(rows)] on the device: each row's slot in `in_prompt` and `counts`.
        """
        self._reserve([requests[row] for row in rows], [num_outputs[row] for row in rows])
        slots = [self._slots[requests[row].request_id] for row in rows]
        seen_slots: list[int] = []
        seen_tokens: list[int] = []
        late_slots: list[int] = []
        late_rows: list[int] = []
        for slot, row in zip(slots, rows, strict=True):
            req = requests[row]
            counted = self._num_counted[req.request_id]
            known = min(num_outputs[row], len(req.output_token_ids))
            if known > counted:
                tokens = req.output_token_ids[counted:known]
                seen_tokens += tokens
                seen_slots += [slot] * len(tokens)
            if num_outputs[row] > max(known, counted):
                late_slots.append(slot)
                late_rows.append(row)
            self._num_counted[req.request_id] = num_outputs[row]
        if seen_tokens:
            self._add(seen_slots, to_device(np.array(seen_tokens, dtype=np.int64), self.counts.device))
        if late_rows:
            if pending is None:
                raise EngineError("a request has tokens that the host has not seen, and they were not passed on")
            index = to_device(np.array(late_rows, dtype=np.int64), self.counts.device)
            self._add(late_slots, pending[index])
        return to_device(np.array(slots, dtype=np.int64), self.counts.device)

    def _add(self, slots: list[int], tokens: Tensor) -> None:
        index = to_device(np.array(slots, dtype=np.int64), self.counts.device)
        one = torch.ones((), dtype=torch.int32, device=self.counts.device)
        self.counts.index_put_((index, tokens), one, accumulate=True)

    def _reserve(self, requests: list[Request], num_outputs: list[int]) -> None:
        """Give new requests a slot with their prompt in it, and start over where a count would have to shrink."""
        fresh = []
        for req, count in zip(requests, num_outputs, strict=True):
            if req.request_id not in self._slots:
                fresh.append(req)
            elif self._num_counted[req.request_id] > count:
                self.release(req.request_id)
                fresh.append(req)
        if not fresh:
            return
        self._grow(len(fresh))
        slots, tokens = [], []
        for req in fresh:
            slot = self._slots[req.request_id] = self._free.pop()
            self._num_counted[req.request_id] = 0
            slots += [slot] * len(req.prompt_token_ids)
            tokens += req.prompt_token_ids
        device = self.counts.device
        cleared = to_device(np.array([self._slots[req.request_id] for req in fresh], dtype=np.int64), device)
        self.in_prompt[cleared] = False
        self.counts[cleared] = 0
        pairs = to_device(np.array([slots, tokens], dtype=np.int64), device)
        self.in_prompt[pairs[0], pairs[1]] = True

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
