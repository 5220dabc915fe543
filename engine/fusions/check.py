"""Compares fused layers with the modules that they stand for, on the same inputs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kvarena.engine.attention.base import AttentionMetadata, packed_metadata
from kvarena.engine.attention.hook import attention_context
from kvarena.engine.attention.reference import ReferenceBackend
from kvarena.engine.fusions.decoder import FusedDecoder
from kvarena.engine.fusions.layers import Batch, FusedExperts, FusedLayer
from kvarena.engine.fusions.ops import Ops
from kvarena.engine.models.spec import LoadedModel
from kvarena.engine.pool.kv_pool import KVPool

NUM_TOKENS = 8
# Largest ||fused - module|| / ||what the layer adds||, to which rounding of the residual stream itself comes on top.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
LOW_PRECISION_TOLERANCE = 0.03
# Of tokens for which rounding decides whether one expert or another is the last that they get.
UNSETTLED_TOLERANCE = 0.5


def turns_by_three(rotary: nn.Module) -> bool:
    """Whether a rotary embedding takes three positions of a token: time, row and column (M-RoPE)."""
    return getattr(rotary, "mrope_section", None) is not None


class _ArgsRecorder(ReferenceBackend):
    """The reference, which also notes what each layer passes to it."""

    def __init__(self, pool: KVPool) -> None:
        super().__init__(pool)
        self.args: dict[int, tuple[Any, ...]] = {}

    def attend(self, q: Tensor, layer: int, meta: AttentionMetadata, **kwargs: Any) -> Tensor:
        """See `AttentionBackend.attend`."""
        self.args[layer] = tuple(kwargs.get(name) for name in ("scale", "sliding_window", "softcap", "sinks"))
        return super().attend(q, layer, meta, **kwargs)


@dataclass
class Recording:
    """A forward of the transformers model over a few tokens, layer by layer.

    Attributes:
        input_ids, positions: the tokens; positions reach up to the context's end, along three axes where a model has
            them.
        meta: their metadata.
        pool: a small pool, to be written to.
        kv: what the forward stored in it.
        args: per layer, what its attention passed to the backend.
        inputs: what went into each layer, and what came out of the last, [T, hidden].
        logits: of all tokens.
    """

    input_ids: Tensor
    positions: Tensor
    meta: AttentionMetadata
    pool: KVPool
    kv: Tensor
    args: dict[int, tuple[Any, ...]]
    logits: Tensor
    inputs: list[Tensor] = field(default_factory=list)

    @property
    def head_dim(self) -> int:
        """Elements of a head."""
        return self.pool.head_dim


def record(model: LoadedModel, max_model_len: int) -> Recording:
    """Run the model's modules over one request of a few tokens, its positions spread over the context."""
    device, spec = model.device, model.spec
    pool = KVPool.of_model(
        spec,
        num_blocks=1,
        block_size=NUM_TOKENS,
        dtype=spec.dtype,
        device=device,
    )
    meta = packed_metadata([NUM_TOKENS], np.ones((1, 1), dtype=np.int32), NUM_TOKENS, device)
    meta.logits_indices = torch.arange(NUM_TOKENS, device=device)
    is_first = model.shard is None or model.shard.layout.is_first
    # A later stage's embedding stands in for rows that come from elsewhere, and may be small.
    embedding: Any = model.module.get_input_embeddings()  # type: ignore[operator]
    num_ids = spec.vocab_size if is_first else embedding.num_embeddings
    ids = torch.arange(1, NUM_TOKENS + 1, device=device) * 7919 % num_ids
    positions = torch.linspace(0, max_model_len - 1, NUM_TOKENS, device=device).long()
    if turns_by_three(model.module.model.rotary_emb):  # type: ignore[arg-type, union-attr]
        positions = torch.stack([positions, positions.flip(0), positions.roll(3)])
    backend = _ArgsRecorder(pool)
    inputs: list[Tensor] = []

    def note_input(module: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # noqa: ARG001
        inputs.append((args[0] if args else kwargs["hidden_states"])[0].clone())

    def note_output(module: object, args: object, output: Any) -> None:  # noqa: ARG001
        inputs.append((output[0] if isinstance(output, tuple) else output).view(NUM_TOKENS, -1).clone())

    layers: Any = model.module.model.layers  # type: ignore[union-attr]
    handles = [layer.register_forward_pre_hook(note_input, with_kwargs=True) for layer in layers]
    handles.append(layers[-1].register_forward_hook(note_output))
    try:
        with attention_context(meta, backend):
            backend.prepare(meta)
            logits = model.logits(ids, positions, meta.logits_indices)
    finally:
        for handle in handles:
            handle.remove()
    return Recording(ids, positions, meta, pool, pool.data.clone(), backend.args, logits, inputs)


def check_decoder(decoder: FusedDecoder, recording: Recording) -> str | None:
    """Compare embedding, every layer, and the head with the recorded modules; None when all agree, else where not."""
    embedded = decoder.embed(recording.input_ids)
    if (difference := _difference(embedded, recording.inputs[0], embedded)) is not None:
        return f"the layers' input is not the embedding alone (relative difference {difference:.2g})"
    pool = recording.pool
    backend = ReferenceBackend(pool)
    backend.prepare(recording.meta)
    batch = Batch(decoder.angles(recording.positions), recording.meta, backend, pool)
    for index, layer in enumerate(decoder.layers):
        before, after = recording.inputs[index : index + 2]
        pool.data[:, index].fill_(torch.nan)
        pool.data[:, index, :NUM_TOKENS] = 0
        if (difference := _layer_difference(layer, before, after, batch, decoder.ops)) is not None:
            return f"layer {index}, fused, differs from its module (relative difference {difference:.2g})"
        new = slice(NUM_TOKENS, None)
        for name, part in (("keys", 0), ("values", 1)):
            want = recording.kv[part, index, new]
            if (difference := _difference(pool.data[part, index, new], want, want)) is not None:
                return f"layer {index}, fused, stores other {name} (relative difference {difference:.2g})"
    if decoder.norm is None or decoder.head is None:
        return None
    logits = decoder.ops.norm_linear(recording.inputs[-1].clone(), decoder.norm, decoder.head)
    if (difference := _difference(logits, recording.logits, recording.logits)) is not None:
        return f"the logits are not head(norm(hidden)) (relative difference {difference:.2g})"
    return None


def _layer_difference(layer: FusedLayer, before: Tensor, after: Tensor, batch: Batch, ops: Ops) -> float | None:
    """`_difference` of a layer from its module. Tokens with a near tie between experts count where all are such."""
    middle = layer.attention(before.clone(), batch, ops)
    settled = None
    if isinstance(layer.mlp, FusedExperts):
        settled = layer.mlp.experts.settled(ops.norm(middle, layer.mlp.norm))
    got = layer.feed(middle, batch, ops)
    if settled is None:
        return _difference(got, after, after - before)
    if not settled.any():
        return _difference(got, after, after - before, UNSETTLED_TOLERANCE)
    return _difference(got[settled], after[settled], (after - before)[settled])


def _difference(got: Tensor, want: Tensor, scale: Tensor, tolerance: float | None = None) -> float | None:
    """||got - want|| / ||scale|| when that is more than rounding explains (NaN is), else None."""
    if tolerance is None:
        tolerance = TOLERANCE.get(want.dtype, LOW_PRECISION_TOLERANCE)
    distance, size = float((got.float() - want.float()).norm()), float(scale.float().norm())
    rounding = 2 * torch.finfo(want.dtype).eps * float(want.float().norm())
    return None if distance <= tolerance * size + rounding else distance / max(size, 1e-30)
