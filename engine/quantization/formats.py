"""From a checkpoint's packed tensors to a `PackedWeight`. engine/checkpoints/packed_entries.py draws the layouts.

Sources: AutoAWQ's `WQLinear_GEMM`, AutoGPTQ's `QuantLinear`, compressed-tensors' `pack_to_int32`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kvarena.engine.checkpoints.packed_entries import PackedEntry
from kvarena.engine.checkpoints.packed_settings import AWQ, GPTQ, PackedSettings
from kvarena.engine.errors import ModelError
from kvarena.engine.quantization.weight import PackedWeight, pack_codes, unpack_codes

# AWQ's int32 holds output 8 c + [0, 2, 4, 6, 1, 3, 5, 7][i] in its bits 4 i; so output 8 c + j is at place ORDER[j].
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


class InputOrder:
    """Which group each input of a layer belongs to, where the file says so (act-order).

    Args:
        entry: the layer.
        settings: of the checkpoint.
        indices: int [K], its `g_idx`; None: inputs lie in the order of their groups.

    Attributes:
        order: int64 [K], inputs sorted by group; None where they are.
        row_groups: int64 [K], for groups of unequal size; `order` is None then.

    Raises:
        ModelError: a group that the layer has not.
    """

    def __init__(self, entry: PackedEntry, settings: PackedSettings, indices: Tensor | None) -> None:
        self.order: Tensor | None = None
        self.row_groups: Tensor | None = None
        _check_groups(entry, indices)
        if indices is None or entry.num_groups == 1:
            return
        # Written without act-order it is zeros, or the order that the layer has anyway.
        if settings.acts_in_order and not indices.any():
            return
        groups = indices.long()
        order = torch.argsort(groups, stable=True)
        inputs = torch.arange(entry.num_inputs)
        if not torch.equal(groups[order], inputs // entry.group_size):
            self.row_groups = groups
        elif not torch.equal(order, inputs):
            self.order = order


def _check_groups(entry: PackedEntry, indices: Tensor | None) -> None:
    if indices is None or not len(indices):
        return
    low, high = int(indices.min()), int(indices.max())
    if low < 0 or high >= entry.num_groups:
        part = entry.parts.get("g_idx") or entry.parts["weight_g_idx"]
        wrong = low if low < 0 else high
        raise ModelError(
            f"{part.file}: {part.name} names group {wrong}, and the layer has groups 0 to {entry.num_groups - 1}; "
            "settings and weights do not belong together, or the file is broken"
        )


def packed_weight(
    entry: PackedEntry, settings: PackedSettings, parts: Mapping[str, Tensor], inputs: InputOrder
) -> PackedWeight:
    """A layer's weight.

    Args:
        entry: the layer.
        settings: of the checkpoint.
        parts: its tensors by suffix, on one device.
        inputs: its act-order.
    """
    make = {AWQ: _awq, GPTQ: _gptq}.get(settings.method, _compressed)
    codes, scales, zeros = make(entry, settings, parts)
    order = inputs.order
    if order is not None:
        order = order.to(codes.device)
        codes = codes[:, order]
        order = order.int()
    groups = None if inputs.row_groups is None else inputs.row_groups.to(codes.device)
    if entry.bits == 4:
        codes = pack_codes(codes)
    return PackedWeight(codes, scales.contiguous(), zeros, order, entry.group_size, groups)


Codes = tuple[Tensor, Tensor, Tensor | None]  # [N, K] one by one, scales [G, N], zeros [G, N]


def _awq(entry: PackedEntry, settings: PackedSettings, parts: Mapping[str, Tensor]) -> Codes:
    del entry, settings
    codes, zeros = (_awq_codes(parts[suffix]) for suffix in ("qweight", "qzeros"))
    return codes.t().contiguous(), parts["scales"], zeros


def _awq_codes(packed: Tensor) -> Tensor:
    return unpack_codes(packed).unflatten(-1, (-1, 8))[..., list(_AWQ_PLACES)].flatten(-2)


def _gptq(entry: PackedEntry, settings: PackedSettings, parts: Mapping[str, Tensor]) -> Codes:
    del entry
    # The first format stores zero points less one, in 4 bits: 0 becomes 15.
    zeros = (unpack_codes(parts["qzeros"]) + settings.zero_offset) & 15
    return unpack_codes(parts["qweight"].t()), parts["scales"], zeros


def _compressed(entry: PackedEntry, settings: PackedSettings, parts: Mapping[str, Tensor]) -> Codes:
    del settings
    scales, stored = _spread(parts["weight_scale"], entry), parts.get("weight_zero_point")
    if "weight_packed" not in parts:
        # Floats have none; a file may say so with zeros.
        has_zeros = stored is not None and parts["weight"].dtype == torch.int8
        return parts["weight"], scales, stored.t().contiguous() if has_zeros and stored is not None else None
    # Zero points lie eight or four outputs in an int32; codes and they are stored moved up by half their range.
    zeros = None if stored is None else stored.t()
    if entry.bits == 4:
        return unpack_codes(parts["weight_packed"]), scales, None if zeros is None else unpack_codes(zeros)
    return _signed(parts["weight_packed"]), scales, None if zeros is None else _signed(zeros)


def _signed(packed: Tensor) -> Tensor:
    """Bytes that were moved up by 128: int32 [..., n] -> int8 [..., 4 n]."""
    return (packed.contiguous().view(torch.uint8) ^ 128).view(torch.int8)


def _spread(scale: Tensor, entry: PackedEntry) -> Tensor:
    """Scales of outputs, of a whole tensor or of blocks as [G, N]."""
    if scale.dim() < 2:
        scale = scale.reshape(-1, 1)
    return scale.repeat_interleave(entry.num_outputs // len(scale), dim=0).t()
