"""The fast runner: a fused forward, and decode steps for which the host sends a few integers and replays a graph.

    decode step     fields --one copy--> device | graph: expand, layers, logits | draw | tokens --copy--> host
    small steps     the same with prompts in them (engine/runner/mixed_graphs.py)
    other steps     as in TorchRunner, on the same fused forward

Sampled tokens stay on the device as the next step's inputs, so with overlap the host prepares step N + 1 while step N
runs, and `result()` waits for its own step's copy alone.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvarena.engine.attention.base import AttentionBackend, AttentionMetadata
from kvarena.engine.attention.hook import attention_context
from kvarena.engine.clock import Clock
from kvarena.engine.contract import KVAllocator, ScheduledRequest, StepPlan, cdiv
from kvarena.engine.errors import EngineError
from kvarena.engine.fusions.decoder import FusedDecoder
from kvarena.engine.model_runner import PendingTokens
from kvarena.engine.models.spec import LoadedModel
from kvarena.engine.pool.kv_pool import KVPool
from kvarena.engine.request import Request
from kvarena.engine.runner.decode_inputs import NUM_FIELDS, DecodeSender, TableMirror
from kvarena.engine.runner.draw import Draw
from kvarena.engine.runner.graphs import DecodeGraphs, Forward, GraphCapture, ReservingBackend
from kvarena.engine.runner.inputs import StepInputs
from kvarena.engine.runner.mixed_graphs import MixedGraphs, MixedStep
from kvarena.engine.runner.request_rows import RequestRows
from kvarena.engine.runner.torch_runner import StepTokens, TorchRunner
from kvarena.engine.sampling.output import HostTokens, SampledTokens
from kvarena.engine.sampling.scores import choose_rows
from kvarena.engine.sampling.transfer import to_device


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
    ) -> Tensor:
        """See `Forward`."""
        with attention_context(meta, self.backend):
            logits = self.model.logits(input_ids, positions, meta.logits_indices)
        return logits if out is None else out.copy_(logits)


@dataclass(frozen=True)
class FusedForward:
    """The fused decoder."""

    decoder: FusedDecoder
    backend: AttentionBackend
    pool: KVPool

    def __call__(
        self,
        input_ids: Tensor,
        positions: Tensor,
        meta: AttentionMetadata,
        *,
        out: Tensor | None = None,
        all_rows: bool = False,
    ) -> Tensor:
        """See `Forward`."""
        return self.decoder(input_ids, positions, meta, self.backend, self.pool, all_rows=all_rows, out=out)


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
        clock, num_scores: see `TorchRunner`.
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
    ) -> None:
        super().__init__(model, pool, backend, seed=seed, clock=clock, num_scores=num_scores)
        self._model_forward: Forward = (
            ModuleForward(model, backend) if decoder is None else FusedForward(decoder, backend, pool)
        )
        # Twice the running requests: those that end keep their row for a step or two.
        self._rows = RequestRows(self._tables, 2 * max_num_seqs, model.spec.vocab_size, seed)
        num_rows = self._rows.num_rows + 1
        # Never grown later, because graphs hold its address: `BlockTables` makes rows up to the next power of two.
        room = max(2 * num_rows, self._tables.num_rows)
        self._last_tokens = torch.zeros(room, dtype=torch.int64, device=self._device)
        self._draw = Draw(max_num_seqs, self._device, num_scores) if self._device.type == "cuda" else None
        self._graphs: DecodeGraphs | None = None
        self._mixed: MixedGraphs | None = None
        if isinstance(backend, ReservingBackend):
            width = cdiv(max_model_len, pool.block_size)
            tables = torch.zeros(num_rows, width, dtype=torch.int32, device=self._device)
            logits = torch.zeros(max_num_seqs, model.spec.vocab_size, dtype=model.spec.dtype, device=self._device)
            capture = GraphCapture() if graphs else None
            self._mirror = TableMirror(num_rows, width)
            self._sender = DecodeSender(max_num_seqs, tables)
            self._graphs = DecodeGraphs(
                self._model_forward, backend, self._sender.fields, self._last_tokens, tables, logits, pool.block_size,
                capture=capture,
            )  # fmt: skip
            if mixed_tokens:
                self._mixed = MixedGraphs(
                    self._model_forward, backend, self._mirror, self._last_tokens, tables, self._rows.num_rows, logits,
                    pool.block_size, mixed_tokens, capture=capture,
                )  # fmt: skip

    @property
    def forward(self) -> Forward:
        """What computes a step's logits, in graphs or as it is."""
        return self._model_forward

    def release(self, request_ids: list[str]) -> None:
        """Forget requests that ended."""
        self._rows.forget(request_ids)
        super().release(request_ids)

    def warm_up(self, max_batch: int) -> int:
        """Run, and so compile and capture, every bucket of small steps and of decode steps up to `max_batch` requests.

        Only between steps, with nothing in flight. Writes KV to the null block alone.

        Returns:
            How many buckets were run.
        """
        graphs = self._graphs
        if graphs is None:
            return 0
        buckets = [bucket for bucket in graphs.buckets if bucket <= max_batch]
        with torch.inference_mode():
            for bucket in reversed(buckets):
                self._sender.send(self._padding(bucket), (), ())
                graphs.run(np.ones(bucket, dtype=np.int32))
            num_mixed = 0 if self._mixed is None else self._mixed.warm_up()
        return len(buckets) + num_mixed

    def _forward(self, inputs: StepInputs) -> Tensor:
        self.backend.prepare(inputs.meta)
        return self._model_forward(inputs.input_ids, inputs.positions, inputs.meta)

    def _step(self, plan: StepPlan, allocator: KVAllocator) -> PendingTokens:
        if plan.preempted:
            # They start over, maybe much later: until then they need no row.
            preempted = [req.request_id for req in plan.preempted]
            self._rows.forget(preempted)
            self._tables.release(preempted)
        if self._graphs is not None and _is_decode(plan):
            return self._decode(plan, allocator, self._graphs)
        if self._mixed is not None and plan.scheduled and self._mixed.takes(plan):
            return self._run_mixed(plan, allocator, self._mixed)
        return super()._step(plan, allocator)

    def _decode(self, plan: StepPlan, allocator: KVAllocator, graphs: DecodeGraphs) -> PendingTokens:
        scheduled = plan.scheduled
        count = len(scheduled)
        rows, starts = self._rows_and_starts(plan, allocator)
        fields = self._padding(graphs.bucket(count))
        tokens, has_pending = self._input_tokens(scheduled, self._rows.sampled_to[rows] == starts)
        fields[0, :count], fields[1, :count] = tokens, starts
        fields[2:, :count] = self._rows.draw_params(rows, starts + 1)
        self._sender.send(fields, *self._mirror.take())
        seq_lens = np.ones(fields.shape[1], dtype=np.int32)
        seq_lens[:count] = starts + 1
        logits = graphs.run(seq_lens)[:count]
        if self._draw is not None and self._rows.is_plain[rows].all():
            self._rows.sampled_to[rows] = starts + 1
            params = self._sender.fields[2:]
            drawn = self._draw(logits, params, self._last_tokens)
            request_ids = [entry.req.request_id for entry in scheduled]
            host_tokens = self._draw.start_copy(drawn, request_ids, self._draw.scores(logits, params))
        else:
            host_tokens = self._sample(plan, rows, logits, has_pending)
        return StepTokens(host_tokens, plan.samples, None, functools.partial(self._no_memory, plan))

    def _run_mixed(self, plan: StepPlan, allocator: KVAllocator, graphs: MixedGraphs) -> PendingTokens:
        scheduled = plan.scheduled
        rows, starts = self._rows_and_starts(plan, allocator)
        on_device = self._rows.sampled_to[rows]
        tokens: list[int] = []
        has_pending = False
        for (req, start, count), sampled_to in zip(scheduled, on_device.tolist(), strict=True):
            known = req.token_ids(start, start + count)
            tokens += known
            if len(known) < count:
                if len(known) + 1 < count or sampled_to != start + count - 1:
                    raise _missing_token(req, start + count - 1)
                tokens.append(-1)
                has_pending = True
        counts = np.fromiter((entry.num_new_tokens for entry in scheduled), np.int64, len(scheduled))
        samples = np.fromiter(plan.samples, np.bool_, len(scheduled))
        logits = graphs.run(MixedStep(np.array(tokens, dtype=np.int32), starts, counts, rows, samples))
        host_tokens = self._sample(plan, rows, logits, has_pending) if samples.any() else None
        return StepTokens(host_tokens, plan.samples, None, functools.partial(self._no_memory, plan))

    def _rows_and_starts(self, plan: StepPlan, allocator: KVAllocator) -> tuple[np.ndarray, np.ndarray]:
        """int64 [n]: each scheduled request's row, its block table brought up to date, and its first position."""
        rows = np.array([self._rows.row(entry.req) for entry in plan.scheduled], dtype=np.int64)
        self._update_tables(plan.scheduled, rows.tolist(), allocator)
        return rows, np.fromiter((entry.start for entry in plan.scheduled), np.int64, len(rows))

    def _padding(self, bucket: int) -> np.ndarray:
        """Fields of a step of padding entries: token 0 of the null row, at position 0, greedy."""
        fields = np.zeros((NUM_FIELDS, bucket), dtype=np.int32)
        fields[2] = self._rows.num_rows
        return fields

    def _update_tables(self, scheduled: list[ScheduledRequest], rows: list[int], allocator: KVAllocator) -> None:
        block_size = allocator.block_size
        for (req, start, count), row in zip(scheduled, rows, strict=True):
            table = allocator.block_table(req)
            if len(table) * block_size < start + count:
                raise EngineError(
                    f"request {req.request_id!r} computes position {start + count - 1} and its block table holds "
                    f"{len(table) * block_size} slots; a bug of the allocator or scheduler"
                )
            self._mirror.update(row, table)

    def _input_tokens(self, scheduled: list[ScheduledRequest], on_device: np.ndarray) -> tuple[np.ndarray, bool]:
        """Each entry's input token, -1 where the device has it; and whether the host has not seen one of them."""
        tokens = np.full(len(scheduled), -1, dtype=np.int32)
        for i in np.flatnonzero(~on_device).tolist():
            req, start, _ = scheduled[i]
            known = req.token_ids(start, start + 1)
            if not known:
                raise _missing_token(req, start)
            tokens[i] = known[0]
        return tokens, any(entry.start >= entry.req.num_tokens for entry in scheduled)

    def _sample(self, plan: StepPlan, rows: np.ndarray, logits: Tensor, has_pending: bool) -> HostTokens:
        """As in TorchRunner; rows that the fused draw can serve get its token, whoever shares their step."""
        entries = [entry for entry, sampled in zip(plan.scheduled, plan.samples, strict=True) if sampled]
        # Also gives rows to requests that are new here.
        at = np.array([self._rows.row(entry.req) for entry in entries], dtype=np.int64)
        stops = np.fromiter((entry.start + entry.num_new_tokens for entry in entries), np.int64, len(entries))
        self._rows.sampled_to[at] = stops
        draw = self._draw
        if draw is None:
            return super()._sample(plan, rows, logits, has_pending)
        is_plain = self._rows.is_plain[at]
        request_ids = [entry.req.request_id for entry in entries]
        params = to_device(self._rows.draw_params(at, stops), self._device)
        if is_plain.all():
            drawn = draw(logits, params, self._last_tokens)
            return draw.start_copy(drawn, request_ids, draw.scores(logits, params))
        on_device = to_device(at, self._device)
        sampled = self._pick(plan, on_device, logits, has_pending)
        if is_plain.any():
            drawn = draw(logits, params, self._last_tokens)
            mask = to_device(is_plain, self._device)
            token_ids = torch.where(mask, drawn.clamp_min(0), sampled.token_ids)
            is_valid = torch.where(mask, drawn >= 0, sampled.is_valid)
            scores = choose_rows(mask, draw.scores(logits, params), sampled.scores)
            sampled = SampledTokens(token_ids, is_valid, sampled.logprobs, request_ids, scores)
        self._last_tokens[on_device] = sampled.token_ids
        return sampled.start_copy()


def _missing_token(req: Request, position: int) -> EngineError:
    return EngineError(
        f"request {req.request_id!r} is to compute position {position}, and neither host nor device has its token; a "
        "bug of the scheduler"
    )


def _is_decode(plan: StepPlan) -> bool:
    """Every entry computes one token and samples one, and nobody wants prompt log-probabilities of it."""
    return (
        bool(plan.scheduled)
        and all(plan.samples)
        and all(entry.num_new_tokens == 1 and entry.req.sampling.prompt_logprobs is None for entry in plan.scheduled)
    )
