"""The fast runner: a fused forward, and decode steps for which the host sends a few integers and replays a graph.

    decode step     fields --one copy--> device | graph: expand, layers, logits, draw | tokens --copy--> host
    small steps     the same with prompts in them (engine/runner/step_graphs.py)
    other steps     as in TorchRunner, on the same fused forward

Sampled tokens stay on the device as the next step's inputs, so with overlap the host prepares step N + 1 while step N
runs, and `result()` waits for its own step's copy alone. Rows that edit their logits or want log-probabilities have
theirs copied out of the step's, edited and drawn from by the same kernels; nothing of it waits for the device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from kvarena.engine.attention.base import AttentionBackend, KeepingBackend
from kvarena.engine.clock import Clock
from kvarena.engine.contract import KVAllocator, ScheduledRequest, StepPlan, cdiv
from kvarena.engine.fusions.decoder import FusedDecoder
from kvarena.engine.kernels.penalties import penalize_rows
from kvarena.engine.model_runner import PendingTokens
from kvarena.engine.models.spec import LoadedModel
from kvarena.engine.pool.kv_pool import KVPool
from kvarena.engine.request import Request
from kvarena.engine.runner.draw import Draw
from kvarena.engine.runner.graphs import Forward, GraphCapture, ReservingBackend
from kvarena.engine.runner.inputs import input_tokens, missing_token
from kvarena.engine.runner.rope_positions import rope_positions
from kvarena.engine.runner.step_graphs import DECODE_FIELDS, Between, MixedStep, StepGraphs
from kvarena.engine.runner.torch_runner import TorchRunner
from kvarena.engine.sampling.output import HostTokens, SampledTokens, merged
from kvarena.engine.sampling.params import SKIPPED, TOP_K
from kvarena.engine.sampling.sampler import Sampler
from kvarena.engine.sampling.transfer import to_device


class FusedRunner(TorchRunner):
    """A `TorchRunner` with a fused forward, device-resident decode inputs, CUDA graphs and a fused draw.

    Args:
        model: from `load_model`.
        pool: made for that model's spec, on its device.
        backend: attention over `pool`. Decode steps take the short path when it can `reserve`.
        decoder: the model's fused form; None runs the transformers module.
        seed: random streams of requests without a seed of their own derive from it.
        max_num_seqs: most requests of a step.
        max_model_len: longest context.
        graphs: capture forwards in CUDA graphs.
        mixed_tokens: most new tokens of a step with prompts that is padded to a bucket, for a graph; 0: none.
        clock, num_scores, shares: see `TorchRunner`.
    """

    def __init__(
        self,
        model: LoadedModel,
        pool: KVPool,
        backend: AttentionBackend,
        decoder: FusedDecoder | None = None,
        *,
        seed: int = 0,
        max_num_seqs: int,
        max_model_len: int,
        graphs: bool = False,
        mixed_tokens: int = 0,
        clock: Clock | None = None,
        num_scores: int = 0,
        shares: bool = False,
    ) -> None:
        # Rows are never added later, because graphs hold addresses. Twice the running requests: those that end keep
        # their row for a step or two.
        width = cdiv(max_model_len, pool.block_size) if isinstance(backend, ReservingBackend) else 0
        rows = self.rows_class(model.spec.vocab_size, pool.device, seed, num_rows=2 * max_num_seqs, width=width)
        super().__init__(model, pool, backend, clock=clock, num_scores=num_scores, rows=rows, shares=shares)
        if decoder is not None:
            self.forward = functools.partial(decoder, backend=backend, pool=pool)
        self._num_read = None if decoder is None else decoder.num_read
        # Of a row of which others have parts, no kernel of one device draws.
        draws = draws_on(self._device) and model.shard is None
        self._draw = Draw(max_num_seqs, self._device, num_scores) if draws else None
        if draws_on(self._device):
            self._sampler = Sampler(num_scores, penalize_rows)
        self._graphs: StepGraphs | None = None
        if isinstance(backend, ReservingBackend):
            forward, between = self._between(max(max_num_seqs, mixed_tokens))
            is_last = model.shard is None or model.shard.layout.is_last
            num_logits = model.num_logits if is_last else 0
            logits = torch.zeros(max_num_seqs, num_logits, dtype=model.spec.dtype, device=self._device)
            self._graphs = StepGraphs(
                forward, backend, rows, logits, pool.block_size, mixed_tokens,
                capture=GraphCapture() if graphs else None, has_grids=model.has_grids, draw=self._draw,
                between=between, reads=self._reads,
            )  # fmt: skip

    def _between(self, max_tokens: int) -> tuple[Forward, Between | None]:  # noqa: ARG002
        """What graphs hold of the forward, for steps of at most so many tokens, and what stands before and after."""
        return self.forward, None

    def warm_up(self, max_rows: int, max_tokens: int) -> int:
        """Compile and capture every shape of steps that can come and was not captured before.

        Only between steps, with nothing in flight. Writes KV to the null block alone.

        Args:
            max_rows: most requests of a step.
            max_tokens: most new tokens of one.

        Returns:
            How many shapes were run.
        """
        with torch.inference_mode():
            if isinstance(self.backend, KeepingBackend):
                self.backend.warm_up()
            return 0 if self._graphs is None else self._graphs.warm_up(max_rows, max_tokens)

    @property
    def padded_sizes(self) -> list[int]:
        """Numbers of tokens to which small steps with prompts are padded, ascending; none where they are not."""
        return [] if self._graphs is None else self._graphs.padded_sizes

    def _compute(self, plan: StepPlan, allocator: KVAllocator) -> PendingTokens:
        # A step with images has rows in place of ids, and no graph holds those.
        if self._graphs is not None and not self._touches_images(plan):
            if _is_decode(plan):
                return self._decode(plan, allocator, self._graphs)
            if self._graphs.takes(plan):
                return self._mixed(plan, allocator, self._graphs)
        return super()._compute(plan, allocator)

    def _touches_images(self, plan: StepPlan) -> bool:
        return self.model.images is not None and self.model.images.touched(plan)

    def _decode(self, plan: StepPlan, allocator: KVAllocator, graphs: StepGraphs) -> PendingTokens:
        scheduled = plan.scheduled
        rows = self._rows.of_step(scheduled, allocator)
        columns = self._rows.columns
        starts = np.fromiter((entry.start for entry in scheduled), np.int64, len(scheduled))
        fields = np.empty((graphs.num_fields, len(scheduled)), dtype=np.int32)
        # What the device has need not be sent, whether the host knows it or not.
        sent = np.flatnonzero(columns["sampled_to"][rows] != starts)
        fields[0] = -1
        fields[0, sent] = [_known_token(scheduled[i]) for i in sent.tolist()]
        fields[1] = starts
        fields[2:DECODE_FIELDS] = self._rows.draw_params(rows, starts + 1)
        if self.model.has_grids:
            fields[DECODE_FIELDS] = starts + columns["rope_shift"][rows]
        draw = self._draw
        if draw is None:
            return self._in_flight(plan, self._sample_decode(plan, rows, graphs.decode(fields), graphs.draw_params))
        drawn = self._is_drawn(rows)
        # Theirs is the last token that penalties count: it must not be overwritten yet.
        fields[2 + TOP_K, ~drawn] = SKIPPED
        logits = graphs.decode(fields, filters=self._filters(rows[drawn]))
        columns["sampled_to"][rows] = starts + 1
        requests = [entry.req for entry in scheduled]
        tokens = draw.tokens[: len(rows)]
        picked = self._with_edited(requests, rows, starts + 1, logits, graphs.draw_params, tokens, drawn)
        return self._in_flight(plan, picked)

    def _mixed(self, plan: StepPlan, allocator: KVAllocator, graphs: StepGraphs) -> PendingTokens:
        scheduled = plan.scheduled
        rows = self._rows.of_step(scheduled, allocator)
        step = MixedStep(
            tokens=input_tokens(scheduled, self._rows.columns["sampled_to"][rows]),
            starts=np.fromiter((entry.start for entry in scheduled), np.int64, len(scheduled)),
            counts=np.fromiter((entry.num_new_tokens for entry in scheduled), np.int64, len(scheduled)),
            rows=rows,
            samples=np.fromiter(plan.samples, np.bool_, len(scheduled)),
            turned=rope_positions(scheduled)[0] if self.model.has_grids else None,
        )
        return self._in_flight(plan, self._sample(plan, rows, graphs.mixed(step)))

    def _experts_read(self) -> Tensor | None:
        """As in TorchRunner; the fused forward counts its own."""
        return super()._experts_read() if self._num_read is None else self._num_read.sum()

    def _sample_decode(
        self,
        plan: StepPlan,
        rows: np.ndarray,
        logits: Tensor,
        params: Tensor,  # noqa: ARG002
    ) -> HostTokens | None:
        """As `_sample`, of a decode step that did not draw; `params` is what a draw would need, on the device."""
        return self._sample(plan, rows, logits)

    def _is_drawn(self, rows: np.ndarray) -> np.ndarray:
        """Bool [n]: whose token the draw gives by itself. Scores of filtered tokens are the sampler's alone."""
        return self._rows.columns["is_plain" if self._sampler.num_scores else "is_drawn"][rows]

    def _filters(self, rows: np.ndarray) -> bool:
        """Whether any of these rows filters."""
        return bool(self._rows.columns["filters"][rows].any())

    def _pick(self, requests: list[Request], rows: np.ndarray, stops: np.ndarray, logits: Tensor) -> HostTokens:
        """As in TorchRunner; rows that the draw can serve get its token, whoever shares their step."""
        draw = self._draw
        if draw is None:
            return super()._pick(requests, rows, stops, logits)
        drawn = self._is_drawn(rows)
        fields = self._rows.draw_params(rows, stops)
        fields[TOP_K, ~drawn] = SKIPPED
        params = to_device(fields, self._device)
        tokens = draw(logits, params, self._rows.last_tokens, filters=self._filters(rows[drawn]))
        return self._with_edited(requests, rows, stops, logits, params, tokens, drawn)

    def _with_edited(
        self,
        requests: list[Request],
        rows: np.ndarray,
        stops: np.ndarray,
        logits: Tensor,
        params: Tensor,
        tokens: Tensor,
        drawn: np.ndarray,
    ) -> HostTokens:
        """All rows' tokens on their way to the host: those that are `drawn` (bool [n]), and picked ones of the others.

        `requests`, `rows`, `stops` and `logits` as of `_pick`; `tokens` int64 [n] and `params` as of the draw.
        """
        draw = self._draw
        assert draw is not None
        ids = [req.request_id for req in requests]
        scores = draw.scores(logits, params) if drawn.any() else None
        if drawn.all():
            return draw.send(tokens, ids, scores)
        others = np.flatnonzero(~drawn)
        index, at = to_device(others, self._device), to_device(rows[others], self._device)
        edited = logits if len(others) == len(rows) else logits[index]
        picked = self._sampled([requests[i] for i in others.tolist()], rows[others], at, stops[others], edited)
        self._rows.last_tokens[at] = picked.token_ids
        if len(others) == len(rows):
            return picked.start_copy()
        return merged(SampledTokens(tokens, tokens >= 0, None, ids, scores), picked, index, others).start_copy()

    @property
    def _whole_draw(self) -> Draw | None:
        """What draws from whole rows of logits."""
        return self._draw

    def _drawer(self, rows: np.ndarray, stops: np.ndarray) -> Callable[[Tensor], Tensor] | None:
        """As in TorchRunner; the kernels draw from edited logits too."""
        draw, last_tokens = self._whole_draw, self._rows.last_tokens
        if draw is None or self._sampler.num_scores:
            return None
        params = to_device(self._rows.draw_params(rows, stops), self._device)
        filters = self._filters(rows)
        return lambda logits: draw(logits, params, last_tokens, filters=filters)


def draws_on(device: torch.device) -> bool:
    """Whether the kernels draw there; elsewhere they would be interpreted."""
    return device.type == "cuda"


def _known_token(entry: ScheduledRequest) -> int:
    known = entry.req.token_ids(entry.start, entry.start + 1)
    if not known:
        raise missing_token(entry.req, entry.start)
    return known[0]


def _is_decode(plan: StepPlan) -> bool:
    """Every entry computes one token and samples one, and nobody wants prompt log-probabilities of it."""
    return all(plan.samples) and all(
        entry.num_new_tokens == 1 and entry.req.sampling.prompt_logprobs is None for entry in plan.scheduled
    )
