"""From a step plan to the tensors of its forward, vectorised over requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvarena.engine.attention.base import AttentionMetadata
from kvarena.engine.contract import KVAllocator, ScheduledRequest, StepPlan, cdiv
from kvarena.engine.errors import EngineError
from kvarena.engine.request import Request
from kvarena.engine.runner.prompt_logprobs import PromptRows, prompt_rows
from kvarena.engine.runner.request_rows import RequestRows
from kvarena.engine.runner.rope_positions import rope_positions
from kvarena.engine.sampling.transfer import to_device


class StepInputs(NamedTuple):
    """A step's forward.

    Attributes:
        input_ids: int64 [T]; -1 where only the device has the token.
        positions: int64 [T]; [3, T] in a step with images of a model whose positions have three dimensions.
        meta: what attention needs.
        pending: flat indices of the tokens that only the device has.
        pending_rows: their rows: each is what its row sampled last.
        rows: the row of each scheduled request.
        prompt_rows: the logits behind the sampled ones, for prompt log-probabilities; None when nobody asks.
    """

    input_ids: Tensor
    positions: Tensor
    meta: AttentionMetadata
    pending: np.ndarray
    pending_rows: np.ndarray
    rows: np.ndarray
    prompt_rows: PromptRows | None


def build_inputs(
    plan: StepPlan,
    allocator: KVAllocator,
    request_rows: RequestRows,
    device: torch.device,
    *,
    has_grids: bool = False,
) -> StepInputs:
    """Build a step's inputs; block tables are read from the allocator through `request_rows`.

    With `has_grids` the model's positions have three dimensions where a request has images.

    Raises:
        EngineError: a request's block table ends before its new tokens, or one of these is nowhere (a bug of the
            allocator or scheduler).
    """
    block_size = allocator.block_size
    scheduled = plan.scheduled
    rows = request_rows.of_step(scheduled, allocator)
    ids = input_tokens(scheduled, request_rows.columns["sampled_to"][rows])
    starts = np.fromiter((entry.start for entry in scheduled), np.int64, len(scheduled))
    new = np.fromiter((entry.num_new_tokens for entry in scheduled), np.int64, len(scheduled))
    stops = starts + new
    loc = np.zeros(len(scheduled) + 1, dtype=np.int64)
    np.cumsum(new, out=loc[1:])
    token_to_entry = np.repeat(np.arange(len(scheduled)), new)
    positions = np.arange(loc[-1]) + (starts - loc[:-1])[token_to_entry]
    max_seq_len = int(stops.max())
    table_rows = request_rows.tables.take(rows, cdiv(max_seq_len, block_size))
    block_index, offset = np.divmod(positions, block_size)
    slots = table_rows[token_to_entry, block_index].astype(np.int64) * block_size + offset
    logits_indices = loc[1:][np.fromiter(plan.samples, np.bool_, len(scheduled))] - 1
    prompts = prompt_rows(plan, loc)
    if prompts is not None:
        logits_indices = np.concatenate([logits_indices, prompts.indices])

    host_loc, host_lens = loc.astype(np.int32), stops.astype(np.int32)
    meta = AttentionMetadata(
        query_start_loc=to_device(host_loc, device),
        seq_lens=to_device(host_lens, device),
        slot_mapping=to_device(slots, device),
        block_table=to_device(table_rows, device),
        logits_indices=to_device(logits_indices, device),
        max_query_len=int(new.max()),
        max_seq_len=max_seq_len,
        block_size=block_size,
        host_query_start_loc=host_loc,
        host_seq_lens=host_lens,
    )
    pending = np.flatnonzero(ids < 0)
    pending_rows = rows[token_to_entry[pending]]
    if has_grids and any(entry.req.images for entry in scheduled):
        positions = rope_positions(scheduled)
    return StepInputs(to_device(ids, device), to_device(positions, device), meta, pending, pending_rows, rows, prompts)


def input_tokens(scheduled: Sequence[ScheduledRequest], sampled_to: np.ndarray) -> np.ndarray:
    """A step's input tokens int64 [T], -1 where only the device has one.

    Args:
        scheduled: the step's entries.
        sampled_to: of each, the position of the last token that the device has.

    Raises:
        EngineError: neither has a token.
    """
    tokens: list[int] = []
    for (req, start, count), on_device in zip(scheduled, sampled_to.tolist(), strict=True):
        known = req.token_ids(start, start + count)
        tokens += known
        if len(known) < count:
            if len(known) + 1 < count or on_device != start + count - 1:
                raise missing_token(req, start + count - 1)
            tokens.append(-1)
    return np.array(tokens, dtype=np.int64)


def missing_token(req: Request, position: int) -> EngineError:
    """A scheduler plans to compute a token that nobody has."""
    return EngineError(
        f"request {req.request_id!r} is to compute position {position}, and neither host nor device has its token: it "
        f"has {req.num_tokens} tokens and {req.num_pending_tokens} pending; a bug of the scheduler"
    )
