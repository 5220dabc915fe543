"""Pipeline parallel: a step in as many parts as there are stages; a stage hands one on and takes the next.

    stage 0    a0 b0 | a1 b1 | a2 ...       a, b: the parts of a step, by request; 0, 1, 2: steps
    stage 1       a0   b0 | a1   b1 | ...
    tokens           a0   b0   a1           back to stage 0, which needs those of a0 for a1

A request stays in its part as long as it runs, so a step's part follows the same part of the step before: with
`engine.overlap` no stage waits in steady decode. The planner sees one step with all requests, as without stages.

Stage 0 takes tokens when it needs them: for a part with these requests, for the step's result, before a row is given
back. The last stage's first rank sends them, or the logits where the planning rank must pick; that tells the others.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvarena.engine.attention.base import AttentionBackend
from kvarena.engine.contract import KVAllocator, StepPlan
from kvarena.engine.model_runner import PendingTokens, StepResult, TokenLogprobs, TokenScores
from kvarena.engine.parallel.groups import Link
from kvarena.engine.parallel.layout import Layout
from kvarena.engine.ranks.picks import SharedPicks
from kvarena.engine.ranks.stage_forward import ModuleStage, StageForward
from kvarena.engine.request import Request
from kvarena.engine.runner.prompt_logprobs import PromptLogprobs, PromptRows
from kvarena.engine.runner.torch_runner import ModuleForward
from kvarena.engine.sampling.output import HostTokens, SampledTokens
from kvarena.engine.sampling.transfer import to_device
from kvarena.engine.vision.encoder import touches_images


class _Awaited:
    """Tokens of a part that are on their way to stage 0. As `HostTokens` to the step.

    Args:
        runner: of stage 0.
        requests, rows, stops: as of `TorchRunner._pick`.
    """

    def __init__(self, runner: Staged, requests: list[Request], rows: np.ndarray, stops: np.ndarray) -> None:
        self.rows = frozenset(rows.tolist())
        self._runner, self._requests, self._rows, self._stops = runner, requests, rows, stops
        self._tokens: HostTokens | None = None

    def settle(self) -> None:
        """Take the tokens in."""
        self._tokens = self._runner.take(self._requests, self._rows, self._stops)

    def _settled(self) -> HostTokens:
        self._runner.settle(self)
        assert self._tokens is not None
        return self._tokens

    def result(self) -> tuple[list[int], list[TokenLogprobs | None] | None]:
        """See `HostTokens.result`."""
        return self._settled().result()

    def scores(self) -> TokenScores | None:
        """See `HostTokens.scores`."""
        return self._settled().scores()


class _AwaitedPrompts:
    """Logits of prompt tokens that are on their way. As `PromptLogprobs` to the step."""

    rows: frozenset[int] = frozenset()

    def __init__(self, runner: Staged, rows: PromptRows) -> None:
        self._runner, self._prompts = runner, rows
        self._found: PromptLogprobs | None = None

    def settle(self) -> None:
        """Take the logits in."""
        self._found = self._runner.take_prompts(self._prompts)

    def result(self, num_entries: int) -> list[list[TokenLogprobs] | None]:
        """See `PromptLogprobs.result`."""
        self._runner.settle(self)
        assert self._found is not None
        return self._found.result(num_entries)


class Staged(SharedPicks):
    """Makes a runner a stage's; without stages it is `SharedPicks`."""

    forward: Any
    backend: AttentionBackend

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._awaited: deque[_Awaited | _AwaitedPrompts] = deque()
        self._older: list[_Awaited | _AwaitedPrompts] = []
        if self._layout.pipeline > 1 and not isinstance(self.forward, StageForward):
            layers = ModuleStage(self.model, self.backend) if isinstance(self.forward, ModuleForward) else self.forward
            self.forward = StageForward(layers, self.model)

    @property
    def _layout(self) -> Layout:
        assert self.model.groups is not None
        return self.model.groups.layout

    def _between(self, max_tokens: int) -> tuple[Any, StageForward | None]:
        """As `FusedRunner._between`."""
        if self._layout.pipeline == 1:
            return self.forward, None
        self.forward = stage = StageForward(self.forward, self.model, max_tokens)
        return stage.captured, stage

    def _touches_images(self, plan: StepPlan) -> bool:
        """As of `FusedRunner`, on every stage: an image's positions may be none that a graph can make."""
        return touches_images(plan)

    @property
    def _back(self) -> Link:
        assert self.model.groups is not None
        assert self.model.groups.back is not None
        return self.model.groups.back

    @property
    def _last_rank(self) -> int:
        """Who sends tokens back: the first rank of the last stage."""
        return self._layout.tensor * (self._layout.pipeline - 1)

    def lanes(self, plan: StepPlan, rows: np.ndarray) -> np.ndarray:  # noqa: ARG002
        """Int [n]: the part of each entry, the same on every rank."""
        return np.array([int(entry.req.request_id) for entry in plan.scheduled]) % self._layout.pipeline

    def _compute(self, plan: StepPlan, allocator: KVAllocator) -> PendingTokens:
        if self._layout.pipeline == 1:
            found: PendingTokens = super()._compute(plan, allocator)  # type: ignore[misc]
            return found
        # What the step before the last one left: the planning rank has it by now.
        for one in self._older:
            self.settle(one)
        rows = self._rows.of_step(plan.scheduled, allocator)
        lanes = self.lanes(plan, rows)
        parts: list[tuple[list[int], PendingTokens]] = []
        self._older = list(self._awaited)
        for lane in np.unique(lanes).tolist():
            entries = np.flatnonzero(lanes == lane).tolist()
            self._settle_rows(rows[entries].tolist())
            parts.append((entries, super()._compute(_part(plan, entries), allocator)))  # type: ignore[misc]
        return _Joined(len(plan.scheduled), plan.samples, parts)

    def _experts_read(self) -> Tensor | None:
        """As in TorchRunner; no rank knows of all layers of a pipeline."""
        found: Tensor | None = super()._experts_read() if self._layout.pipeline == 1 else None  # type: ignore[misc]
        return found

    def _step(self, plan: StepPlan, allocator: KVAllocator) -> PendingTokens:
        if self._awaited and (plan.preempted or plan.forked):
            self._settle_rows(self._rows.known(req.request_id for req in (*plan.preempted, *plan.forked)))
        found: PendingTokens = super()._step(plan, allocator)  # type: ignore[misc]
        return found

    def release(self, request_ids: list[str]) -> None:
        """As `TorchRunner.release`."""
        if self._awaited:
            self._settle_rows(self._rows.known(request_ids))
        super().release(request_ids)  # type: ignore[misc]

    def finish(self) -> None:
        """As `TorchRunner.finish`: what is left on its way would be taken for the next runner's."""
        if self._awaited:
            self.settle(self._awaited[-1])

    def _settle_rows(self, rows: Iterable[int]) -> None:
        """Take in what is on its way to any of `rows`."""
        wanted = frozenset(rows)
        last = next((one for one in reversed(self._awaited) if not wanted.isdisjoint(one.rows)), None)
        if last is not None:
            self.settle(last)

    def settle(self, one: _Awaited | _AwaitedPrompts) -> None:
        """Take in what is on its way, in order, up to `one`."""
        with torch.inference_mode():  # a result may be asked for outside a step
            while one in self._awaited:
                self._awaited.popleft().settle()

    # ---- tokens: from the last stage to the first

    def _pick(self, requests: list[Request], rows: np.ndarray, stops: np.ndarray, logits: Tensor) -> Any:
        """As `TorchRunner._pick`; on stage 0 a promise, between the stages nothing."""
        layout = self._layout
        if layout.pipeline == 1:
            return super()._pick(requests, rows, stops, logits)
        if layout.is_last:
            self._send_back(rows, stops, logits)
            return None
        if not layout.is_first:
            return None
        awaited = _Awaited(self, requests, rows, stops)
        self._awaited.append(awaited)
        return awaited

    def _send_back(self, rows: np.ndarray, stops: np.ndarray, logits: Tensor) -> None:
        is_plain = self._is_plain(rows)
        if is_plain.any():
            own = np.flatnonzero(is_plain)
            part = logits if len(own) == len(rows) else logits[to_device(own, self._device)]
            tokens, is_valid = self._pick_plain(rows[own], stops[own], part)
            if self._group.rank == 0:
                self._back.send(torch.stack([tokens, is_valid.long()]), 0)
        if not is_plain.all():
            others = to_device(np.flatnonzero(~is_plain), self._device)
            self._send_whole(logits[others])

    def _send_whole(self, logits: Tensor) -> None:
        whole = self._whole(logits)
        if self._group.rank == 0:
            self._back.send(whole, 0)

    def take(self, requests: list[Request], rows: np.ndarray, stops: np.ndarray) -> HostTokens:
        """Tokens that the last stage sent, or picked here from its logits; the next inputs of stage 0."""
        device, at = self._device, to_device(rows, self._device)
        told = torch.empty(2, len(rows), dtype=torch.int64, device=device)
        sampled = SampledTokens(told[0], told[1], None, [req.request_id for req in requests])
        if self._layout.rank:
            self._back.receive(told, 0)
        else:
            sampled = self._taken(requests, rows, stops)
            told = torch.stack([sampled.token_ids, sampled.is_valid.long()])
            for rank in range(1, self._layout.tensor):
                self._back.send(told, rank)
        sampled.is_valid = sampled.is_valid.bool()
        return self._keep(at, sampled)  # type: ignore[attr-defined]

    def _taken(self, requests: list[Request], rows: np.ndarray, stops: np.ndarray) -> SampledTokens:
        is_plain = self._is_plain(rows)
        own, others = np.flatnonzero(is_plain), np.flatnonzero(~is_plain)
        told = torch.empty(2, len(own), dtype=torch.int64, device=self._device)
        if len(own):
            self._back.receive(told, self._last_rank)
        ids = [req.request_id for req in requests]
        if not len(others):
            return SampledTokens(told[0], told[1], None, ids)
        whole = self._receive_whole(len(others))
        some = [requests[i] for i in others.tolist()]
        at = to_device(rows[others], self._device)
        picked: SampledTokens = self._sampled(some, rows[others], at, stops[others], whole)  # type: ignore[attr-defined]
        return self.merged(ids, told, picked, others)

    def _receive_whole(self, count: int) -> Tensor:
        spec = self.model.spec
        whole = torch.empty(count, spec.vocab_size, dtype=spec.dtype, device=self._device)
        return self._back.receive(whole, self._last_rank)

    def _prompts(self, logits: Tensor, rows: PromptRows) -> Any:
        """As `TorchRunner._prompts`; on stage 0 a promise."""
        layout = self._layout
        if layout.pipeline == 1:
            return super()._prompts(logits, rows)
        if layout.is_last:
            self._send_whole(logits)
        if layout.rank:
            return None
        awaited = _AwaitedPrompts(self, rows)
        self._awaited.append(awaited)
        return awaited

    def take_prompts(self, rows: PromptRows) -> PromptLogprobs:
        """Log-probabilities from logits that the last stage sent."""
        return PromptLogprobs(self._receive_whole(len(rows.targets)), rows)


