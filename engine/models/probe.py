"""Tiny forwards at load, which tell whether the runner can drive a model, and what its layers look like.

The runner packs sequences into one row, hands attention no mask, and keeps all state in the KV pool. That is right for
a model if every layer calls the attention hook once and nothing else mixes tokens. So the probe

1. traces one sequence with the masks that transformers' own attention gets (`engine/models/masks.py`): every layer
   calls the hook once, its mask is causal, and a window that is in the mask alone is bound to the layer;
2. compares two packed sequences under the hook with each of them alone under the model's own attention;
3. does both again with every window, key selection and scale that the config states cut short
   (`engine/models/spans.py`), so that the few tokens cross them.

A model with recurrent or convolutional state, with attention that does not go through the hook, with positions counted
along the row, or with a mask of its own fails there.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from kvarena.engine.attention.base import AttentionBackend, AttentionMetadata, packed_metadata
from kvarena.engine.attention.hook import HOOK_NAME, WINDOW_ATTRIBUTE, attention_context, register
from kvarena.engine.attention.null import NullBackend
from kvarena.engine.attention.reference import ReferenceBackend
from kvarena.engine.checkpoints.directory import one_line
from kvarena.engine.errors import ModelError
from kvarena.engine.models.choices import NoteChoices, RepeatChoices, side_by_side
from kvarena.engine.models.masks import MASKED_NAME, register_masks, span_of
from kvarena.engine.models.spans import short_spans
from kvarena.engine.pool.kv_pool import KVPool

PROBE_LENS = (7, 5)
BLOCK_SIZE = 4
# Largest relative difference of the logits. Rounding; experts are the same in both (choices.py).
TOLERANCE = {torch.float32: 0.01}
LOW_PRECISION_TOLERANCE = 0.3


class AttentionGeometry(NamedTuple):
    """What the layers showed when called.

    Attributes:
        num_layers: attention layers.
        num_kv_heads, head_dim: of every layer.
        windows: each layer's window, None where it sees the whole context.
        shared_layers: layers that attend to the keys and values of an earlier one.
        vocab_size: width of the logits.
        has_plain_layers: some layer sees the whole context, without a soft cap or sinks.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    windows: tuple[int | None, ...]
    shared_layers: int
    vocab_size: int
    has_plain_layers: bool


