"""Tiny forwards at load, which tell whether the runner can drive a model, and what its layers look like.

The runner packs sequences into one row and keeps all state in the KV pool. That is right for a model if every layer
calls the attention hook once and nothing else mixes tokens. So the probe counts the calls, and then compares two
packed sequences under the hook with each of them alone under the model's own attention. A model with recurrent or
convolutional state, with attention that does not go through the hook, or with a mask of its own fails there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from engine.attention.base import AttentionBackend, AttentionMetadata, packed_metadata
from engine.attention.hook import HOOK_NAME, attention_context, register
from engine.attention.null import NullBackend
from engine.attention.reference import ReferenceBackend
from engine.checkpoints.directory import one_line
from engine.errors import ModelError
from engine.kv_pool import KVPool

PROBE_LENS = (7, 5)
BLOCK_SIZE = 4
# Largest relative difference of the logits: rounding, and in low precision an expert chosen differently.
TOLERANCE = {torch.float32: 0.01}
LOW_PRECISION_TOLERANCE = 0.3


class AttentionGeometry(NamedTuple):
    """What the layers showed when called.

    Attributes:
        num_layers: attention layers.
        num_kv_heads, head_dim: of every layer.
        sliding_window: the widest layer's window; None when a layer has none.
        vocab_size: width of the logits.
        has_plain_layers: some layer sees the whole context, without a soft cap or sinks.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    sliding_window: int | None
    vocab_size: int
    has_plain_layers: bool


class _Recorder(NullBackend):
    """Notes what it is called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int, int]] = []
        self.windows: list[int | None] = []
        self.has_plain_layers = False

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
        self.windows.append(sliding_window)
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
    device = next(module.parameters()).device
    ids = _probe_ids(vocab_size, device)
    refused = f"{name} ({type(module).__name__}) cannot be run"
    with _probing(refused), torch.inference_mode():
        register()
        module.set_attn_implementation("eager")  # type: ignore[operator]
        alone = [module(input_ids=row[None], use_cache=False).logits[0, -1] for row in ids]
        module.set_attn_implementation(HOOK_NAME)  # type: ignore[operator]
        recorder = _Recorder()
        _packed(module, ids, recorder)
        heads = _check_calls(recorder, num_layers, refused)
        pool = KVPool(
            num_blocks=sum(-(-n // BLOCK_SIZE) for n in PROBE_LENS),
            block_size=BLOCK_SIZE,
            num_layers=num_layers,
            num_kv_heads=heads[0],
            head_dim=heads[1],
            dtype=next(module.parameters()).dtype,
            device=device,
        )
        packed = _packed(module, ids, ReferenceBackend(pool))
    _check_logits(packed, alone, refused)
    return _geometry(recorder, num_layers, heads, alone[0].shape[-1])


def trace_attention(module: nn.Module, name: str, num_layers: int, vocab_size: int) -> AttentionGeometry:
    """What `probe_attention` measures of the layers, without their numbers: for a module on the meta device.

    Raises:
        ModelError: one line that says why the layers cannot be measured.
    """
    refused = f"the layers of {name} ({type(module).__name__}) cannot be measured"
    with _probing(refused), torch.inference_mode():
        register()
        module.set_attn_implementation(HOOK_NAME)  # type: ignore[operator]
        recorder = _Recorder()
        logits = _packed(module, _probe_ids(vocab_size, next(module.parameters()).device), recorder)
        heads = _check_calls(recorder, num_layers, refused)
    return _geometry(recorder, num_layers, heads, logits[0].shape[-1])


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


def _geometry(recorder: _Recorder, num_layers: int, heads: tuple[int, int], vocab_size: int) -> AttentionGeometry:
    windows = [window for window in recorder.windows if window is not None]
    return AttentionGeometry(
        num_layers=num_layers,
        num_kv_heads=heads[0],
        head_dim=heads[1],
        sliding_window=max(windows) if len(windows) == num_layers else None,
        vocab_size=vocab_size,
        has_plain_layers=recorder.has_plain_layers,
    )


def _check_calls(recorder: _Recorder, num_layers: int, refused: str) -> tuple[int, int]:
    """Every layer called the hook once, all with the same heads; returns (num_kv_heads, head_dim)."""
    calls = Counter(layer for layer, _, _ in recorder.calls)
    if not calls:
        raise ModelError(f"{refused}: its layers do not use transformers' attention interface (no standard attention)")
    if calls != Counter(range(num_layers)):
        without = [layer for layer in range(num_layers) if calls[layer] != 1]
        raise ModelError(
            f"{refused}: {num_layers - len(without)} of {num_layers} layers use standard attention; layer "
            f"{without[0] if without else max(calls)} called it {calls[without[0]] if without else 1} times "
            "(linear attention, state-space and hybrid layers keep state that a KV pool does not hold)"
        )
    heads = {(num_heads, head_dim) for _, num_heads, head_dim in recorder.calls}
    if len(heads) > 1:
        found = ", ".join(f"{num_heads} x {head_dim}" for num_heads, head_dim in sorted(heads))
        raise ModelError(
            f"{refused}: its layers differ in KV heads ({found}); the KV pool needs the same in all layers"
        )
    return heads.pop()


def _check_logits(packed: list[Tensor], alone: list[Tensor], refused: str) -> None:
    for got, expected in zip(packed, alone, strict=True):
        got, expected = got.float(), expected.float()
        difference = float((got - expected).norm() / expected.norm().clamp_min(1e-20))
        # Written so that NaN fails as well; a model whose own logits are not finite says so when it is run.
        if not difference <= TOLERANCE.get(packed[0].dtype, LOW_PRECISION_TOLERANCE) and bool(
            expected.isfinite().all()
        ):
            raise ModelError(
                f"{refused}: packed sequences give other logits than each alone (relative difference "
                f"{difference:.2g}); something beside standard causal attention mixes tokens"
            )


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
    with attention_context(meta, backend):
        output = module(input_ids=torch.cat(ids)[None], position_ids=positions[None], use_cache=False)
    return list(output.logits[0].index_select(0, meta.logits_indices))