def _part(plan: StepPlan, entries: list[int]) -> StepPlan:
    """Some of a step's entries; its copies are made already."""
    return StepPlan(
        [plan.scheduled[i] for i in entries],
        [plan.samples[i] for i in entries],
        num_decodes=sum(i < plan.num_decodes for i in entries),
    )


class _Joined:
    """A step in flight, in parts.

    Args:
        num_entries: of the step.
        samples: of the step.
        parts: the entries of each, and itself.
    """

    def __init__(self, num_entries: int, samples: Sequence[bool], parts: list[tuple[list[int], PendingTokens]]) -> None:
        self._num_entries, self._samples, self._parts = num_entries, samples, parts

    def result(self) -> StepResult:
        """The step's tokens, in the order of its entries."""
        token_ids: list[int | None] = [None] * self._num_entries
        logprobs: list[Any] = [None] * self._num_entries
        prompts: list[Any] = [None] * self._num_entries
        scores: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for entries, part in self._parts:
            result = part.result()
            for name, into in (("token_ids", token_ids), ("logprobs", logprobs), ("prompt_logprobs", prompts)):
                for entry, value in zip(entries, getattr(result, name) or (), strict=False):
                    into[entry] = value
            if result.scores is not None:
                sampled = [entry for entry in entries if self._samples[entry]]
                scores |= dict(zip(sampled, zip(*result.scores, strict=True), strict=True))
        kept = None
        if scores:
            columns = zip(*(scores[entry] for entry in sorted(scores)), strict=True)
            kept = TokenScores(*(np.stack(column) for column in columns))
        return StepResult(
            token_ids,
            logprobs if any(one is not None for one in logprobs) else None,
            prompts if any(one is not None for one in prompts) else None,
            scores=kept,
        )
