"""Fused forms of a decoder layer's two blocks, over a flattened batch and an explicit residual stream.

residual -+-> norm -> q,k,v -> rope, store -> attend -> o -> + -+-> norm -> gate,up -> silu * -> down -> +
          '------------------------------------------------'   '----------------------------------------'
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from kvarena.engine.attention.base import AttentionBackend, AttentionMetadata, KeepingBackend
from kvarena.engine.fusions.experts import Experts
from kvarena.engine.fusions.ops import Angles, HeadNorms, Heads, HeadSlots, Norm, Ops, split_heads
from kvarena.engine.pool.kv_pool import KVPool

# A `Linear`; or a `PackedProjection`, with ops that are `PackedOps`, which a type cannot say of the two together.
Projection = Any


class AttentionArgs(NamedTuple):
    """What the layer's attention passes to the backend; see `AttentionBackend.attend`."""

    scale: float
    sliding_window: int | None
    softcap: float | None
    sinks: Tensor | None


class Batch(NamedTuple):
    """A forward's inputs beside the residual stream.

    Attributes:
        angles: the rotation of each token.
        meta: the step, prepared by `backend`.
        backend: attention over `pool`.
        pool: where keys and values go.
        keeper: the backend, in a step in which it wants the new keys and values beside the pool.
    """

    angles: Angles
    meta: AttentionMetadata
    backend: AttentionBackend
    pool: KVPool
    keeper: KeepingBackend | None = None

    @classmethod
    def of(cls, angles: Angles, meta: AttentionMetadata, backend: AttentionBackend, pool: KVPool) -> Batch:
        """The inputs of a step, with the backend as keeper if it wants to be."""
        keeps = _keeps(type(backend)) and cast(KeepingBackend, backend).wants_kv(meta)
        return cls(angles, meta, backend, pool, cast(KeepingBackend, backend) if keeps else None)


@cache
def _keeps(kind: type) -> bool:
    """Whether backends of a class are `KeepingBackend`s; to ask a protocol takes as long as a small product."""
    return issubclass(kind, KeepingBackend)


@dataclass(frozen=True)
class FusedAttention:
    """Norm, packed projections, rotation with KV store, attention, output projection.

    Attributes:
        index: the layer in the pool.
    """

    index: int
    norm: Norm
    qkv: Projection
    out: Projection
    heads: Heads
    head_norms: HeadNorms | None
    args: AttentionArgs

    def __call__(self, residual: Tensor, batch: Batch, ops: Ops, rows: Tensor | None = None) -> Tensor:
        """Add the block's output to `residual` [T, hidden], in place; returns it.

        With `rows`, int64 [R], the output is computed for these tokens alone, and their part of the stream returned.
        """
        q = self.queries(residual, batch, ops)
        scale, window, softcap, sinks = self.args
        attended = batch.backend.attend(
            q, self.index, batch.meta, scale=scale, sliding_window=window, softcap=softcap, sinks=sinks
        )
        attended = attended.reshape(len(residual), -1)
        if rows is not None:
            attended, residual = attended.index_select(0, rows), residual.index_select(0, rows)
        return ops.linear_residual(attended, self.out, residual)

    def queries(self, residual: Tensor, batch: Batch, ops: Ops) -> Tensor:
        """The turned queries [T, num_heads, head_dim] of `residual`; its keys and values go to the pool."""
        to = HeadSlots(
            self.heads, self.head_norms, batch.angles, batch.meta.slot_mapping, batch.pool.slots(self.index)
        )  # fmt: skip
        if batch.keeper is None:
            return ops.norm_heads(residual, self.norm, self.qkv, to)
        qkv = ops.norm_linear(residual, self.norm, self.qkv)
        q = ops.rope_store(qkv, *to, turn_keys=True)
        _, k, v = split_heads(qkv, self.heads)
        batch.keeper.keep_kv(k, v, self.index, batch.meta)
        return q


@dataclass(frozen=True)
class FusedGlu:
    """Norm, packed gate and up projections, silu(gate) * up, down projection."""

    norm: Norm
    gate_up: Projection
    down: Projection

    def __call__(self, residual: Tensor, ops: Ops) -> Tensor:
        """Add the block's output to `residual` [T, hidden], in place; returns it."""
        return ops.linear_residual(ops.norm_glu(residual, self.norm, self.gate_up), self.down, residual)


@dataclass(frozen=True)
class FusedExperts:
    """Norm, router, the experts that it chooses, and an expert that all tokens share, if there is one."""

    norm: Norm
    experts: Experts
    shared: FusedGlu | None

    def __call__(self, residual: Tensor, ops: Ops, slots: Tensor | None, first_slot: int) -> Tensor:
        """Add the block's output to `residual` [T, hidden], in place; returns it. `slots`: see `Ops.experts`."""
        shared = self.shared
        # Before the stream has the others' output.
        act = None if shared is None else ops.norm_glu(residual, self.norm, shared.gate_up)
        scale = ops.experts(residual, self.norm, self.experts, slots, first_slot)
        if shared is None or act is None or scale is None:
            return residual
        return ops.linear_residual(act.mul_(scale[:, None]), shared.down, residual)


@dataclass(frozen=True)
class ModuleMlp:
    """A block that stays a transformers module (other experts, other activations), behind its norm."""

    norm: Norm
    module: nn.Module

    def __call__(self, residual: Tensor, ops: Ops) -> Tensor:
        """Add the module's output to `residual` [T, hidden], in place; returns it."""
        out = self.module(ops.norm(residual, self.norm)[None])
        return residual.add_((out[0] if isinstance(out, tuple) else out).view_as(residual))


@dataclass(frozen=True)
class FusedLayer:
    """A decoder layer of the llama shape."""

    attention: FusedAttention
    mlp: FusedGlu | FusedExperts | ModuleMlp

    def __call__(self, residual: Tensor, batch: Batch, ops: Ops, rows: Tensor | None = None) -> Tensor:
        """Run the layer on `residual` [T, hidden], in place; returns it, or the part of the tokens `rows`.

        Keys and values are stored for every token, whatever `rows` says.
        """
        return self.feed(self.attention(residual, batch, ops, rows), batch, ops, rows)

    def read_no_experts(self) -> None:
        """The layer's experts, if it has any, have no token in this forward."""
        if isinstance(self.mlp, FusedExperts):
            self.mlp.experts.num_read.zero_()

    def feed(self, residual: Tensor, batch: Batch, ops: Ops, rows: Tensor | None = None) -> Tensor:
        """The part behind the attention, on what that gave for the tokens `rows`; in place, returns `residual`."""
        if not isinstance(self.mlp, FusedExperts):
            return self.mlp(residual, ops)
        slots, first_slot = batch.meta.slot_mapping, batch.meta.block_size
        return self.mlp(residual, ops, slots if rows is None else slots.index_select(0, rows), first_slot)