class _Recorder(NullBackend):
    """Notes what it is called with, and binds to each layer the window of its mask.

    Args:
        chunk: attention chunk that limits the context (`max_model_len`); a mask with another one is refused.
        refused: how error messages begin.
    """

    def __init__(self, chunk: int | None, refused: str) -> None:
        self.calls: list[tuple[int, int, int]] = []
        self.windows: dict[int, int | None] = {}
        self.has_plain_layers = False
        self._chunk = chunk
        self._refused = refused
        self._keys: dict[int, Tensor] = {}

    @property
    def shared_layers(self) -> int:
        """Layers whose keys are an earlier layer's tensor."""
        return len(self._keys) - len({id(key) for key in self._keys.values()})

    def note_mask(self, module: nn.Module, mask: Tensor | None, passed_window: int | None) -> None:
        """See `TracingBackend.note_mask`."""
        module.__dict__.pop(WINDOW_ATTRIBUTE, None)
        span = span_of(mask)
        if span is None:
            return
        layer = module.__dict__.get("layer_idx")
        if not span.is_known or (span.asked == 0 and span.window != passed_window):
            raise ModelError(
                f"{self._refused}: the mask of layer {layer} is not causal, or hides keys in a way of the model's own "
                "(a selection of keys, a bias of positions, attention to later tokens); the engine's attention has "
                "causal masks and windows"
            )
        if span.chunk is not None and span.chunk != self._chunk:
            raise ModelError(
                f"{self._refused}: layer {layer} attends in chunks of {span.chunk} tokens, which config.json does not "
                "state as attention_chunk_size"
            )
        if span.window is None and passed_window is not None and passed_window >= span.asked:
            return  # wider than the positions that the mask was asked about
        if span.window != passed_window:
            module.__dict__[WINDOW_ATTRIBUTE] = span.window

    def note_keys(self, layer: int, keys: Tensor) -> None:
        """See `TracingBackend.note_keys`."""
        self._keys[layer] = keys

    def write_kv(self, k: Tensor, v: Tensor, layer: int, meta: AttentionMetadata) -> None:  # noqa: ARG002
        """Note the layer and its heads."""
        self.calls.append((layer, k.shape[1], k.shape[2]))

    def attend(
        self,
        q: Tensor,
        layer: int,
        meta: AttentionMetadata,
        *,
        scale: float,
        sliding_window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Note the window, and whether there is nothing of the kind."""
        self.windows[layer] = sliding_window
        self.has_plain_layers |= sliding_window is None and softcap is None and sinks is None
        return super().attend(q, layer, meta, scale=scale, sliding_window=sliding_window, softcap=softcap, sinks=sinks)


def probe_attention(module: nn.Module, name: str, num_layers: int, vocab_size: int) -> AttentionGeometry:
    """Bind `module` to the hook, see that it can be driven, and measure its layers.

    Args:
        module: a transformers causal language model in eval mode.
        name: how error messages call it.
        num_layers: decoder layers of its config.
        vocab_size: ids below this are valid inputs.

    Raises:
        ModelError: one line that says why the runner cannot drive it.
    """
    refused = f"{name} ({type(module).__name__}) cannot be run"
    with _probing(refused), torch.inference_mode():
        geometry = _trace(module, num_layers, vocab_size, refused)
        _compare(module, geometry, vocab_size, refused)
        with short_spans(module) as names:
            if names:
                short = f"{refused}: with {', '.join(names)} cut to a few tokens"
                _compare(module, _trace(module, num_layers, vocab_size, short), vocab_size, short)
        if names:
            _trace(module, num_layers, vocab_size, refused)
        module.set_attn_implementation(HOOK_NAME)  # type: ignore[operator]
    return geometry


def trace_attention(module: nn.Module, name: str, num_layers: int, vocab_size: int) -> AttentionGeometry:
    """What `probe_attention` measures of the layers, without their numbers: for a module on the meta device.

    Raises:
        ModelError: one line that says why the layers cannot be measured.
    """
    refused = f"the layers of {name} ({type(module).__name__}) cannot be measured"
    with _probing(refused), torch.inference_mode():
        return _trace(module, num_layers, vocab_size, refused)


def _trace(module: nn.Module, num_layers: int, vocab_size: int, refused: str) -> AttentionGeometry:
    """One sequence with masks; leaves each layer its window."""
    register()
    register_masks()
    ids = _probe_ids(vocab_size, next(module.parameters()).device)[:1]
    module.set_attn_implementation(MASKED_NAME)  # type: ignore[operator]
    text = module.config.get_text_config()  # type: ignore[operator, union-attr]
    recorder = _Recorder(getattr(text, "attention_chunk_size", None), refused)
    logits = _packed(module, ids, recorder)
    heads = _check_calls(recorder, num_layers, refused)
    return AttentionGeometry(
        num_layers=num_layers,
        num_kv_heads=heads[0],
        head_dim=heads[1],
        windows=tuple(recorder.windows[layer] for layer in range(num_layers)),
        shared_layers=recorder.shared_layers,
        vocab_size=logits[0].shape[-1],
        has_plain_layers=recorder.has_plain_layers,
    )


def _compare(module: nn.Module, geometry: AttentionGeometry, vocab_size: int, refused: str) -> None:
    """See that packed sequences get the logits that each gets alone, under the model's own attention."""
    parameter = next(module.parameters())
    ids = _probe_ids(vocab_size, parameter.device)
    module.set_attn_implementation("eager")  # type: ignore[operator]
    alone, choices = [], []
    for row in ids:
        with NoteChoices() as noted:
            alone.append(module(input_ids=row[None], use_cache=False).logits[0, -1])
        choices.append(noted.found)
    module.set_attn_implementation(HOOK_NAME)  # type: ignore[operator]
    pool = KVPool.of_model(
        geometry,
        num_blocks=sum(-(-n // BLOCK_SIZE) for n in PROBE_LENS),
        block_size=BLOCK_SIZE,
        dtype=parameter.dtype,
        device=parameter.device,
    )
    try:
        with RepeatChoices(side_by_side(choices)):
            packed = _packed(module, ids, ReferenceBackend(pool))
    except (TypeError, AttributeError) as error:  # of None: with masks the trace went through
        raise ModelError(
            f"{refused}: its layers read the attention mask themselves, to select keys for instance, and the engine's "
            f"attention has none ({type(error).__name__}: {one_line(error)})"
        ) from error
    difference = _difference(packed, alone)
    if difference is None:
        return
    module.set_attn_implementation("eager")  # type: ignore[operator]
    raise ModelError(
        f"{refused}: {_why(module, ids, alone, choices)} (relative difference of the logits {difference:.2g})"
    )


def _why(module: nn.Module, ids: list[Tensor], alone: list[Tensor], choices: list[list[Tensor]]) -> str:
    """What makes packed sequences differ, as far as the model's own attention can tell; `choices` are the experts'."""
    if "position_ids" not in inspect.signature(module.forward).parameters:
        return "its forward takes no position_ids, so it counts positions along the packed row and not in each sequence"
    placed = []
    for row, chosen in zip(ids, choices, strict=True):
        positions = torch.arange(len(row), device=row.device)[None]
        with RepeatChoices(chosen):
            placed.append(module(input_ids=row[None], position_ids=positions, use_cache=False).logits[0, -1])
    if _difference(placed, alone) is not None:
        return "given the positions 0, 1, 2, ... it answers otherwise than without any: it counts them in another way"
    return "packed sequences give other logits than each alone; something beside standard causal attention mixes tokens"


def _probe_ids(vocab_size: int, device: torch.device) -> list[Tensor]:
    return [(torch.arange(1, n + 1, device=device) * 7919 + 11 * n) % vocab_size for n in PROBE_LENS]


@contextmanager
def _probing(refused: str) -> Iterator[None]:
    """Whatever a model's code raises becomes a ModelError of one line."""
    try:
        yield
    except ModelError:
        raise
    # Anything: remote and unusual model code may raise whatever it likes.
    except Exception as error:
        raise ModelError(
            f"{refused}: a probing forward failed with {type(error).__name__}: {one_line(error)}"
        ) from error


def _check_calls(recorder: _Recorder, num_layers: int, refused: str) -> tuple[int, int]:
    """Every layer called the hook once, all with the same heads; returns (num_kv_heads, head_dim)."""
    calls = Counter(layer for layer, _, _ in recorder.calls)
    if not calls:
        raise ModelError(f"{refused}: its layers do not use transformers' attention interface (no standard attention)")
    often = [layer for layer, count in calls.items() if count > 1]
    if often:
        raise ModelError(
            f"{refused}: layer {often[0]} calls attention {calls[often[0]]} times in a forward; the KV pool holds one "
            "set of keys and values of a layer"
        )
    without = [layer for layer in range(num_layers) if not calls[layer]]
    if without:
        raise ModelError(
            f"{refused}: {num_layers - len(without)} of {num_layers} layers use standard attention; layer {without[0]} "
            "does not (linear attention, state-space and hybrid layers keep state that a KV pool does not hold)"
        )
    if len(calls) > num_layers:
        raise ModelError(f"{refused}: {len(calls)} layers call attention, and its config states {num_layers}")
    heads = {(num_heads, head_dim) for _, num_heads, head_dim in recorder.calls}
    if len(heads) > 1:
        found = ", ".join(f"{num_heads} x {head_dim}" for num_heads, head_dim in sorted(heads))
        raise ModelError(
            f"{refused}: its layers differ in KV heads ({found}); the KV pool needs the same in all layers"
        )
    return heads.pop()


def _difference(found: list[Tensor], wanted: list[Tensor]) -> float | None:
    """The largest relative difference of the logits that rounding does not explain (NaN is one), or None."""
    for got, expected in zip(found, wanted, strict=True):
        limit = TOLERANCE.get(got.dtype, LOW_PRECISION_TOLERANCE)
        got, expected = got.float(), expected.float()
        difference = float((got - expected).norm() / expected.norm().clamp_min(1e-20))
        # Written so that NaN fails as well; a model whose own logits are not finite says so when it is run.
        if not difference <= limit and bool(expected.isfinite().all()):
            return difference
    return None


def _packed(module: nn.Module, ids: list[Tensor], backend: AttentionBackend) -> list[Tensor]:
    """Last-token logits of the sequences, run as one packed row under the hook."""
    device = ids[0].device
    num_blocks = [-(-len(row) // BLOCK_SIZE) for row in ids]
    table = np.zeros((len(ids), max(num_blocks)), dtype=np.int32)
    used = 0
    for row, count in enumerate(num_blocks):
        table[row, :count] = used + count - np.arange(count)  # not in order, as in a used pool
        used += count
    meta = packed_metadata([len(row) for row in ids], table, BLOCK_SIZE, device)
    backend.prepare(meta)
    positions = torch.cat([torch.arange(len(row), device=device) for row in ids])
    given = {"input_ids": torch.cat(ids)[None], "position_ids": positions[None]}
    if device.type == "meta":  # a mask that is given keeps transformers from looking for sequences in the positions
        given["attention_mask"] = torch.ones_like(given["input_ids"])
    with attention_context(meta, backend):
        output = module(**given, use_cache=False)
    return list(output.logits[0].index_select(0, meta.logits_indices))
