"""The operations of a fused layer, in plain torch: the seam that the Triton versions replace, and their reference.

One stream `residual` [T, hidden] runs through the layers; each block reads it through its norm and adds to it:

    q        = norm_heads(residual)                  keys and values go to the pool; attention in between
    residual = linear_residual(attention, residual)
    act      = norm_glu(residual)                    silu(gate) * up
    residual = linear_residual(act, residual)        or, of experts: residual += experts(residual)

`residual` is updated in place by `linear_residual` and `experts`.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from kvarena.engine.fusions.experts import Experts, add_experts


class Norm(NamedTuple):
    """An RMS norm: `weight` [n] and `eps`."""

    weight: Tensor
    eps: float


class Linear(NamedTuple):
    """A projection: `weight` [N, K] and `bias` [N] or None."""

    weight: Tensor
    bias: Tensor | None

    @property
    def out_features(self) -> int:
        """N."""
        return len(self.weight)


class Product(NamedTuple):
    """A projection and what its neighbours do to it: [norm ->] x @ weight.T [-> silu(gate) * up] [+ residual].

    Attributes:
        x: [M, K], rows contiguous.
        linear: [N, K]; with `glu` [2 * N, K], the gate's rows first.
        norm: comes before.
        residual: [M, N], added. Not with `glu`.
        glu: the activation comes after.
        out: [M, N], rows contiguous, for the result; may be `residual` itself. None: a new tensor.
    """

    x: Tensor
    linear: Linear
    norm: Norm | None = None
    residual: Tensor | None = None
    glu: bool = False
    out: Tensor | None = None


class HeadNorms(NamedTuple):
    """RMS norms over each head of queries and keys, before the rotation."""

    q: Norm
    k: Norm


class Angles(NamedTuple):
    """The rotation of each token: float32 [T, rotary_dim / 2]. Element i is paired with i + rotary_dim / 2."""

    cos: Tensor
    sin: Tensor


class Heads(NamedTuple):
    """Counts of a layer's attention."""

    num_heads: int
    num_kv_heads: int
    head_dim: int


class HeadSlots(NamedTuple):
    """What becomes of the heads of a layer's projection; see `Ops.rope_store`."""

    heads: Heads
    norms: HeadNorms | None
    angles: Angles
    slots: Tensor
    kv: tuple[Tensor, Tensor]


class Ops(Protocol):
    """What a fused layer calls. All tensors of a call share one device and dtype; T tokens are flattened."""

    def norm(self, x: Tensor, norm: Norm) -> Tensor:
        """RMS norm over the last dimension of x [T, n]."""
        ...

    def linear(self, x: Tensor, linear: Linear, out: Tensor | None = None) -> Tensor:
        """linear(x): [T, K] -> [T, N], into `out` if given."""
        ...

    def linear_glu(self, x: Tensor, gate_up: Linear) -> Tensor:
        """silu(gate) * up of x; `gate_up` holds the gate's rows first. [T, K] -> [T, N / 2]."""
        ...

    def norm_linear(self, residual: Tensor, norm: Norm, linear: Linear, out: Tensor | None = None) -> Tensor:
        """linear(norm(residual)): [T, K] -> [T, N], into `out` if given."""
        ...

    def linear_residual(self, x: Tensor, linear: Linear, residual: Tensor) -> Tensor:
        """residual + linear(x), in place in `residual` [T, N]; returns it."""
        ...

    def norm_glu(self, residual: Tensor, norm: Norm, gate_up: Linear) -> Tensor:
        """silu(gate) * up of norm(residual); `gate_up` holds the gate's rows first. [T, K] -> [T, N / 2]."""
        ...

    def glu(self, x: Tensor) -> Tensor:
        """silu(gate) * up of x, which holds the gate's columns first. [T, N] -> [T, N / 2]."""
        ...

    def experts(
        self,
        residual: Tensor,
        norm: Norm,
        experts: Experts,
        slots: Tensor | None,
        first_slot: int,
        into: Tensor | None = None,
    ) -> Tensor | None:
        """Add the experts' output for norm(residual) to `residual` [T, K], in place.

        Args:
            residual: the stream.
            norm: comes before.
            experts: of the layer; its `num_read` is written.
            slots: int64 [T], where each token's keys went: those below `first_slot` are padding and get no expert.
                None: there is no padding.
            first_slot: see `slots`.
            into: [T, K], what the output is added to; None: `residual`.

        Returns:
            float32 [T], the weight of the shared expert's output; None without a shared expert.
        """
        ...

    def norm_heads(self, residual: Tensor, norm: Norm, qkv: Linear, to: HeadSlots) -> Tensor:
        """norm_linear and rope_store: the turned queries [T, num_heads, head_dim] of `residual` [T, K]."""
        ...

    def rope_store(
        self,
        qkv: Tensor,
        heads: Heads,
        norms: HeadNorms | None,
        angles: Angles,
        slots: Tensor,
        kv: tuple[Tensor, Tensor],
        *,
        turn_keys: bool = False,
    ) -> Tensor:
        """Norm and turn queries and keys, and store keys and values in the pool.

        Args:
            qkv: [T, (num_heads + 2 * num_kv_heads) * head_dim]: queries, keys, values. May be overwritten.
            heads: how to split it.
            norms: of queries and keys, or None.
            angles: the rotation.
            slots: int64 [T], where each token's keys and values go.
            kv: the layer's keys and values by slot, [num_slots, num_kv_heads, head_dim]; written.
            turn_keys: leave the turned keys in `qkv` too.

        Returns:
            The turned queries [T, num_heads, head_dim], a head's elements side by side.
        """
        ...


