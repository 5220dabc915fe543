"""Skinny GEMM: y = x @ w.T for a few rows of x, bound by how fast the weights stream from memory.

    w [N, K]   | tile BN x BK | -> | -> | ...     one program: BN rows of w over one of the parts of K
               |--------------|                   x [M, K] is small and comes from the L2 cache

The weights are the tall operand of the tensor cores' product (w @ x.T), so that M = 1..BM fills their narrow side. With
several parts the programs of one tile leave partial sums in a workspace, and the last to arrive adds them in a fixed
order: the result does not depend on who was last. What the neighbours of a projection do is folded in:

    norm      y = rms_norm(x) @ w.T: the norm's weight is applied on the way in, its factor to the sum
    glu       w holds gate and up rows; y = silu(x @ gate.T) * (x @ up.T)
    residual  y = residual + x @ w.T
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kvarena.engine.errors import EngineError
from kvarena.engine.kernels.common import launch_options

MAX_ROWS = 128
_WORKSPACE_BYTES = 64 * 2**20
_MAX_TILES = 1 << 16


class GemmConfig(NamedTuple):
    """Shape of a launch.

    Attributes:
        block_n: rows of w per program.
        block_k: columns per step of the loop.
        split_k: programs that share one tile's columns.
        num_warps, num_stages: of the compiler.
        use_dot: tensor cores; False multiplies and adds (one row of x only).
        fuse_norm: where a norm comes before, take it into the launch.
    """

    block_n: int
    block_k: int
    split_k: int = 1
    num_warps: int = 4
    num_stages: int = 4
    use_dot: bool = True
    fuse_norm: bool = False


@triton.jit
def _finish(  # type: ignore[no-untyped-def]
    acc, acc_up, square, y_ptr, bias_ptr, res_ptr, rows, cols, M, N, K, stride_y, stride_res, eps,
    HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr, HAS_RES: tl.constexpr, GLU: tl.constexpr,
):  # fmt: skip
    """From sums [BN, BM] to stored outputs."""
    if HAS_NORM:
        factor = tl.rsqrt(square / K + eps)
        acc = acc * factor[None, :]
        if GLU:
            acc_up = acc_up * factor[None, :]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[:, None]
        if GLU:
            acc_up += tl.load(bias_ptr + N + cols, mask=cols < N, other=0.0).to(tl.float32)[:, None]
    if GLU:
        acc = acc * tl.sigmoid(acc) * acc_up
    keep = (cols < N)[:, None] & (rows < M)[None, :]
    if HAS_RES:
        acc += tl.load(res_ptr + rows[None, :] * stride_res + cols[:, None], mask=keep, other=0.0).to(tl.float32)
    tl.store(y_ptr + rows[None, :] * stride_y + cols[:, None], acc.to(y_ptr.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["M"])
def skinny_gemm_kernel(  # type: ignore[no-untyped-def]
    x_ptr, w_ptr, y_ptr, bias_ptr, norm_ptr, res_ptr, ws_ptr, lock_ptr, M, N, K, stride_x, stride_w, stride_y,
    stride_res, eps,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, IS_SPLIT: tl.constexpr, EVEN_K: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr, HAS_RES: tl.constexpr, GLU: tl.constexpr,
    USE_DOT: tl.constexpr, UPCAST: tl.constexpr, STAGES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One tile of y, or one part of its sum. The grid is (tiles of BN columns of y, parts of K)."""
    pid = tl.program_id(0)
    part = tl.program_id(1)
    cols = pid * BN + tl.arange(0, BN)
    rows = tl.arange(0, BM)
    ks = tl.arange(0, BK)
    split_k = tl.num_programs(1)
    span = tl.cdiv(K, split_k * BK) * BK
    begin = part * span
    end = tl.minimum(begin + span, K)
    # Rows past N are clamped, not masked: they read something valid that is never stored.
    w_rows = tl.minimum(cols, N - 1).to(tl.int64) * stride_w
    w_tile = w_ptr + w_rows[:, None] + ks[None, :]
    up_offset = N.to(tl.int64) * stride_w
    if OVERLAP:
        gdc_wait()
    if USE_DOT:
        acc = tl.zeros((BN, BM), tl.float32)
        acc_up = tl.zeros((BN, BM), tl.float32)
        squares = tl.zeros((BM, BK), tl.float32)
    else:
        acc = tl.zeros((BN, BK), tl.float32)
        acc_up = tl.zeros((BN, BK), tl.float32)
        squares = tl.zeros((1, BK), tl.float32)
    for k in tl.range(begin, end, BK, num_stages=STAGES):
        if EVEN_K:
            w = tl.load(w_tile + k, eviction_policy="evict_first")
        else:
            w = tl.load(w_tile + k, mask=(k + ks < end)[None, :], other=0.0, eviction_policy="evict_first")
        if GLU:
            if EVEN_K:
                up = tl.load(w_tile + up_offset + k, eviction_policy="evict_first")
            else:
                up = tl.load(
                    w_tile + up_offset + k, mask=(k + ks < end)[None, :], other=0.0, eviction_policy="evict_first"
                )
        if USE_DOT:
            x = tl.load(
                x_ptr + rows[:, None] * stride_x + (k + ks)[None, :],
                mask=(rows < M)[:, None] & (k + ks < end)[None, :],
                other=0.0,
            )
            if HAS_NORM:
                wide = x.to(tl.float32)
                squares += wide * wide
                scale = tl.load(norm_ptr + k + ks, mask=k + ks < end, other=0.0).to(tl.float32)
                x = (wide * scale[None, :]).to(w.dtype)
            if UPCAST:
                x = x.to(tl.float32)
                w = w.to(tl.float32)
                acc = tl.dot(w, tl.trans(x), acc, input_precision="ieee")
                if GLU:
                    acc_up = tl.dot(up.to(tl.float32), tl.trans(x), acc_up, input_precision="ieee")
            else:
                acc = tl.dot(w, tl.trans(x), acc)
                if GLU:
                    acc_up = tl.dot(up, tl.trans(x), acc_up)
        else:
            row = tl.load(x_ptr + k + ks, mask=k + ks < end, other=0.0).to(tl.float32)
            if HAS_NORM:
                squares += (row * row)[None, :]
                row = row * tl.load(norm_ptr + k + ks, mask=k + ks < end, other=0.0).to(tl.float32)
            acc += w.to(tl.float32) * row[None, :]
            if GLU:
                acc_up += up.to(tl.float32) * row[None, :]
    if OVERLAP:
        # Not before: the next kernel's programs would take room from this one's.
        gdc_launch_dependents()
    square = tl.sum(squares, 1)
    if not USE_DOT:
        acc = tl.sum(acc, 1)[:, None]
        acc_up = tl.sum(acc_up, 1)[:, None]
    if not IS_SPLIT:
        _finish(
            acc, acc_up, square, y_ptr, bias_ptr, res_ptr, rows, cols, M, N, K, stride_y, stride_res, eps,
            HAS_BIAS, HAS_NORM, HAS_RES, GLU,
        )  # fmt: skip
    else:
        # Workspace of one tile: split_k parts of [BN sums | BN sums of up | 1 sum of squares] x BM.
        height: tl.constexpr = BN * (2 if GLU else 1) + 1
        tile = ws_ptr + pid.to(tl.int64) * (split_k * height * BM)
        inside = tl.arange(0, BN)[:, None] * BM + rows[None, :]
        mine = tile + part * (height * BM)
        tl.store(mine + inside, acc)
        if GLU:
            tl.store(mine + BN * BM + inside, acc_up)
        if HAS_NORM:
            tl.store(mine + (height - 1) * BM + rows, square)
        tl.debug_barrier()
        arrived = tl.atomic_add(lock_ptr + pid, 1, sem="acq_rel", scope="gpu")
        if arrived == split_k - 1:
            acc = tl.zeros((BN, BM), tl.float32)
            acc_up = tl.zeros((BN, BM), tl.float32)
            square = tl.zeros((BM,), tl.float32)
            for s in range(split_k):
                theirs = tile + s * (height * BM)
                acc += tl.load(theirs + inside, cache_modifier=".cg")
                if GLU:
                    acc_up += tl.load(theirs + BN * BM + inside, cache_modifier=".cg")
                if HAS_NORM:
                    square += tl.load(theirs + (height - 1) * BM + rows, cache_modifier=".cg")
            _finish(
                acc, acc_up, square, y_ptr, bias_ptr, res_ptr, rows, cols, M, N, K, stride_y, stride_res, eps,
                HAS_BIAS, HAS_NORM, HAS_RES, GLU,
            )  # fmt: skip
            tl.atomic_xchg(lock_ptr + pid, 0)


