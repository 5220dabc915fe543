"""The hook through which transformers models call a backend.

The attention function gets the step's metadata and the backend from one context variable, which the runner sets
around the forward (`attention_context`). Keyword arguments would not do: some model families drop those that they
do not know. This is the project's only ambient state.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, Protocol, cast

from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AttentionInterface

from kvarena.engine.attention.base import AttentionBackend, AttentionMetadata
from kvarena.engine.attention.temperature import by_position, is_tuned
from kvarena.engine.errors import EngineError

HOOK_NAME = "kvarena"
# Set on a layer whose window is in its mask alone: the hook gets no mask.
WINDOW_ATTRIBUTE = "kvarena_window"


class _Context(NamedTuple):
    meta: AttentionMetadata
    backend: AttentionBackend


_CONTEXT: ContextVar[_Context] = ContextVar("kvarena_attention")


@contextmanager
def attention_context(meta: AttentionMetadata, backend: AttentionBackend) -> Iterator[None]:
    """Within the block, attention layers of this thread use `backend` with `meta`."""
    token = _CONTEXT.set(_Context(meta, backend))
    try:
        yield
    finally:
        _CONTEXT.reset(token)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001 - None: the name is not known to the mask builder
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,  # noqa: ARG001 - the probe at load refuses models that pass what changes the result
) -> tuple[Tensor, None]:
    """What a transformers attention layer calls: stores the new KV, then attends.

    Args:
        module: the layer; its `layer_idx` is the layer in the pool.
        query: [1, num_heads, T, head_dim], rotated.
        key, value: [1, num_kv_heads, T, head_dim]; the value's head may be smaller.
        attention_mask: always None.
        scaling: factor on the scores.
        sliding_window: this layer's window, or None; `WINDOW_ATTRIBUTE` of the layer goes before it.
        softcap: soft cap on the scores.
        s_aux: attention sinks, [num_heads].
        kwargs: what families pass on besides, such as `position_ids`.

    Returns:
        [1, T, num_heads, value head_dim], and None for the attention weights.
    """
    context = _CONTEXT.get(None)
    if context is None:
        raise EngineError("the model was called outside of attention_context(); only the runner may call it")
    layer: int = module.layer_idx  # type: ignore[assignment]
    if is_tuned(module):
        query = by_position(query, module, context.meta)
    head_dim, value_dim = query.shape[-1], value.shape[-1]
    if value_dim < head_dim:
        value = pad(value, (0, head_dim - value_dim))
    context.backend.write_kv(key[0].transpose(0, 1), value[0].transpose(0, 1), layer, context.meta)
    out = context.backend.attend(
        query[0].transpose(0, 1),
        layer,
        context.meta,
        scale=head_dim**-0.5 if scaling is None else scaling,
        sliding_window=module.__dict__.get(WINDOW_ATTRIBUTE, sliding_window),
        softcap=softcap,
        sinks=s_aux,
    )
    return out[None, :, :, :value_dim], None


class TracingBackend(AttentionBackend, Protocol):
    """A backend that wants to know what mask each layer hands on."""

    def note_mask(self, module: nn.Module, mask: Tensor | None, passed_window: int | None) -> None:
        """Called before the layer's own calls, with what it passed as mask and as `sliding_window`."""
        ...

    def note_keys(self, layer: int, keys: Tensor) -> None:
        """Called with the very tensor of keys that the layer passed."""
        ...


def traced_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """`attention` of a forward with masks; the context's backend is a `TracingBackend`."""
    context = _CONTEXT.get(None)
    if context is None:
        raise EngineError("the model was called outside of attention_context(); only the probe may trace it")
    backend = cast(TracingBackend, context.backend)
    backend.note_mask(module, attention_mask, kwargs.get("sliding_window"))
    backend.note_keys(module.layer_idx, key)  # type: ignore[arg-type]
    return attention(module, query, key, value, None, **kwargs)


def register() -> None:
    """Make the hook known to transformers under `HOOK_NAME`. May be called again."""
    AttentionInterface.register(HOOK_NAME, attention)
