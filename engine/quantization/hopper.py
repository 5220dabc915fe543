"""Packed products on Hopper by our own CUDA kernels, for weights of 4 bits: packed_stream.py for few rows of x, which
memory bounds, and packed_wide.py for many, which arithmetic bounds. Both read one layout, the only one that is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvarena.engine.quantization.weight import PackedWeight, unpack_codes

if TYPE_CHECKING:
    from kvarena.engine.kernels.gemm.packed_stream import PackedStreamTile, StreamWeight
    from kvarena.engine.kernels.gemm.packed_wide import PackedWideTile

NUM_ROWS = 4  # of the comparison with another product
TOLERANCE = 0.02  # largest ||ours - the other|| / ||the other||: both round their result alone
# Rows for which a weight must have a launch to be taken: one of each kind.
ROWS = (1, 8, 16, 32, 64, 128, 256, 512)
# Rows of steps with prompts: any others have the launch of one of these.
PROMPT_ROWS = (*range(32, 2049, 32), 4096, 8192)


class HopperDevice:
    """What the products of a device share: the kernels that are compiled for it.

    Args:
        device: a Hopper GPU.

    Raises:
        OSError: its kernels cannot be compiled or launched.
    """

    def __init__(self, device: torch.device) -> None:
        from kvarena.engine.kernels.gemm.packed_stream import PackedStreamGemm
        from kvarena.engine.kernels.gemm.packed_wide import PackedWideGemm
        from kvarena.engine.kernels.hopper import load_hopper_kernels

        kernels = load_hopper_kernels(device)
        if kernels is None:
            raise OSError("no Hopper GPU, or NVRTC is not installed")
        self.stream, self.wide = PackedStreamGemm(kernels), PackedWideGemm(kernels)
        self.num_multiprocessors = kernels.num_multiprocessors

    def prepare(
        self, weight: StreamWeight, rows: Iterable[int], *, norm: bool, fuse_norm: bool, mode: str, half: bool
    ) -> None:
        """Compile what `weight` is multiplied by for so many rows of x: several kernels at a time.

        `norm`: one comes before, which the kernel may take in with `fuse_norm`. `mode`, `half`: see
        `PackedStreamLaunch`.
        """
        from kvarena.engine.kernels.gemm.packed_stream import PackedStreamLaunch, PackedStreamTile

        streams, wides = [], []
        for num_rows in rows:
            tile = hopper_tile(num_rows, weight, self.num_multiprocessors, norm=norm, glu=mode == "GLU")
            if isinstance(tile, PackedStreamTile):
                tile = tile._replace(fuse_norm=tile.fuse_norm and fuse_norm)
                streams.append(PackedStreamLaunch(tile, num_rows, weight.shape[1], weight.groups, mode, half))
            elif tile is not None:
                wides.append((tile, weight.groups, mode, half))
        self.stream.prepare(streams)
        self.wide.prepare(wides)


@cache
def hopper_device(device: torch.device) -> HopperDevice | None:
    """The one of a device; None where it is no Hopper GPU, or what compiles its kernels is not installed."""
    try:
        return HopperDevice(device)
    except (ImportError, OSError):
        return None


class HopperProduct:
    """The product of one weight.

    Args:
        weight: of 4 bits, on a Hopper GPU; not needed afterwards.
        device: of the weight.
        gated: its first half of outputs is a gate's, the other its up value's.
    """

    def __init__(self, weight: PackedWeight, device: HopperDevice, *, gated: bool) -> None:
        from kvarena.engine.kernels.gemm.packed_stream import pack_stream

        self._device, self._order = device, weight.order
        codes = unpack_codes(weight.codes)
        self._weight = pack_stream(codes, weight.scales, weight.zeros, weight.group_size, glu=gated)
        self._tiles: dict[tuple[int, bool, bool], PackedStreamTile | PackedWideTile | None] = {}

    @property
    def is_gated(self) -> bool:
        """Whether it holds a gate and its up value, for a product with `glu`."""
        return self._weight.glu

    @property
    def num_bytes(self) -> int:
        """See `Product`."""
        return self._weight.num_bytes + (0 if self._order is None else self._order.numel() * 4)

    @property
    def kind(self) -> tuple[tuple[int, int], int, bool]:
        """Products of one kind have the same launches."""
        return self._weight.shape, self._weight.groups, self.is_gated

    def prepare(self, rows: Iterable[int], dtype: torch.dtype, *, norm: bool) -> None:
        """Compile the kernels for so many rows of x of `dtype`; without `norm` before it, it adds to a residual."""
        mode = "GLU" if self.is_gated else "STORE" if norm else "ADD"
        half, fuse_norm = dtype == torch.float16, self._order is None
        self._device.prepare(self._weight, rows, norm=norm, fuse_norm=fuse_norm, mode=mode, half=half)

    @property
    def serves_all_rows(self) -> bool:
        """Whether there is a launch for any number of rows of x."""
        kinds = [(norm, glu) for norm in (False, True) for glu in {False, self.is_gated}]
        return all(self._tile(rows, norm=norm, glu=glu) is not None for norm, glu in kinds for rows in ROWS)

    def __call__(self, x: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor | None) -> Tensor:
        """See `Product`."""
        if not self.is_gated:
            y = self.fused(x, None, residual, out, glu=False)
            return y if bias is None else y.add_(bias)
        # Rows of gate and up, and so the product's columns, take turns of 8.
        turns = self.fused(x, None, None, None, glu=False)
        y = turns.view(len(x), turns.shape[1] // 16, 2, 8).transpose(1, 2).reshape(turns.shape)
        for other in (bias, residual):
            y = y if other is None else y.add_(other)
        return y if out is None else out.copy_(y)

    def fused(
        self,
        x: Tensor,
        norm: tuple[Tensor, float] | None,
        residual: Tensor | None,
        out: Tensor | None,
        *,
        glu: bool,
    ) -> Tensor:
        """[norm ->] x @ weight.T [-> silu(gate) * up, of a gated weight] [+ residual]; `norm`: weight and eps."""
        from kvarena.engine.kernels.gemm.packed_stream import PackedStreamTile

        if out is None:
            out = x.new_empty(len(x), self._weight.shape[0] // (2 if glu else 1))
        if not len(x):
            return out
        tile = self._tile(len(x), norm=norm is not None, glu=glu)
        assert tile is not None, "`serves_all_rows` was asked before"
        takes_norm = isinstance(tile, PackedStreamTile) and tile.fuse_norm
        if norm is not None and not (takes_norm and self._order is None):
            # Imported here: Triton is not needed, and may not be there, without a GPU.
            from kvarena.engine.kernels.norm import rms_norm

            x, norm = rms_norm(x, *norm), None
        if self._order is not None:
            x = x.index_select(1, self._order)
        elif x.stride(1) != 1 or x.stride(0) % 8:
            x = x.contiguous()
        if isinstance(tile, PackedStreamTile):
            tile = tile._replace(fuse_norm=norm is not None)
            weight, eps = (None, 0.0) if norm is None else norm
            return self._device.stream(x, self._weight, tile, norm=weight, eps=eps, residual=residual, out=out, glu=glu)
        return self._device.wide(x, self._weight, tile, residual=residual, out=out, glu=glu)

    def _tile(self, num_rows: int, *, norm: bool, glu: bool) -> PackedStreamTile | PackedWideTile | None:
        key = num_rows, norm, glu
        if key not in self._tiles:
            self._tiles[key] = hopper_tile(num_rows, self._weight, self._device.num_multiprocessors, norm=norm, glu=glu)
        return self._tiles[key]


def hopper_tile(
    num_rows: int, weight: StreamWeight, num_multiprocessors: int, *, norm: bool, glu: bool
) -> PackedStreamTile | PackedWideTile | None:
    """The launch for so many rows of x, by measurements of Llama-3.1-8B's products (docs/gpu.md); None if none fits.

    `norm` and `glu`: what comes before and after.
    """
    from kvarena.engine.kernels.gemm.packed_stream import packed_stream_tile
    from kvarena.engine.kernels.gemm.packed_wide import packed_wide_tile

    stream = packed_stream_tile(num_rows, weight, num_multiprocessors, norm=norm)
    wide = packed_wide_tile(num_rows, weight, num_multiprocessors, glu=glu)
    first, second = (stream, wide) if _is_stream(num_rows, len(weight.chunks), num_multiprocessors) else (wide, stream)
    return second if first is None else first


def _is_stream(num_rows: int, num_blocks: int, num_multiprocessors: int) -> bool:
    """Whether x of so many rows is faster as a stream of weights."""
    if num_rows <= 32:
        return True
    few, many = 2 * num_blocks <= num_multiprocessors, num_blocks >= 2 * num_multiprocessors
    return (few and num_rows <= 128) or (many and num_rows <= 64)


def hopper_product(
    weight: PackedWeight,
    dtype: torch.dtype,
    judge: Callable[[Tensor, None, None, None], Tensor],
    *,
    gated: bool,
) -> HopperProduct | None:
    """The product of `weight` by the kernel for Hopper; None where the device, dtype or weight is not for it.

    Args:
        weight: on a GPU.
        dtype: of x.
        judge: another product of the same weight, with which a few rows are compared.
        gated: see `HopperProduct`.
    """
    device = hopper_device(weight.codes.device) if _is_for(weight, dtype, gated=gated) else None
    if device is None:
        return None
    product = HopperProduct(weight, device, gated=gated)
    if not product.serves_all_rows:
        return None
    x = torch.randn(NUM_ROWS, weight.shape[1], device=weight.codes.device, dtype=dtype)
    got, want = product(x, None, None, None).float(), judge(x, None, None, None).float()
    difference = float((got - want).norm() / want.norm().clamp(min=1e-30))
    return product if difference <= TOLERANCE else None


def _is_for(weight: PackedWeight, dtype: torch.dtype, *, gated: bool) -> bool:
    """Whether the kernel takes such a weight and x of such a dtype."""
    if weight.bits != 4 or weight.codes.device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return False
    from kvarena.engine.kernels.gemm.packed_stream import takes

    return takes(*weight.shape, weight.group_size, len(weight.scales), glu=gated)
