"""Products of a fused layer by the CUDA kernels for Hopper, where these are faster than others."""

from __future__ import annotations

import torch
from torch import Tensor

from kvarena.engine.fusions.ops import Linear, Norm, Product
from kvarena.engine.kernels.experts.grouped import GroupedGemm
from kvarena.engine.kernels.gemm.dense import DenseGemm, dense_tile
from kvarena.engine.kernels.gemm.stream import StreamGemm, stream_tile
from kvarena.engine.kernels.gemm.turned import HeadsToStore, TurnedGemm, turned_tile
from kvarena.engine.kernels.gemm.wide import WideGemm, wide_tile
from kvarena.engine.kernels.hopper import load_hopper_kernels
from kvarena.engine.kernels.norm import rms_norm


class HopperProducts:
    """Sends a product to `StreamGemm`, `WideGemm` or `DenseGemm`, or to none of them.

    Args:
        device: where the operands live. Without a Hopper GPU and what its kernels need, every product goes to none.

    Attributes:
        grouped: products of experts; None without such a GPU.
    """

    def __init__(self, device: torch.device | str) -> None:
        kernels = load_hopper_kernels(device)
        self._num_multiprocessors = 0 if kernels is None else kernels.num_multiprocessors
        self._stream = None if kernels is None else StreamGemm(kernels)
        self._wide = None if kernels is None else WideGemm(kernels)
        self._dense = None if kernels is None else DenseGemm(kernels)
        self._turned = None if kernels is None else TurnedGemm(kernels)
        self.grouped = None if kernels is None else GroupedGemm(kernels)

    def __call__(self, product: Product) -> Tensor | None:
        """The result; None, and nothing was done, where another kernel is as fast or the operands are not for these."""
        if self._stream is None or self._wide is None or self._dense is None or not _is_plain_bf16(product):
            return None
        x, linear, norm, residual, glu, out = product
        shape = (len(x), linear.weight.shape[0], linear.weight.shape[1], self._num_multiprocessors)
        takes_dense = not glu and all(y is None or y.stride(0) % 8 == 0 for y in (residual, out))
        if takes_dense and (dense := dense_tile(*shape[:3])) is not None:
            return self._dense(_normed(x, norm), linear.weight, dense, residual=residual, out=out)
        tile = stream_tile(*shape, norm=norm is not None, glu=glu)
        if tile is not None:
            weight, eps = None, 0.0
            if norm is not None and tile.fuse_norm:
                weight, eps = norm.weight, norm.eps
            else:
                x = _normed(x, norm)
            return self._stream(x, linear.weight, tile, norm=weight, eps=eps, residual=residual, glu=glu, out=out)
        wide = wide_tile(*shape) if glu else None
        return None if wide is None else self._wide(_normed(x, norm), linear.weight, wide)

    def heads(self, x: Tensor, norm: Norm, qkv: Linear, heads: HeadsToStore) -> Tensor | None:
        """Turned queries of norm(x) by `qkv`, with its keys and values in the pool; None, and nothing was done, where
        two launches are as fast or the operands are not for one."""
        tile = turned_tile(len(x), *qkv.weight.shape)
        if self._turned is None or tile is None or not heads.fit() or not _is_plain_bf16(Product(x, qkv, norm)):
            return None
        if tile.fuse_norm:
            return self._turned(x, qkv.weight, tile, heads, norm=norm.weight, eps=norm.eps)
        return self._turned(_normed(x, norm), qkv.weight, tile, heads, norm=None, eps=0.0)


def _is_plain_bf16(product: Product) -> bool:
    """Whether the kernels take these operands."""
    x, linear, norm = product[:3]
    return (
        x.dtype == linear.weight.dtype == torch.bfloat16
        and linear.bias is None
        and (norm is None or norm.weight.dtype == torch.bfloat16)
        and x.stride(0) % 8 == 0
    )


def _normed(x: Tensor, norm: Norm | None) -> Tensor:
    """What a product reads whose launch takes no norm in."""
    return x if norm is None else rms_norm(x, norm.weight, norm.eps)
