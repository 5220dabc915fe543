"""Attention by the items of a step's shared reads, in plain torch: what a kernel does, where none can run."""

from typing import Any

import torch
from fused_helpers import LateReference
from torch import Tensor

from kvarena.engine.attention.base import AttentionMetadata
from kvarena.engine.sharing.reads import SharedReads


class SharedReference(LateReference):
    """A reference that reads every item through its first row's block table.

    Attributes:
        num_shared: items of several rows that were read so far.
    """

    most_shared_rows = 3
    num_shared = 0

    def reserve(
        self, meta: AttentionMetadata, num_rows: int, num_prefill_tokens: int = 0, *, shares: bool = False
    ) -> None:
        super().reserve(meta, num_rows, num_prefill_tokens)

    def can_share(self, reads: SharedReads) -> bool:
        return int(reads.parts.sum()) < 40  # some steps do not fit

    def attend(self, q: Tensor, layer: int, meta: AttentionMetadata, **options: Any) -> Tensor:
        whole = super().attend(q, layer, meta, **options)
        reads = meta.reads
        if reads is None:
            return whole
        keys, values = self.pool.slots(layer)
        group, table, size = q.shape[1] // keys.shape[1], meta.block_table.long(), meta.block_size
        loc = meta.query_start_loc.tolist()
        out = whole.clone()
        parts: dict[int, list[tuple[Tensor, Tensor]]] = {place: [] for place in reads.order.tolist()}
        columns = (reads.first, reads.num_rows, reads.begin, reads.end)
        for first, count, begin, end in zip(*(column.tolist() for column in columns), strict=True):
            places = reads.order[first : first + count].tolist()
            self.num_shared += count > 1
            at = torch.arange(begin, end)
            slots = table[places[0], at // size] * size + at % size
            k, v = (part[slots].repeat_interleave(group, 1) for part in (keys, values))
            scores = torch.einsum("nhd,khd->nhk", q[[loc[place] for place in places]], k) * options["scale"]
            if (window := options.get("sliding_window")) is not None:
                seen = at[None] >= meta.seq_lens[places][:, None] - window
                scores = scores.masked_fill(~seen[:, None], -torch.inf)
            sums = torch.einsum("nhk,khd->nhd", scores.softmax(-1).nan_to_num(), v)
            for place, total, part in zip(places, scores.logsumexp(-1), sums, strict=True):
                parts[place].append((total, part))
        for place, found in parts.items():
            weights = torch.stack([total for total, _ in found]).softmax(0)
            out[loc[place]] = (weights[..., None] * torch.stack([part for _, part in found])).sum(0)
        return out
