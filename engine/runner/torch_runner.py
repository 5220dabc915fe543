"""The runner that computes: one flattened variable-length forward per step, then one batched draw.

    plan.copies -> pool | plan.scheduled -> inputs -> model (attention through the hook) -> logits -> sampler

It sees plans and block tables, never the type of a scheduler or an allocator. Everything of a step is launched in
order; on a GPU the tokens reach the host when `PendingTokens.result()` is asked for them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from kvarena.engine.attention.base import AttentionBackend, AttentionMetadata, SharingBackend
from kvarena.engine.attention.hook import attention_context
from kvarena.engine.attention.reference import ReferenceBackend
from kvarena.engine.checkpoints.directory import one_line
from kvarena.engine.clock import Clock, WallClock
from kvarena.engine.contract import KVAllocator, StepPlan
from kvarena.engine.copies import arrive_in_order
from kvarena.engine.errors import EngineError, KvarenaError, OutOfMemory
from kvarena.engine.model_runner import PendingTokens, ReadyTokens, StepResult, TokenLogprobs
from kvarena.engine.models.spec import LoadedModel
from kvarena.engine.pool.kv_pool import KVPool
from kvarena.engine.pool.memory_limits import asked_and_free, is_out_of_memory
from kvarena.engine.request import Request
from kvarena.engine.runner.constraints import allowed_tokens
from kvarena.engine.runner.graphs import Forward
from kvarena.engine.runner.host_count import HostCount
from kvarena.engine.runner.inputs import build_inputs
from kvarena.engine.runner.prompt_logprobs import PromptLogprobs, PromptRows
from kvarena.engine.runner.request_rows import RequestRows
from kvarena.engine.sampling.output import HostTokens, SampledTokens
from kvarena.engine.sampling.sampler import Sampler
from kvarena.engine.sampling.transfer import to_device
from kvarena.engine.sharing.step_reads import StepReads

if TYPE_CHECKING:  # of a model that reads text nothing of it is imported
    from kvarena.engine.vision.encoder import InputRows


class StepTokens:
    """A step in flight: its sampled rows, spread over the plan's entries when they are asked for.

    Args:
        tokens: of the entries that sample; None where none does.
        samples: of the plan.
        prompt: log-probabilities of prompt tokens, where somebody wants them.
        no_memory: makes the error of a device without memory, which may show after the launch.
        experts_read: experts that the forward read; None for a dense model.
        num_kv_saved: see `StepResult`.
    """

    def __init__(
        self,
        tokens: HostTokens | None,
        samples: list[bool],
        prompt: PromptLogprobs | None,
        no_memory: Callable[[BaseException], OutOfMemory],
        experts_read: HostCount | None = None,
        num_kv_saved: int = 0,
    ) -> None:
        self._tokens = tokens
        self._samples = samples
        self._prompt = prompt
        self._no_memory = no_memory
        self._experts_read = experts_read
        self._num_kv_saved = num_kv_saved

    def result(self) -> StepResult:
        """Wait for the step. Raises EngineError when the device failed or a token could not be sampled."""
        try:
            token_ids, logprobs = ([], None) if self._tokens is None else self._tokens.result()
            scores = None if self._tokens is None else self._tokens.scores()
            prompt = None if self._prompt is None else self._prompt.result(len(self._samples))
            num_experts = 0 if self._experts_read is None else self._experts_read.result()
        except (RuntimeError, MemoryError) as error:  # how torch reports what the device did after the launch
            if is_out_of_memory(error):
                raise self._no_memory(error) from error
            raise EngineError(f"the device failed in a step: {one_line(error)}") from error
        drawn = iter(token_ids)
        spread = [next(drawn) if sampled else None for sampled in self._samples]
        if logprobs is None:
            return StepResult(
                spread, prompt_logprobs=prompt, scores=scores, num_experts_read=num_experts,
                num_kv_saved=self._num_kv_saved,
            )  # fmt: skip
        entries = iter(logprobs)
        rows: list[TokenLogprobs | None] = [next(entries) if sampled else None for sampled in self._samples]
        return StepResult(
            spread, rows, prompt, scores=scores, num_experts_read=num_experts, num_kv_saved=self._num_kv_saved
        )


class _CopyTimer:
    """Times the block copies of a step: by events in stream order on a GPU, by the clock elsewhere."""

    def __init__(self, device: torch.device, clock: Clock) -> None:
        self._clock = clock
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else None
        self._times = [0.0, 0.0]

    def mark(self, which: int) -> None:
        """The copies begin (0) or end (1) here."""
        if self._events is None:
            self._times[which] = self._clock.now()
        else:
            self._events[which].record()

    def seconds(self) -> float:
        """Time between the marks; call when the step is over."""
        if self._events is None:
            return self._times[1] - self._times[0]
        self._events[1].synchronize()
        return self._events[0].elapsed_time(self._events[1]) / 1000


class _TimedStep:
    """A step in flight that began with block copies."""

    def __init__(self, step: PendingTokens, timer: _CopyTimer) -> None:
        self._step = step
        self._timer = timer

    def result(self) -> StepResult:
        """The step's tokens, and how long its copies took."""
        result = self._step.result()
        return result._replace(copy_time=self._timer.seconds())


