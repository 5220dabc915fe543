"""What the engine knows of a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kvarena.engine.models.experts import ExpertSizes, ExpertsRead

if TYPE_CHECKING:  # of a model that reads text, on one device, nothing of it is imported
    from kvarena.engine.parallel.groups import Groups
    from kvarena.engine.parallel.shard import Shard
    from kvarena.engine.vision.encoder import ImageEncoder, InputRows


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
        windows: tokens that each layer sees, None for the whole context; empty: all see all of it.
        shared_layers: layers that attend to an earlier layer's keys and values, which the pool holds once more.
        latent_dim: elements of a layer's compressed keys and values of a token (MLA), which the pool holds expanded;
            None for others.
        limited_by: why `max_model_len` is below the positions that the config states; empty where it is not.
        has_plain_layers: some layer's attention sees the whole context, without a soft cap or sinks.
        quantization: how the checkpoint packs its weights and what became of them; empty where it does not.
        experts: of a model with experts, where they are known; None for a dense one.
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
    windows: tuple[int | None, ...] = ()
    shared_layers: int = 0
    latent_dim: int | None = None
    limited_by: str = ""
    has_plain_layers: bool = True
    quantization: str = ""
    experts: ExpertSizes | None = None

    @property
    def sliding_window(self) -> int | None:
        """Tokens that the widest layer sees; None when some layer sees the whole context."""
        return max((w for w in self.windows if w is not None), default=None) if None not in self.windows else None

    @property
    def active_parameters(self) -> int:
        """Weights that one token is multiplied by: of the experts of a layer those that it takes."""
        if self.experts is None:
            return self.num_parameters
        idle = self.experts.num_experts - self.experts.top_k
        return self.num_parameters - self.experts.num_layers * idle * self.experts.num_weights

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of one slot: keys and values of one token in every layer."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize

    def needed_kv_bytes(self, num_tokens: int) -> int:
        """Bytes of a request's keys and values if each layer kept what it reads, in the model's own form.

        Shared layers, the last ones, keep nothing; a layer with a window keeps that; latent attention its latents.
        """
        own = (self.windows or (None,) * self.num_layers)[: self.num_layers - self.shared_layers]
        kept = sum(num_tokens if window is None else min(window, num_tokens) for window in own)
        elements = 2 * self.num_kv_heads * self.head_dim if self.latent_dim is None else self.latent_dim
        return kept * elements * self.dtype.itemsize

    def kv_surplus_reasons(self, num_tokens: int) -> list[str]:
        """Why the pool holds more than `needed_kv_bytes(num_tokens)` of a request; empty where it does not."""
        reasons = []
        if self.latent_dim is not None:
            stored = 2 * self.num_kv_heads * self.head_dim
            reasons.append(
                f"latent attention needs {self.latent_dim} elements of a token and layer, of {stored} stored"
            )
        own = self.windows[: self.num_layers - self.shared_layers]
        narrow = [window for window in own if window is not None and window < num_tokens]
        if narrow:
            seen = f"{min(narrow)}" if len(set(narrow)) == 1 else f"{min(narrow)} to {max(narrow)}"
            reasons.append(f"{len(narrow)} of {self.num_layers} layers see {seen} tokens")
        if self.shared_layers:
            reasons.append(f"{self.shared_layers} of {self.num_layers} layers share an earlier layer's keys and values")
        return reasons


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run.

    Attributes:
        module: the transformers module, its attention bound to the hook.
        spec: its sizes.
        path: its directory; None for a bare shape.
        special_token_ids: tokens that are not text: end, begin, padding and what the tokenizer marks as special.
        slices_logits: whether the module computes logits at chosen positions only.
        images: makes inputs of images; None: the model reads text only, or another rank makes them.
        has_grids: positions have three dimensions in a step with images.
        experts_read: counts the experts that the module's forwards read; None for a dense model.
        shard: of a model on several devices: which part of it this is. `spec` then has the part's sizes, and the whole
            model's vocabulary.
        groups: of such a model: how this rank talks with the others.
        peers: on the planning rank: the other ranks (`kvarena.engine.ranks.peers.Peers`), which end with the model.
    """

    module: nn.Module
    spec: ModelSpec
    path: Path | None
    special_token_ids: frozenset[int]
    slices_logits: bool
    images: ImageEncoder | None = None
    has_grids: bool = False
    experts_read: ExpertsRead | None = None
    shard: Shard | None = None
    groups: Groups | None = None
    peers: Any = None

    @property
    def num_logits(self) -> int:
        """Width of the logits that the module computes: of a part, its share of the vocabulary."""
        return self.spec.vocab_size if self.shard is None else self.shard.cuts.width

    @property
    def modules(self) -> list[nn.Module]:
        """All that holds weights."""
        return [self.module] if self.images is None else [self.module, self.images.tower]

    @property
    def image_cache_bytes(self) -> int:
        """Memory for encoded tiles; 0 for a model that reads text only."""
        return 0 if self.images is None else self.images.cache.num_bytes

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.module.parameters()).device

    def logits(self, input_ids: Tensor, positions: Tensor, indices: Tensor, rows: InputRows | None = None) -> Tensor:
        """Run the flattened batch; call inside `attention_context`.

        Args:
            input_ids: int64 [T]; not looked at where there are `rows`.
            positions: int64 [T], each token's position in its own sequence; [3, T] where they have three dimensions.
            indices: int64 [N], flat indices of the tokens whose logits are wanted.
            rows: what stands in place of the tokens' embeddings; None: these.

        Returns:
            [N, num_logits] in the model's dtype.
        """
        batch = batch_of(input_ids, positions, rows)
        if self.slices_logits:
            return self.module(**batch, logits_to_keep=indices).logits[0]
        return self.module(**batch).logits[0].index_select(0, indices)


def batch_of(input_ids: Tensor, positions: Tensor, rows: InputRows | None) -> dict[str, Any]:
    """A flattened batch as arguments of a transformers module; see `LoadedModel.logits`."""
    batch: dict[str, Any] = {"position_ids": positions.unsqueeze(-2), "use_cache": False}
    if rows is None:
        return batch | {"input_ids": input_ids[None]}
    batch["inputs_embeds"] = rows.embeds[None]
    if len(rows.deep):
        mask = torch.zeros(rows.embeds.shape[:1], dtype=torch.bool, device=rows.embeds.device)
        batch["visual_pos_masks"] = mask.index_fill_(0, rows.at, True)[None]
        batch["deepstack_visual_embeds"] = list(rows.deep)
    return batch
