"""Runners of ranks: those of one device, which pick tokens together, and of which one plans."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvarena.engine.contract import StepPlan
from kvarena.engine.kernels.all_reduce import PeerMemory, best_token
from kvarena.engine.kernels.drawing import NO_TOKEN
from kvarena.engine.kernels.sample import draw_parts
from kvarena.engine.parallel.groups import Group
from kvarena.engine.parallel.shard import Shard
from kvarena.engine.ranks.driver import Driving
from kvarena.engine.ranks.stages import Staged
from kvarena.engine.ranks.worker import MirroredRows
from kvarena.engine.runner.draw import Draw
from kvarena.engine.runner.fused_runner import FusedRunner, draws_on
from kvarena.engine.runner.request_rows import RequestRows
from kvarena.engine.runner.torch_runner import TorchRunner
from kvarena.engine.sampling.output import HostTokens
from kvarena.engine.sampling.transfer import to_device


class RankRunner(Staged, TorchRunner):
    """A rank's runner on modules."""

    rows_class: type[RequestRows] = MirroredRows


class FusedRankRunner(Staged, FusedRunner):
    """A rank's runner on fused layers; on a GPU one kernel draws among a rank's columns."""

    rows_class: type[RequestRows] = MirroredRows

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._part_draw: PartDraw | None = None
        self._gathered_draw: Draw | None = None
        if draws_on(self._device) and not self._sampler.num_scores:
            groups, most = self.model.groups, kwargs["max_num_seqs"]
            memory = None if groups is None or groups.reducer is None else groups.reducer.best_memory(most)
            self._part_draw = PartDraw(most, self._device, self._group, self._shard, memory)
            if self._group.rank == 0:
                self._gathered_draw = Draw(most, self._device)

    @property
    def _whole_draw(self) -> Draw | None:
        return self._gathered_draw

    def _sample_decode(self, plan: StepPlan, rows: np.ndarray, logits: Tensor, params: Tensor) -> HostTokens | None:
        draw, columns = self._part_draw, self._rows.columns
        # Tokens of a pipeline are not drawn where their step's result is asked for.
        if draw is None or self._layout.pipeline > 1 or not columns["is_plain"][rows].all():
            return super()._sample_decode(plan, rows, logits, params)
        columns["sampled_to"][rows] = [entry.start + 1 for entry in plan.scheduled]
        tokens = draw(logits, params, self._rows.last_tokens)
        return draw.send(tokens, [entry.req.request_id for entry in plan.scheduled])

    def _pick_plain(self, rows: np.ndarray, stops: np.ndarray, logits: Tensor) -> tuple[Tensor, Tensor]:
        if self._part_draw is None:
            return super()._pick_plain(rows, stops, logits)
        params = to_device(self._rows.draw_params(rows, stops), self._device)
        tokens = self._part_draw(logits, params, self._rows.last_tokens)
        return tokens.clamp_min(0), tokens >= 0


class PartDraw(Draw):
    """A `Draw` among the columns of all ranks, of rows that do not filter.

    Args:
        max_rows: most rows of a step.
        device: a GPU.
        group: the ranks that have the other columns.
        shard: which columns are here.
        memory: in which the ranks meet, without a call of the library; None: they gather.
    """

    def __init__(
        self, max_rows: int, device: torch.device, group: Group, shard: Shard, memory: PeerMemory | None
    ) -> None:
        super().__init__(max_rows, device)
        self._group, self._shard, self._memory = group, shard, memory

    def __call__(self, logits: Tensor, params: Tensor, last_tokens: Tensor, *, filters: bool = False) -> Tensor:
        """See `Draw.__call__`."""
        assert not filters
        logits = logits[:, : self._shard.cuts.num_tokens]
        scores, tokens = draw_parts(logits, params, self._shard.cuts.first_token, self._scratch, self._num_programs)
        if self._memory is not None:
            return best_token(scores, tokens, params, last_tokens, self._memory)
        return best_of_parts(self._group.gather(torch.stack([scores.double(), tokens.double()])), params, last_tokens)


def best_of_parts(pairs: Tensor, params: Tensor, last_tokens: Tensor) -> Tensor:
    """The tokens that the best of several ranks' scores belong to.

    Args:
        pairs: float64 [ranks, 2, N], each rank's scores and tokens (`draw_parts`).
        params: see `draw_tokens`.
        last_tokens: written, as there.

    Returns:
        int64 [N], -1 where no token could be picked.
    """
    winner = pairs[:, 0].max(dim=0).indices
    tokens = pairs[:, 1].gather(0, winner[None])[0].long()
    tokens = tokens.masked_fill(tokens == NO_TOKEN, -1)
    last_tokens[params[0, : len(tokens)].long()] = tokens.clamp_min(0)
    return tokens


class PlanningRunner(Driving, RankRunner):
    """The planning rank's runner on modules."""


class FusedPlanningRunner(Driving, FusedRankRunner):
    """The planning rank's runner on fused layers."""
