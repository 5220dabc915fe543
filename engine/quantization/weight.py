"""A packed weight in the one form that every format is turned into.

codes   int32 [N, K/8]       eight codes of 4 bits of one output side by side, the first input's lowest
        int8 or float8 [N, K]
scales  float [G, N]         of a group of inputs
zeros   uint8 [G, N]         the code that stands for 0; None: 8 of 4 bits, 0 of others
order   int32 [K]            codes' column k belongs to input order[k], so that a group's inputs lie together

weight[n, order[k]] = scales[k // group_size, n] * (codes[n, k] - zeros[k // group_size, n])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

MIDDLE = 8  # the code of 4 bits that stands for 0 where no zero points are kept


@dataclass(frozen=True)
class PackedWeight:
    """A weight [N, K] in few bits; the fields are the module's drawing.

    Attributes:
        row_groups: int64 [K], each input's group where groups are of unequal size; no kernel multiplies such a weight.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    order: Tensor | None
    group_size: int
    row_groups: Tensor | None = None

    @property
    def bits(self) -> int:
        """Of a code."""
        return 4 if self.codes.dtype == torch.int32 else 8

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs: N, K."""
        rows, cols = self.codes.shape
        return rows, cols * 8 if self.bits == 4 else cols

    @property
    def num_bytes(self) -> int:
        """Memory that it takes."""
        parts = (self.codes, self.scales, self.zeros, self.order)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [N, K], inputs in the model's order; multiplied in float32 and rounded once."""
        num_inputs = self.shape[1]
        codes = unpack_codes(self.codes) if self.bits == 4 else self.codes
        groups = self.row_groups
        if groups is None:
            groups = torch.arange(num_inputs, device=codes.device) // self.group_size
        values = codes.float()
        if self.zeros is not None:
            values -= self.zeros.float().t()[:, groups]
        elif self.bits == 4:
            values -= MIDDLE
        values *= self.scales.float().t()[:, groups]
        if self.order is not None:
            values = torch.empty_like(values).index_copy_(1, self.order.long(), values)
        return values.to(dtype)

    def select_rows(self, rows: Tensor | slice) -> PackedWeight:
        """Some outputs, as a packed weight of their own. `rows`: int64, or a slice."""
        return replace(
            self,
            codes=self.codes[rows],
            scales=self.scales[:, rows],
            zeros=None if self.zeros is None else self.zeros[:, rows],
        )

    def select_inputs(self, inputs: slice) -> PackedWeight:
        """Some inputs, whole groups of them in the model's order, as a packed weight of their own."""
        step, groups = 8 if self.bits == 4 else 1, slice(0, 1)
        if len(self.scales) > 1:
            groups = slice(inputs.start // self.group_size, inputs.stop // self.group_size)
        return replace(
            self,
            codes=self.codes[:, inputs.start // step : inputs.stop // step].contiguous(),
            scales=self.scales[groups],
            zeros=None if self.zeros is None else self.zeros[groups],
            group_size=min(self.group_size, inputs.stop - inputs.start),
        )

    def without_zeros(self) -> PackedWeight:
        """The same, without zero points where all of them are what none at all means."""
        usual = MIDDLE if self.bits == 4 else 0
        is_plain = self.zeros is not None and bool((self.zeros == usual).all())
        return replace(self, zeros=None) if is_plain else self


def join(weights: Sequence[PackedWeight]) -> PackedWeight | None:
    """Weights of one input as one, their outputs in order; None where they are packed in different ways."""
    first = weights[0]
    for other in weights[1:]:
        if not _alike(first, other):
            return None
    zeros = None
    if any(weight.zeros is not None for weight in weights):
        made = [torch.full_like(w.scales, MIDDLE, dtype=torch.uint8) if w.zeros is None else w.zeros for w in weights]
        zeros = torch.cat(made, dim=1)
    return replace(
        first,
        codes=torch.cat([weight.codes for weight in weights]),
        scales=torch.cat([weight.scales for weight in weights], dim=1),
        zeros=zeros,
    )


def _alike(a: PackedWeight, b: PackedWeight) -> bool:
    same_order = (a.order is None) == (b.order is None) and (
        a.order is None or b.order is None or torch.equal(a.order, b.order)
    )
    ways = [(w.codes.dtype, w.shape[1], w.group_size, len(w.scales), w.scales.dtype) for w in (a, b)]
    # Codes of 8 bits have no middle that stands for zero points left out.
    same_zeros = a.bits == 4 or (a.zeros is None) == (b.zeros is None)
    return same_order and same_zeros and ways[0] == ways[1] and a.row_groups is None and b.row_groups is None


def unpack_codes(packed: Tensor) -> Tensor:
    """Codes of 4 bits: int32 [..., n] -> uint8 [..., 8 n], the lowest bits first."""
    pairs = packed.contiguous().view(torch.uint8)
    return torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(-2)


def pack_codes(codes: Tensor) -> Tensor:
    """The inverse of `unpack_codes`: uint8 [..., 8 n] -> int32 [..., n]."""
    return (codes[..., 0::2] | (codes[..., 1::2] << 4)).contiguous().view(torch.int32)