@dataclass(frozen=True)
class ModuleForward:
    """The transformers module, called through the attention hook."""

    model: LoadedModel
    backend: AttentionBackend

    def __call__(
        self,
        input_ids: Tensor,
        positions: Tensor,
        meta: AttentionMetadata,
        *,
        out: Tensor | None = None,
        all_rows: bool = False,  # noqa: ARG002 - `meta.logits_indices` says the same
        inputs: InputRows | None = None,
    ) -> Tensor:
        """See `Forward`."""
        with attention_context(meta, self.backend):
            logits = self.model.logits(input_ids, positions, meta.logits_indices, inputs)
        return logits if out is None else out.copy_(logits)


class TorchRunner:
    """Executes step plans on a model and a pool. Implements `kvarena.engine.model_runner.ModelRunner`.

    Args:
        model: from `load_model`.
        pool: made for that model's spec, on its device.
        backend: attention over `pool`; None takes the torch reference.
        seed: random streams of requests without a seed of their own derive from it.
        clock: times the block copies on a CPU; None makes one.
        num_scores: keep the scores of so many best tokens of every sampled position (`StepResult.scores`); 0: none.
        rows: what is kept of each request; None makes rows that grow in number.
        shares: read once what decodes have in common; of a `SharingBackend`.

    Attributes:
        forward: computes a step's logits, in graphs or as it is.
    """

    rows_class: type[RequestRows] = RequestRows

    def __init__(
        self,
        model: LoadedModel,
        pool: KVPool,
        backend: AttentionBackend | None = None,
        *,
        seed: int = 0,
        clock: Clock | None = None,
        num_scores: int = 0,
        rows: RequestRows | None = None,
        shares: bool = False,
    ) -> None:
        self.model = model
        self.pool = pool
        self.backend: AttentionBackend = ReferenceBackend(pool) if backend is None else backend
        self.forward: Forward = ModuleForward(model, self.backend)
        self._device = pool.device
        self._clock = WallClock() if clock is None else clock
        self._sampler = Sampler(num_scores)
        self._rows = self.rows_class(model.spec.vocab_size, self._device, seed) if rows is None else rows
        self._reads: StepReads | None = None
        if shares:
            assert isinstance(self.backend, SharingBackend)
            tables, most_rows = self._rows.tables, self.backend.most_shared_rows
            self._reads = StepReads(
                tables.read, tables.note_changes(), pool.block_size, most_rows, fits=self.backend.can_share
            )

    def execute(self, plan: StepPlan, allocator: KVAllocator) -> PendingTokens:
        """Launch one step. See `ModelRunner.execute`.

        Raises:
            EngineError: the forward failed; the original error is its cause.
        """
        try:
            with torch.inference_mode():
                self.pool.begin_step(plan, allocator)
                if not plan.copies:
                    return self._step(plan, allocator)
                timer = _CopyTimer(self._device, self._clock)
                timer.mark(0)
                self.pool.apply_copies(plan.copies)
                timer.mark(1)
                arrive_in_order(plan.copies)
                return _TimedStep(self._step(plan, allocator), timer)
        except KvarenaError:
            raise
        # Anything: model code may be foreign. The cause keeps the stack trace.
        except Exception as error:
            if is_out_of_memory(error):
                raise self._no_memory(plan, error) from error
            raise EngineError(
                f"a step of {len(plan.scheduled)} requests and {plan.num_new_tokens} tokens failed with "
                f"{type(error).__name__}: {one_line(error)}"
            ) from error

    def _no_memory(self, plan: StepPlan, error: BaseException) -> OutOfMemory:
        return OutOfMemory(
            f"out of memory on {self._device} in a step of {len(plan.scheduled)} requests and {plan.num_new_tokens} "
            f"tokens: {asked_and_free(error, self._device)}; lower scheduler.max_num_batched_tokens, "
            f"scheduler.max_num_seqs, or the KV pool ({self.pool.sized_by})"
        )

    def release(self, request_ids: list[str]) -> None:
        """Forget requests that ended."""
        self._rows.release(request_ids)
        self.pool.release(request_ids)

    def finish(self) -> None:
        """Nobody asks this runner for anything any more: what is on its way to it is taken in."""

    def _step(self, plan: StepPlan, allocator: KVAllocator) -> PendingTokens:
        if plan.preempted or plan.forked:
            # They start over, maybe much later, or with other tokens: until then they need no row.
            self._rows.release(req.request_id for req in (*plan.preempted, *plan.forked))
        if not plan.scheduled:
            return ReadyTokens(StepResult([]))
        return self._compute(plan, allocator)

    def _compute(self, plan: StepPlan, allocator: KVAllocator) -> PendingTokens:
        """A step with something in it."""
        inputs = build_inputs(plan, allocator, self._rows, self._device, has_grids=self.model.has_grids)
        if len(inputs.pending):
            pending, rows = (to_device(index, self._device) for index in (inputs.pending, inputs.pending_rows))
            inputs.input_ids[pending] = self._rows.last_tokens[rows]
        meta = inputs.meta
        if self._reads is not None:
            decodes = np.flatnonzero(np.diff(meta.host_query_start_loc) == 1)
            meta.reads = self._reads(inputs.rows, meta.host_seq_lens, decodes)
        images = self.model.images
        given = images.inputs(plan, inputs.input_ids) if images is not None and images.touched(plan) else None
        self.backend.prepare(meta)
        logits = self.forward(inputs.input_ids, inputs.positions, meta, inputs=given)
        num_sampled = sum(plan.samples)
        tokens = self._sample(plan, inputs.rows, logits[:num_sampled])
        prompts = inputs.prompt_rows
        return self._in_flight(plan, tokens, None if prompts is None else self._prompts(logits[num_sampled:], prompts))

    def _prompts(self, logits: Tensor, rows: PromptRows) -> PromptLogprobs | None:
        """Log-probabilities of prompt tokens from their `logits`."""
        return PromptLogprobs(logits, rows)

    def _in_flight(self, plan: StepPlan, tokens: HostTokens | None, prompt: PromptLogprobs | None = None) -> StepTokens:
        read = self._experts_read()
        count = None if read is None else HostCount(read)
        saved = 0 if self._reads is None else self._reads.num_saved
        return StepTokens(tokens, plan.samples, prompt, functools.partial(self._no_memory, plan), count, saved)

    def _experts_read(self) -> Tensor | None:
        """Integer []: experts that the last forward read, on the device; None for a dense model."""
        return None if self.model.experts_read is None else self.model.experts_read.total()

    def _sample(self, plan: StepPlan, rows: np.ndarray, logits: Tensor) -> HostTokens | None:
        """Sample the entries that reach their last token; keep the tokens as next inputs, and start their copy.

        Args:
            plan: the step.
            rows: int64, the row of each scheduled request.
            logits: [num_sampled, V].
        """
        entries = [entry for entry, sampled in zip(plan.scheduled, plan.samples, strict=True) if sampled]
        if not entries:
            return None
        at = rows[np.fromiter(plan.samples, np.bool_)]
        stops = np.fromiter((entry.start + entry.num_new_tokens for entry in entries), np.int64, len(entries))
        self._rows.columns["sampled_to"][at] = stops
        return self._pick([entry.req for entry in entries], at, stops, logits)

    def _pick(self, requests: list[Request], rows: np.ndarray, stops: np.ndarray, logits: Tensor) -> HostTokens:
        """Pick a token for each of `requests`, at position `stops`: both int64 [num_sampled]."""
        at = to_device(rows, self._device)
        return self._keep(at, self._sampled(requests, rows, at, stops, logits))

    def _keep(self, rows: Tensor, sampled: SampledTokens) -> HostTokens:
        """The tokens become inputs of the next step, and start on their way to the host."""
        self._rows.last_tokens[rows] = sampled.token_ids
        return sampled.start_copy()

    def _sampled(
        self, requests: list[Request], rows: np.ndarray, at: Tensor, stops: np.ndarray, logits: Tensor
    ) -> SampledTokens:
        """Run the sampler; `at` is `rows` on the device."""
        draw = self._drawer(rows, stops)
        num_outputs: list[int] = (stops - self._rows.columns["num_prompt"][rows]).tolist()
        unseen = any(count > len(req.output_token_ids) for req, count in zip(requests, num_outputs, strict=True))
        batch = self._rows.batch(
            requests,
            rows,
            num_outputs=num_outputs,
            pending_token_ids=self._rows.last_tokens[at] if unseen else None,
            allowed_tokens=allowed_tokens(requests, self.model.spec.vocab_size, self._device),
            draws=draw is None,
        )
        return self._sampler(logits, batch, draw)

    def _drawer(self, rows: np.ndarray, stops: np.ndarray) -> Callable[[Tensor], Tensor] | None:  # noqa: ARG002
        """What draws from edited logits in the sampler's place; None: the sampler does. Arguments as of `_pick`."""
        return None
