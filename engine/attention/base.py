"""What a step's attention needs to know, and what a backend must do with it.

A batch is flattened: the new tokens of all its requests lie one after the other, [T, heads, head_dim].

    query_start_loc   0        3  4              9          request b owns query rows [loc[b], loc[b + 1])
                      | b = 0  |b1|    b = 2     |
    seq_lens             40     17      5                   its context, new tokens among them
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from kvarena.engine.sharing.reads import SharedReads


@dataclass(slots=True)
class AttentionMetadata:
    """One step's batch of B requests with T new tokens. Tensors are on the pool's device.

    Attributes:
        query_start_loc: int32 [B + 1], where each request's new tokens start.
        seq_lens: int32 [B], tokens that the request's last new token attends to, itself included.
        slot_mapping: int64 [T], the slot of each new token.
        block_table: int32 [B, width], block ids by block index; entries beyond the context are not read.
        logits_indices: int64 [num_sampled], the flat indices of the tokens whose logits are wanted.
        max_query_len: most new tokens of one request.
        max_seq_len: longest context.
        block_size: slots per block.
        host_query_start_loc: `query_start_loc` as a host array, so that nobody has to wait for the device.
        host_seq_lens: `seq_lens` as a host array.
        reads: how requests with one new token read what they have in common once; None: each reads its own context.
            For a backend with `most_shared_rows`; others read everything row by row.
        prepared: what the backend's `prepare` made of this step; nobody else looks at it.
    """

    query_start_loc: Tensor
    seq_lens: Tensor
    slot_mapping: Tensor
    block_table: Tensor
    logits_indices: Tensor
    max_query_len: int
    max_seq_len: int
    block_size: int
    host_query_start_loc: np.ndarray
    host_seq_lens: np.ndarray
    reads: SharedReads | None = None
    prepared: Any = None


def packed_metadata(
    lens: Sequence[int], block_table: np.ndarray, block_size: int, device: torch.device
) -> AttentionMetadata:
    """Metadata of whole sequences computed from their first token, with logits at each one's last.

    Args:
        lens: tokens of each of the B sequences.
        block_table: int32 [B, width], wide enough for them.
        block_size: slots per block.
        device: where the tensors go.
    """
    seq_lens = np.array(lens, dtype=np.int32)
    loc = np.concatenate([[0], np.cumsum(seq_lens)]).astype(np.int32)
    row = np.repeat(np.arange(len(seq_lens)), seq_lens)
    position = np.arange(loc[-1]) - loc[:-1][row]
    slots = block_table[row, position // block_size].astype(np.int64) * block_size + position % block_size
    return AttentionMetadata(
        query_start_loc=torch.from_numpy(loc).to(device),
        seq_lens=torch.from_numpy(seq_lens).to(device),
        slot_mapping=torch.from_numpy(slots).to(device),
        block_table=torch.from_numpy(block_table).to(device),
        logits_indices=torch.from_numpy(loc[1:].astype(np.int64) - 1).to(device),
        max_query_len=int(seq_lens.max()),
        max_seq_len=int(seq_lens.max()),
        block_size=block_size,
        host_query_start_loc=loc,
        host_seq_lens=seq_lens,
    )


class AttentionBackend(Protocol):
    """Stores new keys and values in the pool and attends through block tables. One backend serves one pool."""

    def prepare(self, meta: AttentionMetadata) -> None:
        """Compute, once per step, what all layers share, and keep it in `meta.prepared`."""
        ...

    def write_kv(self, k: Tensor, v: Tensor, layer: int, meta: AttentionMetadata) -> None:
        """Store keys and values [T, num_kv_heads, head_dim] of the new tokens at `meta.slot_mapping`."""
        ...

    def attend(
        self,
        q: Tensor,
        layer: int,
        meta: AttentionMetadata,
        *,
        scale: float,
        sliding_window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Causal attention of the new tokens over their contexts; their own KV has been written.

        Of a request with one new token, the rest of its context must have been complete before this step: a kernel may
        read it while this step's keys and values are being stored.

        Args:
            q: [T, num_heads, head_dim]; query head h reads KV head h // (num_heads / num_kv_heads).
            layer: index of the layer in the pool.
            meta: the step.
            scale: factor on the scores.
            sliding_window: a query at position p sees keys at positions above p - sliding_window; None: all.
            softcap: scores become softcap * tanh(score / softcap).
            sinks: [num_heads], a score per head that takes part in the softmax and has no value.

        Returns:
            [T, num_heads, head_dim], in q's dtype.
        """
        ...


@runtime_checkable
class KeepingBackend(AttentionBackend, Protocol):
    """A backend that in some steps reads the new tokens' keys and values beside the pool."""

    def wants_kv(self, meta: AttentionMetadata) -> bool:
        """Whether this is such a step: `keep_kv` then saves it from reading back what was just stored."""
        ...

    def keep_kv(self, k: Tensor, v: Tensor, layer: int, meta: AttentionMetadata) -> None:
        """Hand over what the caller itself has stored at `meta.slot_mapping`.

        Args:
            k, v: [T, num_kv_heads, head_dim], the keys rotated; not to be changed before `attend` of this layer.
            layer: index of the layer in the pool.
            meta: the step.
        """
        ...

    def warm_up(self) -> None:
        """Load what such steps need and no other did, so that none of them waits for it."""
        ...


@runtime_checkable
class SharingBackend(AttentionBackend, Protocol):
    """A backend that can read once what requests with one new token have in common."""

    @property
    def most_shared_rows(self) -> int:
        """Most requests that one item of `AttentionMetadata.reads` may have."""
        ...

    def can_share(self, reads: SharedReads) -> bool:
        """Whether there is room for a step's plan; if not, it must come without."""
        ...
