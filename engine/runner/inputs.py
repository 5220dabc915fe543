"""From a step plan to the tensors of its forward, vectorised over requests.

Block tables live in one array with a row per request, so that a step copies what changed and not every table:

    _tables    row 0 | 7 8 9 0 0 |  req "a"        rows of the step's requests --> block_table [B, width]
               row 1 | 3 0 0 0 0 |  req "b"
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvarena.engine.attention.base import AttentionMetadata
from kvarena.engine.contract import KVAllocator, ScheduledRequest, StepPlan, cdiv
from kvarena.engine.errors import EngineError
from kvarena.engine.runner.prompt_logprobs import PromptRows, prompt_rows


class PendingInput(NamedTuple):
    """Input tokens that the host has not seen yet: flat token `tokens[i]` is what row `rows[i]` sampled last."""

    tokens: list[int]
    rows: list[int]


class StepInputs(NamedTuple):
    """A step's forward.

    Attributes:
        input_ids: int64 [T]; 0 where `pending` says that the token is on the device only.
        positions: int64 [T].
        meta: what attention needs.
        pending: tokens to take from the device.
        rows: the row of each scheduled request.
        prompt_rows: the logits behind the sampled ones, for prompt log-probabilities; None when nobody asks.
    """

    input_ids: Tensor
    positions: Tensor
    meta: AttentionMetadata
    pending: PendingInput
    rows: np.ndarray
    prompt_rows: PromptRows | None


class BlockTables:
    """Block tables of the requests in the engine, one row each.

    A table is compared with what was copied last time (most are unchanged, and comparing lists of the same ints is
    much cheaper than converting them), so an allocator may change any entry at any time.
    """

    def __init__(self) -> None:
        self._tables = np.zeros((16, 16), dtype=np.int32)
        self._rows: dict[str, int] = {}
        self._free = list(range(15, -1, -1))
        self._copied: list[Sequence[int]] = [()] * 16

    @property
    def num_rows(self) -> int:
        """Rows there are, used or free; grows."""
        return len(self._tables)

    def row(self, request_id: str) -> int:
        """The request's row, a fresh one at its first step."""
        row = self._rows.get(request_id)
        if row is None:
            if not self._free:
                self._grow_rows()
            row = self._rows[request_id] = self._free.pop()
        return row

    def release(self, request_ids: Sequence[str]) -> None:
        """Give rows back."""
        for request_id in request_ids:
            row = self._rows.pop(request_id, None)
            if row is not None:
                self._free.append(row)
                self._copied[row] = ()

    def update(self, row: int, table: Sequence[int]) -> None:
        """Bring a row up to date with the allocator's table."""
        copied = self._copied[row]
        if copied == table:
            return
        count = len(table)
        if count > self._tables.shape[1]:
            self._grow_width(count)
        # The common change is a block more; all but the last entries then need no conversion.
        kept = len(copied)
        if not (kept < count and isinstance(table, list) and table[:kept] == copied):
            kept = 0
        self._tables[row, kept:count] = table[kept:]
        self._copied[row] = table if isinstance(table, (range, tuple)) else list(table)

    def take(self, rows: np.ndarray, width: int) -> np.ndarray:
        """Block tables int32 [len(rows), width] as a new array; entries beyond a table's end are undefined."""
        if width > self._tables.shape[1]:
            self._grow_width(width)
        return self._tables[rows, :width]

    def num_blocks(self, row: int) -> int:
        """Length of the row's table."""
        return len(self._copied[row])

    def _grow_rows(self) -> None:
        count = len(self._tables)
        self._tables = np.concatenate([self._tables, np.zeros_like(self._tables)])
        self._copied += [()] * count
        self._free = list(range(2 * count - 1, count - 1, -1))

    def _grow_width(self, width: int) -> None:
        wider = np.zeros((len(self._tables), max(width, 2 * self._tables.shape[1])), dtype=np.int32)
        wider[:, : self._tables.shape[1]] = self._tables
        self._tables = wider


def build_inputs(plan: StepPlan, allocator: KVAllocator, tables: BlockTables, device: torch.device) -> StepInputs:
    """Build a step's inputs; block tables are read from the allocator through `tables`.

    Raises:
        EngineError: a request's block table ends before its new tokens (a bug of the allocator or scheduler).
    """
    block_size = allocator.block_size
    scheduled = plan.scheduled
    pending = PendingInput([], [])
    token_ids: list[int] = []
    rows = np.empty(len(scheduled), dtype=np.int64)
    for i, entry in enumerate(scheduled):
        rows[i] = row = tables.row(entry.req.request_id)
        table = allocator.block_table(entry.req)
        if len(table) * block_size < entry.start + entry.num_new_tokens:
            raise EngineError(
                f"request {entry.req.request_id!r} computes positions up to {entry.start + entry.num_new_tokens} and "
                f"its block table holds {len(table) * block_size} slots; a bug of the allocator or scheduler"
            )
        tables.update(row, table)
        _append_tokens(entry, row, token_ids, pending)

    starts = np.fromiter((entry.start for entry in scheduled), np.int64, len(scheduled))
    new = np.fromiter((entry.num_new_tokens for entry in scheduled), np.int64, len(scheduled))
    stops = starts + new
    loc = np.zeros(len(scheduled) + 1, dtype=np.int64)
    np.cumsum(new, out=loc[1:])
    token_to_entry = np.repeat(np.arange(len(scheduled)), new)
    positions = np.arange(loc[-1]) + (starts - loc[:-1])[token_to_entry]
    max_seq_len = int(stops.max())
    table_rows = tables.take(rows, cdiv(max_seq_len, block_size))
    block_index, offset = np.divmod(positions, block_size)
    slots = table_rows[token_to_entry, block_index].astype(np.int64) * block_size + offset
    logits_indices = loc[1:][np.fromiter(plan.samples, np.bool_, len(scheduled))] - 1
    prompts = prompt_rows(plan, loc)
    if prompts is not None:
        logits_indices = np.concatenate([logits_indices, prompts.indices])

    host_loc, host_lens = loc.astype(np.int32), stops.astype(np.int32)
    meta = AttentionMetadata(
        query_start_loc=_to(host_loc, device),
        seq_lens=_to(host_lens, device),
        slot_mapping=_to(slots, device),
        block_table=_to(table_rows, device),
        logits_indices=_to(logits_indices, device),
        max_query_len=int(new.max()),
        max_seq_len=max_seq_len,
        block_size=block_size,
        host_query_start_loc=host_loc,
        host_seq_lens=host_lens,
    )
    ids = np.array(token_ids, dtype=np.int64)
    return StepInputs(_to(ids, device), _to(positions, device), meta, pending, rows, prompts)


def _append_tokens(entry: ScheduledRequest, row: int, token_ids: list[int], pending: PendingInput) -> None:
    """Append the entry's input tokens; a last one that is on the device only becomes pending."""
    req, start, count = entry
    known = req.token_ids(start, start + count)
    token_ids += known
    missing = count - len(known)
    if missing == 0:
        return
    if missing > 1 or req.num_pending_tokens == 0:
        raise EngineError(
            f"request {req.request_id!r} is to compute positions up to {start + count}, and has {req.num_tokens} "
            f"tokens and {req.num_pending_tokens} pending; a bug of the scheduler"
        )
    pending.tokens.append(len(token_ids))
    pending.rows.append(row)
    token_ids.append(0)


def _to(array: np.ndarray, device: torch.device) -> Tensor:
    """The array on the device, without waiting for a GPU."""
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
