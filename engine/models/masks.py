"""What a model's masks say: which keys a query of each layer sees.

transformers builds masks from functions of (query index, key index), so they can be asked about positions that no
short prompt reaches. A traced forward (`MASKED_NAME`) gets the masks that eager attention would get, each with its
`Span` attached; a layer that hands on another tensor has made a mask of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from kvarena.engine.attention.hook import traced_attention

MASKED_NAME = "kvarena_masks"
# Positions are asked about up to so many times those that the config states, which a rotation may stretch, and at most
# so many.
STRETCH, MOST_POSITIONS = 64, 2**20
_SPAN = "kvarena_span"


class Span(NamedTuple):
    """The keys that a query at position p sees, up to its own.

    Attributes:
        window: those above p - window; None: no window.
        chunk: those of p's chunk of so many positions; None: no chunks.
        is_known: False when the mask is neither plain, nor a window, nor chunks.
        asked: positions below this were asked about.
    """

    window: int | None = None
    chunk: int | None = None
    is_known: bool = True
    asked: int = 0


UNKNOWN = Span(is_known=False)


def register_masks() -> None:
    """Make the traced attention known to transformers under `MASKED_NAME`. May be called again."""
    AttentionInterface.register(MASKED_NAME, traced_attention)
    AttentionMaskInterface.register(MASKED_NAME, _spanned_mask)


def span_of(mask: Tensor | None) -> Span | None:
    """What a mask that a layer handed on lets its queries see.

    Args:
        mask: [1, heads, T, T], bool (True: seen) or to be added; or None.

    Returns:
        None when nothing can be said beyond the prompt: there is no mask, or one that cannot be asked or that the layer
        has copied, and it is causal (on the meta device: any). A window that only the prompt shows has `asked` 0.
        `UNKNOWN` for one of the layer's own making.
    """
    if mask is None:
        return None
    found: Span | None = getattr(mask, _SPAN, None)
    if found is not None or mask.is_meta:
        return found
    seen = mask if mask.dtype == torch.bool else mask == 0
    hidden = ~mask if mask.dtype == torch.bool else mask <= torch.finfo(mask.dtype).min / 2
    causal = torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).tril()
    if bool(((seen == causal) & (hidden == ~causal)).all()):
        return None
    window = int(seen[0, 0, -1].sum())
    causal &= ~causal.tril(-window)
    return Span(window=window) if bool(((seen == causal) & (hidden == ~causal)).all()) else UNKNOWN


def find_span(mask_function: Callable[..., Tensor], num_positions: int, device: torch.device) -> Span:
    """Ask a mask function of transformers about positions below `num_positions`."""

    def sees(query: Tensor, key: Tensor) -> Tensor:
        zero = torch.zeros((), dtype=torch.int64, device=device)
        return torch.as_tensor(mask_function(zero, zero, query, key), device=device).expand(
            torch.broadcast_shapes(query.shape, key.shape)
        )

    positions = torch.arange(num_positions, device=device)
    blind = (~sees(positions, positions.new_zeros(()))).nonzero()
    first = int(blind[0]) if len(blind) else num_positions
    if first == 0:
        return UNKNOWN
    span = Span(asked=num_positions)
    if first < num_positions:
        after = sees(positions.new_tensor(first), positions[: first + 1]).nonzero()
        if not len(after):
            return UNKNOWN
        start = int(after[0])
        if start not in (1, first):
            return UNKNOWN
        # A chunk of one is a window of one.
        span = span._replace(window=first) if start == 1 else span._replace(chunk=first)
    tried = {1, 2, first - 1, first, first + 1, 2 * first - 1, 2 * first, 2 * first + 1, num_positions - 2}
    for query in sorted(tried):
        if span.is_known and 0 < query < num_positions - 1:
            lowest = 0
            if span.window is not None:
                lowest = max(0, query - span.window + 1)
            elif span.chunk is not None:
                lowest = query // span.chunk * span.chunk
            keys = positions[: query + 2]
            if not torch.equal(sees(positions.new_tensor(query), keys), (keys >= lowest) & (keys <= query)):
                span = UNKNOWN
    return span


def _spanned_mask(mask_function: Callable[..., Tensor], config: Any, device: Any = "cpu", **kwargs: Any) -> Tensor:
    """The mask that eager attention gets, with its span."""
    kwargs["allow_is_bidirectional_skip"] = False  # no mask at all would tell nothing
    mask = eager_mask(mask_function=mask_function, config=config, device=device, **kwargs)
    stated = getattr(config, "max_position_embeddings", None)
    num_positions = min(STRETCH * stated if isinstance(stated, int) else MOST_POSITIONS, MOST_POSITIONS)
    try:
        # On the meta device nothing has values; functions of indices alone can be asked on the CPU.
        span = find_span(mask_function, num_positions, torch.device("cpu" if mask.is_meta else mask.device))
    except (RuntimeError, NotImplementedError, IndexError):
        return mask  # it looks into tensors of the prompt: what the mask shows of the prompt must do
    setattr(mask, _SPAN, span)
    return mask