class TorchOps:
    """The operations in plain torch, for any device. Norms and rotations in float32."""

    def norm(self, x: Tensor, norm: Norm) -> Tensor:
        """See `Ops.norm`."""
        return rms_norm(x, norm)

    def linear(self, x: Tensor, linear: Linear, out: Tensor | None = None) -> Tensor:
        """See `Ops.linear`."""
        return apply_linear(x, linear, out)

    def linear_glu(self, x: Tensor, gate_up: Linear) -> Tensor:
        """See `Ops.linear_glu`."""
        return self.glu(apply_linear(x, gate_up))

    def norm_linear(self, residual: Tensor, norm: Norm, linear: Linear, out: Tensor | None = None) -> Tensor:
        """See `Ops.norm_linear`."""
        return apply_linear(rms_norm(residual, norm), linear, out)

    def linear_residual(self, x: Tensor, linear: Linear, residual: Tensor) -> Tensor:
        """See `Ops.linear_residual`."""
        residual.addmm_(x, linear.weight.t())
        return residual if linear.bias is None else residual.add_(linear.bias)

    def norm_glu(self, residual: Tensor, norm: Norm, gate_up: Linear) -> Tensor:
        """See `Ops.norm_glu`."""
        return self.glu(self.norm_linear(residual, norm, gate_up))

    def glu(self, x: Tensor) -> Tensor:
        """See `Ops.glu`."""
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    def experts(
        self,
        residual: Tensor,
        norm: Norm,
        experts: Experts,
        slots: Tensor | None,
        first_slot: int,
        into: Tensor | None = None,
    ) -> Tensor | None:
        """See `Ops.experts`."""
        return add_experts(residual if into is None else into, rms_norm(residual, norm), experts, slots, first_slot)

    def norm_heads(self, residual: Tensor, norm: Norm, qkv: Linear, to: HeadSlots) -> Tensor:
        """See `Ops.norm_heads`."""
        return self.rope_store(self.norm_linear(residual, norm, qkv), *to)

    def rope_store(
        self,
        qkv: Tensor,
        heads: Heads,
        norms: HeadNorms | None,
        angles: Angles,
        slots: Tensor,
        kv: tuple[Tensor, Tensor],
        *,
        turn_keys: bool = False,
    ) -> Tensor:
        """See `Ops.rope_store`."""
        q, k, v = split_heads(qkv, heads)
        turned = rotate(k if norms is None else rms_norm(k, norms.k), angles)
        kv[0].index_copy_(0, slots, turned)
        kv[1].index_copy_(0, slots, v)
        if turn_keys:
            k.copy_(turned)
        if norms is not None:
            q = rms_norm(q, norms.q)
        return rotate(q, angles)


def apply_linear(x: Tensor, linear: Linear, out: Tensor | None = None) -> Tensor:
    """linear(x) by the library, into `out` if given."""
    weight, bias = linear
    if out is None:
        return F.linear(x, weight, bias)
    return torch.mm(x, weight.t(), out=out) if bias is None else torch.addmm(bias, x, weight.t(), out=out)


def split_heads(qkv: Tensor, heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
    """Views of queries, keys and values, [T, heads, head_dim] each."""
    num_heads, num_kv_heads, head_dim = heads
    split = qkv.view(len(qkv), -1, head_dim).split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    return split[0], split[1], split[2]


def rms_norm(x: Tensor, norm: Norm) -> Tensor:
    """RMS norm over the last dimension, in float32, rounded before the weight as transformers' modules do."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.eps)
    return norm.weight * wide.to(x.dtype)


def rotate(x: Tensor, angles: Angles) -> Tensor:
    """Rotary embedding (Su et al., 2021) of x [T, heads, head_dim], halves paired, in float32; the rest passes."""
    cos, sin = angles.cos[:, None], angles.sin[:, None]
    half = cos.shape[-1]
    first, second, rest = x[..., :half].float(), x[..., half : 2 * half].float(), x[..., 2 * half :]
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned
