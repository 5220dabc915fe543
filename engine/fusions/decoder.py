"""A decoder over fused layers: embedding, layers, norm, and logits of the chosen tokens only; or a stage of one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import functional as F

from kvarena.engine.attention.base import AttentionBackend, AttentionMetadata
from kvarena.engine.fusions.layers import Batch, FusedLayer, ModuleMlp, Projection
from kvarena.engine.fusions.ops import Angles, Norm, Ops
from kvarena.engine.fusions.reducing_ops import ReducingOps
from kvarena.engine.pool.kv_pool import KVPool

if TYPE_CHECKING:  # of a model that reads text nothing of it is imported
    from kvarena.engine.vision.encoder import InputRows


@dataclass(frozen=True)
class FusedDecoder:
    """A causal language model of the llama shape, or some of its layers. Shares its weights with the module.

    Attributes:
        embed: rows [T, hidden] of tokens int64 [T].
        rotation: float32 [positions, rotary_dim]: each position's cosines, then its sines.
        axes: int64 [rotary_dim], by which of three positions each is turned (time, row, column of an image); None: a
            position is a number.
        layers: in order.
        norm: the final one; None: the stream goes on to other layers.
        head: the output projection; None with `norm`.
        ops: what computes.
        num_read: int32 [layers with fused experts], written by each forward: how many experts had a token. None: the
            model has no such layer.
    """

    embed: Callable[[Tensor], Tensor]
    rotation: Tensor
    layers: tuple[FusedLayer, ...]
    norm: Norm | None
    head: Projection | None
    ops: Ops
    num_read: Tensor | None = None
    axes: Tensor | None = None

    @property
    def is_capturable(self) -> bool:
        """Whether a CUDA graph may hold its forward: no foreign module, which might wait for the device."""
        return not any(isinstance(layer.mlp, ModuleMlp) for layer in self.layers)

    def angles(self, positions: Tensor) -> Angles:
        """The rotation at `positions`, integers [T], or [3, T] of a model with `axes`."""
        both = F.embedding(positions, self.rotation)
        if both.dim() == 3:
            assert self.axes is not None
            both = both.gather(0, self.axes.expand(1, both.shape[1], -1))[0]
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
        inputs: InputRows | None = None,
    ) -> Tensor:
        """Logits of the tokens `meta.logits_indices`.

        Args:
            input_ids: int64 [T].
            positions: integers [T]; [3, T] of a model with `axes`, in a step with images.
            meta: the step, prepared by `backend`.
            backend: attention over `pool`.
            pool: keys and values of the new tokens are written to it.
            all_rows: every token is wanted, in order (a decode step): `meta.logits_indices` is not read.
            out: [N, vocab] to write into.
            inputs: in place of the tokens' embeddings; overwritten.

        Returns:
            [N, vocab] in the model's dtype; without a head the stream of all tokens, [T, hidden].
        """
        batch = Batch.of(self.angles(positions), meta, backend, pool)
        residual = self.embed(input_ids) if inputs is None else inputs.embeds
        num_deep = 0 if inputs is None else len(inputs.deep)
        for index, layer in enumerate(self.layers if self.head is None else self.layers[:-1]):
            residual = layer(residual, batch, self.ops)
            if index < num_deep:
                residual = residual.index_add_(0, inputs.at, inputs.deep[index])  # type: ignore[union-attr]
        if self.head is None or self.norm is None:
            if isinstance(self.ops, ReducingOps):
                self.ops.settle(residual)
            return residual
        # After its attention the last layer works for the logits alone: of a prompt, one token.
        rows = None if all_rows else meta.logits_indices
        if rows is not None and not len(rows):
            self.layers[-1].attention.queries(residual, batch, self.ops)
            self.layers[-1].read_no_experts()
            return residual.new_empty(0, self.head.out_features)
        if len(self.layers) > num_deep:
            residual = self.layers[-1](residual, batch, self.ops, rows)
        else:  # what is added behind it is of all tokens
            residual = self.layers[-1](residual, batch, self.ops)
            residual = residual.index_add_(0, inputs.at, inputs.deep[len(self.layers) - 1])  # type: ignore[union-attr]
            residual = residual if rows is None else residual.index_select(0, rows)
        return self.ops.norm_linear(residual, self.norm, self.head, out)
