"""The part of a forward that a stage of a pipeline computes, and how its rows come and go.

eager    receive -> layers -> send
graph    receive | graph: layers, from one fixed place to another | send
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from kvarena.engine.attention.base import AttentionBackend, AttentionMetadata
from kvarena.engine.attention.hook import attention_context
from kvarena.engine.models.spec import LoadedModel, batch_of
from kvarena.engine.runner.graphs import Forward
from kvarena.engine.vision.encoder import InputRows


class ModuleStage:
    """A stage's layers as transformers' modules.

    Args:
        model: the stage's part.
        backend: attention over its pool.
    """

    def __init__(self, model: LoadedModel, backend: AttentionBackend) -> None:
        assert model.shard is not None
        self._model, self._backend, self._is_last = model, backend, model.shard.layout.is_last
        module: Any = model.module
        self._base = module.get_submodule(module.base_model_prefix)

    def __call__(
        self,
        input_ids: Tensor,
        positions: Tensor,
        meta: AttentionMetadata,
        *,
        out: Tensor | None = None,
        all_rows: bool = False,  # noqa: ARG002 - as in `ModuleForward`
        inputs: InputRows | None = None,
    ) -> Tensor:
        """See `Forward`; before the last stage the stream, [T, hidden]."""
        with attention_context(meta, self._backend):
            if self._is_last:
                logits = self._model.logits(input_ids, positions, meta.logits_indices, inputs)
                return logits if out is None else out.copy_(logits)
            found: Tensor = self._base(**batch_of(input_ids, positions, inputs)).last_hidden_state[0]
            return found


class StageForward:
    """A stage's part of a forward: it takes rows from the stage before and hands its own on; the last has logits.

    Args:
        compute: the stage's layers; before the last stage they give the stream.
        model: the stage's part.
        max_tokens: most tokens of a step in a graph; 0: there is none.
    """

    def __init__(self, compute: Forward, model: LoadedModel, max_tokens: int = 0) -> None:
        groups = model.groups
        assert groups is not None
        assert groups.onward is not None
        self._compute, self._layout, self._onward = compute, groups.layout, groups.onward
        hidden: int = cast(Any, model.module).config.hidden_size
        # Where a graph reads its rows, and where it leaves them.
        self._came, self._made = (
            torch.zeros(max_tokens, hidden, dtype=model.spec.dtype, device=model.device) for _ in range(2)
        )

    def __call__(
        self,
        input_ids: Tensor,
        positions: Tensor,
        meta: AttentionMetadata,
        *,
        out: Tensor | None = None,
        all_rows: bool = False,
        inputs: InputRows | None = None,
    ) -> Tensor:
        """See `Forward`; before the last stage [N, 0]."""
        layout = self._layout
        if not layout.is_first:
            came = self._came.new_empty(positions.shape[-1], self._came.shape[1])
            inputs = _given(self._onward.receive(came, layout.rank_of(layout.stage - 1)))
        found = self._compute(input_ids, positions, meta, out=out, all_rows=all_rows, inputs=inputs)
        if layout.is_last:
            return found
        self._onward.send(found, layout.rank_of(layout.stage + 1))
        return found.new_empty(len(meta.logits_indices), 0)

    def captured(
        self, input_ids: Tensor, positions: Tensor, meta: AttentionMetadata, *, out: Tensor, all_rows: bool = False
    ) -> Tensor:
        """The part that a graph may hold: between `receive` and `send`."""
        layout, count = self._layout, len(input_ids)
        inputs = None if layout.is_first else _given(self._came[:count])
        if layout.is_last:
            return self._compute(input_ids, positions, meta, out=out, all_rows=all_rows, inputs=inputs)
        self._made[:count].copy_(self._compute(input_ids, positions, meta, all_rows=all_rows, inputs=inputs))
        return out

    def receive(self, num_tokens: int) -> None:
        """See `Between.receive`."""
        if not self._layout.is_first:
            self._onward.receive(self._came[:num_tokens], self._layout.rank_of(self._layout.stage - 1))

    def send(self, num_tokens: int) -> None:
        """See `Between.send`."""
        if not self._layout.is_last:
            # The next part's rows are made while these are on their way.
            self._onward.send(self._made[:num_tokens].clone(), self._layout.rank_of(self._layout.stage + 1))


def _given(rows: Tensor) -> InputRows:
    """Rows of the stage before, in place of embeddings."""
    return InputRows(rows, rows.new_empty(0, dtype=torch.int64), rows[:0, None])