class SkinnyGemm:
    """Launches the kernel; owns its workspace. Launches must be on one stream.

    Args:
        device: where the operands live.
        upcast: multiply in float32. Needed for float32 operands, and in Triton's interpreter, whose product of
            bfloat16 operands is wrong.
    """

    def __init__(self, device: torch.device | str, *, upcast: bool = False) -> None:
        self._workspace = torch.empty(_WORKSPACE_BYTES // 4, dtype=torch.float32, device=device)
        self._locks = torch.zeros(_MAX_TILES, dtype=torch.int32, device=device)
        self._upcast = upcast

    def fits(self, num_rows: int, num_cols: int, config: GemmConfig, *, glu: bool = False) -> bool:
        """Whether the workspace holds the partial sums of such a launch."""
        tiles = triton.cdiv(num_cols, config.block_n)
        height = config.block_n * (2 if glu else 1) + 1
        floats = tiles * config.split_k * height * block_m(num_rows, config)
        return config.split_k == 1 or (tiles <= _MAX_TILES and floats <= self._workspace.numel())

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        config: GemmConfig,
        *,
        bias: Tensor | None = None,
        norm: Tensor | None = None,
        eps: float = 0.0,
        residual: Tensor | None = None,
        glu: bool = False,
        out: Tensor | None = None,
    ) -> Tensor:
        """[norm ->] x @ weight.T + bias [-> silu(gate) * up] [+ residual].

        Args:
            x: [M, K], rows contiguous; 1 <= M <= MAX_ROWS, and M = 1 without `config.use_dot`.
            weight: [N, K], rows contiguous; with `glu` [2 * N, K], the gate's rows first.
            config: shape of the launch.
            bias: [N], with `glu` [2 * N].
            norm: [K], weight of an RMS norm of x with `eps`.
            residual: [M, N]; may be `out` itself.
            glu: see the module.
            out: [M, N], written; allocated if None.

        Returns:
            [M, N] in x's dtype.

        Raises:
            EngineError: the launch is larger than the workspace.
        """
        num_rows, depth = x.shape
        num_cols = weight.shape[0] // 2 if glu else weight.shape[0]
        if num_rows > MAX_ROWS or not self.fits(num_rows, num_cols, config, glu=glu):
            raise EngineError(f"a skinny GEMM of {num_rows} x {num_cols} with {config} is larger than its workspace")
        if out is None:
            out = torch.empty(num_rows, num_cols, dtype=x.dtype, device=x.device)
        split_k = config.split_k
        grid = (triton.cdiv(num_cols, config.block_n), split_k)
        skinny_gemm_kernel[grid](
            x, weight, out, out if bias is None else bias, out if norm is None else norm,
            out if residual is None else residual, self._workspace, self._locks, num_rows, num_cols, depth,
            x.stride(0), weight.stride(0), out.stride(0), 0 if residual is None else residual.stride(0), eps,
            BM=block_m(num_rows, config), BN=config.block_n, BK=config.block_k, IS_SPLIT=split_k > 1,
            EVEN_K=depth % (split_k * config.block_k) == 0,
            HAS_BIAS=bias is not None, HAS_NORM=norm is not None, HAS_RES=residual is not None, GLU=glu,
            USE_DOT=config.use_dot, UPCAST=self._upcast, STAGES=config.num_stages,
            num_warps=config.num_warps, num_stages=config.num_stages, **launch_options(),
        )  # fmt: skip
        return out


def block_m(num_rows: int, config: GemmConfig) -> int:
    """Rows of x that a program of such a launch holds."""
    return max(16, triton.next_power_of_2(num_rows)) if config.use_dot else 1
