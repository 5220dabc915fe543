"""A backend that stores nothing and answers zeros: for forwards whose result nobody reads."""

from __future__ import annotations

import torch
from torch import Tensor

from kvarena.engine.attention.base import AttentionMetadata


class NullBackend:
    """Attention left out, its tensors' shapes kept."""

    def prepare(self, meta: AttentionMetadata) -> None:
        """Nothing to prepare."""

    def write_kv(self, k: Tensor, v: Tensor, layer: int, meta: AttentionMetadata) -> None:
        """Nothing to store."""

    def attend(
        self,
        q: Tensor,
        layer: int,  # noqa: ARG002 - part of the protocol
        meta: AttentionMetadata,  # noqa: ARG002
        *,
        scale: float,  # noqa: ARG002
        sliding_window: int | None = None,  # noqa: ARG002
        softcap: float | None = None,  # noqa: ARG002
        sinks: Tensor | None = None,  # noqa: ARG002
    ) -> Tensor:
        """Zeros of q's shape."""
        return torch.zeros_like(q)
