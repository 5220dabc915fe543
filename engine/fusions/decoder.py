"""A whole decoder over fused layers: embedding, layers, norm, and logits of the chosen tokens only."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from kvarena.engine.attention.base import AttentionBackend, AttentionMetadata
from kvarena.engine.fusions.layers import Batch, FusedLayer, ModuleMlp, Projection
from kvarena.engine.fusions.ops import Angles, Norm, Ops
from kvarena.engine.pool.kv_pool import KVPool


@dataclass(frozen=True)
class FusedDecoder:
    """A causal language model of the llama shape. Shares its weights with the transformers module.

    Attributes:
        embedding: [vocab, hidden].
        rotation: float32 [positions, rotary_dim]: each position's cosines, then its sines.
        layers: in order.
        norm: the final one.
        head: the output projection.
        ops: what computes.
        num_read: int32 [layers with fused experts], written by each forward: how many experts had a token. None: the
            model has no such layer.
    """

    embedding: Tensor
    rotation: Tensor
    layers: tuple[FusedLayer, ...]
    norm: Norm
    head: Projection
    ops: Ops
    num_read: Tensor | None = None

    @property
    def is_capturable(self) -> bool:
        """Whether a CUDA graph may hold its forward: no foreign module, which might wait for the device."""
        return not any(isinstance(layer.mlp, ModuleMlp) for layer in self.layers)

    def angles(self, positions: Tensor) -> Angles:
        """The rotation at `positions`, int64 [T]."""
        both = F.embedding(positions, self.rotation)
        half = both.shape[1] // 2
        return Angles(both[:, :half], both[:, half:])

    def __call__(
        self,
        input_ids: Tensor,
        positions: Tensor,
        meta: AttentionMetadata,
        backend: AttentionBackend,
        pool: KVPool,
        *,
        all_rows: bool = False,
        out: Tensor | None = None,
        embeds: Tensor | None = None,
    ) -> Tensor:
        """Logits of the tokens `meta.logits_indices`.

        Args:
            input_ids: int64 [T].
            positions: int64 [T].
            meta: the step, prepared by `backend`.
            backend: attention over `pool`.
            pool: keys and values of the new tokens are written to it.
            all_rows: every token is wanted, in order (a decode step): `meta.logits_indices` is not read.
            out: [N, vocab] to write into.
            embeds: [T, hidden] in place of the tokens' embeddings; overwritten.

        Returns:
            [N, vocab] in the model's dtype.
        """
        batch = Batch.of(self.angles(positions), meta, backend, pool)
        residual = F.embedding(input_ids, self.embedding) if embeds is None else embeds
        for layer in self.layers[:-1]:
            residual = layer(residual, batch, self.ops)
        # After its attention the last layer works for the logits alone: of a prompt, one token.
        rows = None if all_rows else meta.logits_indices
        if rows is not None and not len(rows):
            self.layers[-1].attention.queries(residual, batch, self.ops)
            self.layers[-1].read_no_experts()
            return residual.new_empty(0, self.head.out_features)
        residual = self.layers[-1](residual, batch, self.ops, rows)
        return self.ops.norm_linear(residual, self.norm, self.head, out)
