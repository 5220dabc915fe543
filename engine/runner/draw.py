"""Drawing tokens on a GPU, and sending them to the host.

decode steps       begin: the last kernel of the step's graph; every request that does not filter has its token
                   end: a graph of its own, replayed in steps in which somebody filters (top-k, top-p, min-p)
other steps, and   both, launched one by one, on the logits of those who need it
edited logits
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvarena.engine.kernels.drawing import DrawScratch
from kvarena.engine.kernels.filtered import draw_filtered
from kvarena.engine.kernels.sample import draw_scores, draw_tokens
from kvarena.engine.sampling.output import HostTokens, SampledTokens, copy_scores
from kvarena.engine.sampling.scores import ScoreTensors, best_scores

# Steps whose tokens may be on their way at once, and some more.
_NUM_RESULTS = 4
# Where Triton is interpreted, as if that many programs ran at once.
_INTERPRETED = 8


class Draw:
    """Buffers of fixed size around the kernels.

    Args:
        max_rows: most rows of a step.
        device: a GPU; or a CPU, where the kernels are interpreted.
        num_scores: as of `Sampler`.

    Attributes:
        tokens: int64 [max_rows] at a fixed address, what `begin` and `end` draw; -1 where none could be picked.
    """

    def __init__(self, max_rows: int, device: torch.device, num_scores: int = 0) -> None:
        self._num_scores = num_scores
        self._scratch = DrawScratch(max_rows, device)
        self.tokens = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self._on_gpu = device.type == "cuda"
        self._num_programs = _INTERPRETED
        if self._on_gpu:
            self._num_programs = 4 * torch.cuda.get_device_properties(device).multi_processor_count
        self._results = [torch.zeros(max_rows, dtype=torch.int64, pin_memory=self._on_gpu) for _ in range(_NUM_RESULTS)]
        self._turn = 0

    def begin(self, logits: Tensor, params: Tensor, last_tokens: Tensor) -> None:
        """Draw the tokens of rows that do not filter into `tokens` and `last_tokens`; begin with the others."""
        draw_tokens(logits, params, last_tokens, self.tokens, self._scratch, self._num_programs)

    def end(self, logits: Tensor, params: Tensor, last_tokens: Tensor) -> None:
        """Draw the tokens of rows that filter, with which `begin` has begun."""
        draw_filtered(logits, params, last_tokens, self.tokens, self._scratch, self._num_programs)

    def __call__(self, logits: Tensor, params: Tensor, last_tokens: Tensor, *, filters: bool = True) -> Tensor:
        """Draw a token per row and keep it in `last_tokens`.

        Args:
            logits: [N, V].
            params: int32 [NUM_PARAMS, >= N], see `draw_tokens`.
            last_tokens: written.
            filters: some row filters.

        Returns:
            int64 [N], -1 where no token could be picked; anything where a row is SKIPPED.
        """
        tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
        draw_tokens(logits, params, last_tokens, tokens, self._scratch, self._num_programs)
        if filters:
            draw_filtered(logits, params, last_tokens, tokens, self._scratch, self._num_programs)
        return tokens

    def scores(self, logits: Tensor, params: Tensor) -> ScoreTensors | None:
        """What tokens of rows that do not filter are picked by; None unless scores are kept."""
        return best_scores(draw_scores(logits, params), self._num_scores) if self._num_scores else None

    def send(self, tokens: Tensor, request_ids: list[str], scores: ScoreTensors | None = None) -> HostTokens:
        """Start the copy of drawn `tokens` to the host. At most `_NUM_RESULTS` copies may be unread."""
        self._turn = (self._turn + 1) % _NUM_RESULTS
        result = self._results[self._turn][: len(tokens)]
        result.copy_(tokens, non_blocking=True)
        copied, done = copy_scores(scores), None
        if self._on_gpu:
            done = torch.cuda.Event()
            done.record()
        return HostTokens(SampledTokens(tokens, tokens, None, request_ids), [result], done, copied)
