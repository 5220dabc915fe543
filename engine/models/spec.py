"""What the engine knows of a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class ModelSpec:
    """A model's sizes. All layers have the same KV heads.

    Attributes:
        name: how reports call it.
        num_layers: attention layers.
        num_kv_heads: KV heads of a layer.
        head_dim: elements of a key; a shorter value is stored padded to it.
        vocab_size: width of the logits.
        max_model_len: longest context in tokens for which packed sequences do not influence one another.
        dtype: of weights and KV.
        eos_token_ids: tokens that end a request.
        bos_token_id: the beginning-of-sequence token, or None.
        num_parameters: weights, shared ones once.
        sliding_window: tokens that the widest layer sees; None when some layer sees the whole context.
        has_plain_layers: some layer's attention sees the whole context, without a soft cap or sinks.
    """

    name: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_model_len: int
    dtype: torch.dtype
    eos_token_ids: frozenset[int]
    bos_token_id: int | None
    num_parameters: int
    sliding_window: int | None = None
    has_plain_layers: bool = True

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of one slot: keys and values of one token in every layer."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run.

    Attributes:
        module: the transformers module, its attention bound to the hook.
        spec: its sizes.
        path: its directory; None for a bare shape.
        special_token_ids: tokens that are not text: end, begin, padding and what the tokenizer marks as special.
        slices_logits: whether the module computes logits at chosen positions only.
    """

    module: nn.Module
    spec: ModelSpec
    path: Path | None
    special_token_ids: frozenset[int]
    slices_logits: bool

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.module.parameters()).device

    def logits(self, input_ids: Tensor, positions: Tensor, indices: Tensor) -> Tensor:
        """Run the flattened batch; call inside `attention_context`.

        Args:
            input_ids: int64 [T].
            positions: int64 [T], each token's position in its own sequence.
            indices: int64 [N], flat indices of the tokens whose logits are wanted.

        Returns:
            [N, vocab_size] in the model's dtype.
        """
        batch = {"input_ids": input_ids[None], "position_ids": positions[None], "use_cache": False}
        if self.slices_logits:
            return self.module(**batch, logits_to_keep=indices).logits[0]
        return self.module(**batch).logits[0].index_select(0, indices)
