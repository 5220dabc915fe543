"""The fast runner of a CPU: fused layers where the model has the shape, compiled attention, one call for a step's draw.

    plan -> inputs -> [decoder: products of torch, compiled kernels between them | modules] -> logits -> draw

How many threads a step gets is decided step by step: threads that wait for one another longer than they compute take
time from everybody else.
"""

from __future__ import annotations

import logging

import numpy as np
import torch
from torch import Tensor

from kvarena.engine.attention.base import AttentionBackend
from kvarena.engine.clock import Clock
from kvarena.engine.contract import KVAllocator, StepPlan
from kvarena.engine.cpu.compiler import has_team, most_threads
from kvarena.engine.cpu.draw import draw_kernel
from kvarena.engine.cpu.simd import KINDS
from kvarena.engine.fusions.decoder import FusedDecoder
from kvarena.engine.model_runner import PendingTokens
from kvarena.engine.models.spec import LoadedModel
from kvarena.engine.pool.kv_pool import KVPool
from kvarena.engine.request import Request
from kvarena.engine.runner.cpu_forward import CpuForward, make_forward
from kvarena.engine.runner.torch_runner import TorchRunner
from kvarena.engine.sampling.output import HostTokens, SampledTokens

logger = logging.getLogger(__name__)

# Of one core, roughly: what decides whether a step is worth several threads, and no more than that.
_FLOPS, _BYTES = 80e9, 20e9
# Seconds of a layer on one core: below the first one thread does it, and beyond each has so many of the second. Between
# a layer's eight kernels threads wait in a loop, for as long as Python takes to start the next one.
_ALONE, _EACH = 2e-3, 250e-6
# Of all layers, where threads are started once a step.
_EACH_OF_A_STEP = 200e-6


class CpuRunner(TorchRunner):
    """A `TorchRunner` with a fused forward and a fused draw, on a CPU.

    Args:
        decoder: the model's fused form; None runs the transformers module.
        model, pool, backend, seed, clock, num_scores: see `TorchRunner`.
    """

    def __init__(
        self,
        model: LoadedModel,
        pool: KVPool,
        backend: AttentionBackend,
        decoder: FusedDecoder | None = None,
        *,
        seed: int = 0,
        clock: Clock | None = None,
        num_scores: int = 0,
    ) -> None:
        super().__init__(model, pool, backend, seed=seed, clock=clock, num_scores=num_scores)
        if decoder is not None:
            self.forward = make_forward(decoder, backend, pool)
        self._num_read = None if decoder is None else decoder.num_read
        self._num_scores = num_scores
        self._draw = draw_kernel(KINDS[model.spec.dtype])
        if not has_team() and torch.get_num_threads() > 1:
            logger.warning(
                "this torch has no OpenMP whose threads kernels could share: attention and draw run on one core, "
                "products on %d",
                torch.get_num_threads(),
            )

    def _compute(self, plan: StepPlan, allocator: KVAllocator) -> PendingTokens:
        most = torch.get_num_threads()
        wanted = self._threads(plan, most)
        if wanted == most:
            return super()._compute(plan, allocator)
        torch.set_num_threads(wanted)
        try:
            return super()._compute(plan, allocator)
        finally:
            torch.set_num_threads(most)

    def _threads(self, plan: StepPlan, most: int) -> int:
        """As many as have enough to do in a layer."""
        if most == 1:
            return 1
        spec = self.model.spec
        num_weights, layers = spec.num_parameters / spec.num_layers, spec.num_layers
        context = sum(entry.start + entry.num_new_tokens for entry in plan.scheduled)
        seconds = max(2 * num_weights * plan.num_new_tokens / _FLOPS, num_weights * spec.dtype.itemsize / _BYTES)
        seconds += context * spec.kv_bytes_per_token / layers / _BYTES
        if isinstance(self.forward, CpuForward):
            return max(1, min(most, int(layers * seconds / _EACH_OF_A_STEP)))
        return 1 if seconds < _ALONE else min(most, int(seconds / _EACH))

    def _experts_read(self) -> Tensor | None:
        """As in TorchRunner; the fused forward counts its own."""
        return super()._experts_read() if self._num_read is None else self._num_read.sum()

    def _pick(self, requests: list[Request], rows: np.ndarray, stops: np.ndarray, logits: Tensor) -> HostTokens:
        """As in TorchRunner; rows that the fused draw can serve get its token, whoever shares their step."""
        is_plain = self._rows.columns["is_plain"][rows]
        if self._num_scores or not is_plain.any():
            return super()._pick(requests, rows, stops, logits)
        at = torch.from_numpy(rows)
        before = self._rows.last_tokens[at]
        tokens = self._drawn(logits, self._draw_params(rows, stops))
        if is_plain.all():
            sampled = SampledTokens(tokens, tokens, None, [req.request_id for req in requests])
            return HostTokens(sampled, [tokens], None)
        # The draw wrote every row's; an edited row's last one is what penalties count where the host has not seen it.
        self._rows.last_tokens[at] = before
        sampled = self._sampled(requests, rows, at, stops, logits)
        mask = torch.from_numpy(is_plain)
        return self._keep(
            at,
            SampledTokens(
                torch.where(mask, tokens.clamp_min(0), sampled.token_ids),
                torch.where(mask, tokens >= 0, sampled.is_valid),
                sampled.logprobs,
                sampled.request_ids,
            ),
        )

    def _draw_params(self, rows: np.ndarray, stops: np.ndarray) -> np.ndarray:
        """The `params` of `draw_kernel`; greedy rows have no use for a key, and nobody makes any where all are."""
        if self._rows.columns["temperature"][rows].any():
            return self._rows.draw_params(rows, stops)
        params = np.zeros((4, len(rows)), dtype=np.int32)
        params[0] = rows
        return params

    def _drawn(self, logits: Tensor, params: np.ndarray) -> Tensor:
        """int64 [N]: a token per row of `logits` [N, V], -1 where none could be picked; the rows' last tokens too."""
        num_rows, vocab_size = logits.shape
        logits = logits.contiguous()
        out = torch.empty(num_rows, dtype=torch.int64)
        threads = max(1, min(most_threads(), num_rows * vocab_size >> 17))
        self._draw(
            threads, logits.data_ptr(), params.ctypes.data, self._rows.last_tokens.data_ptr(), out.data_ptr(),
            num_rows, vocab_size,
        )  # fmt: skip
        return out
