"""The three penalties in one pass over the logits of the rows that use them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvarena.engine.kernels.common import await_previous, launch_options
from kvarena.engine.sampling.batch import Penalties

_TILE = 1024


def penalize_rows(logits: Tensor, penalties: Penalties) -> Tensor:
    """As `kvarena.engine.sampling.transforms.penalize_rows`, in place."""
    p, vocab_size = penalties, logits.shape[1]
    rows = torch.arange(len(p.slots), device=logits.device) if p.rows.index is None else p.rows.index
    penalize_kernel[(len(p.slots), triton.cdiv(vocab_size, _TILE))](
        logits, rows, p.slots, p.presence, p.frequency, p.repetition, p.in_prompt.view(torch.uint8), p.counts,
        vocab_size, logits.stride(0), p.counts.stride(0), TILE=_TILE,
        **launch_options(),
    )  # fmt: skip
    return logits


@triton.jit
def penalize_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, rows_ptr, slots_ptr, presence_ptr, frequency_ptr, repetition_ptr, in_prompt_ptr, counts_ptr,
    vocab_size, stride_logits, stride_counts, TILE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One tile of one penalized row; the grid is (penalized rows, tiles)."""
    await_previous(OVERLAP)
    i = tl.program_id(0)
    row = tl.load(rows_ptr + i)
    tokens = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = tokens < vocab_size
    at = tl.load(slots_ptr + i) * stride_counts + tokens
    prompt = tl.load(in_prompt_ptr + at, mask=inside, other=0)
    count = tl.load(counts_ptr + at, mask=inside, other=0)
    logit = tl.load(logits_ptr + row * stride_logits + tokens, mask=inside, other=0.0)
    in_output = count > 0
    factor = tl.where((prompt != 0) | in_output, tl.load(repetition_ptr + i), 1.0)
    logit = tl.where(logit > 0, tl.div_rn(logit, factor), logit * factor)
    logit -= tl.load(frequency_ptr + i) * count.to(tl.float32)
    logit -= tl.where(in_output, tl.load(presence_ptr + i), 0.0)
    tl.store(logits_ptr + row * stride_logits + tokens, logit, mask=inside)
