"""Drawing tokens on a GPU with `draw_tokens`, and sending them to the host."""

from __future__ import annotations

import torch
from torch import Tensor

from kvarena.engine.kernels.sample import DrawScratch, draw_scores, draw_tokens
from kvarena.engine.sampling.output import HostTokens, SampledTokens, copy_scores
from kvarena.engine.sampling.scores import ScoreTensors, best_scores

# Steps whose tokens may be on their way at once, and some more.
_NUM_RESULTS = 4


class Draw:
    """Buffers of fixed size around the kernel.

    Args:
        max_rows: most rows of a step.
        device: a GPU.
        num_scores: as of `Sampler`.
    """

    def __init__(self, max_rows: int, device: torch.device, num_scores: int = 0) -> None:
        self._num_scores = num_scores
        self._scratch = DrawScratch(max_rows, device)
        self._tokens = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self._num_programs = 4 * torch.cuda.get_device_properties(device).multi_processor_count
        self._results = [torch.zeros(max_rows, dtype=torch.int64, pin_memory=True) for _ in range(_NUM_RESULTS)]
        self._turn = 0

    def __call__(self, logits: Tensor, params: Tensor, last_tokens: Tensor) -> Tensor:
        """Draw a token per row and keep it in `last_tokens`.

        Args:
            logits: [N, V].
            params: int32 [4, >= N], see `draw_tokens`.
            last_tokens: written.

        Returns:
            int64 [N], -1 where no token could be picked; overwritten by the next step.
        """
        tokens = self._tokens[: len(logits)]
        draw_tokens(logits, params, last_tokens, tokens, self._scratch, self._num_programs)
        return tokens

    def scores(self, logits: Tensor, params: Tensor) -> ScoreTensors | None:
        """What `__call__` picks the tokens of the same logits by; None unless scores are kept."""
        return best_scores(draw_scores(logits, params), self._num_scores) if self._num_scores else None

    def sample(self, logits: Tensor, params: Tensor, last_tokens: Tensor, request_ids: list[str]) -> HostTokens:
        """Draw as `__call__` does, and start the copy to the host. At most `_NUM_RESULTS` copies may be unread."""
        tokens = self(logits, params, last_tokens)
        scores = self.scores(logits, params)
        self._turn = (self._turn + 1) % _NUM_RESULTS
        result = self._results[self._turn][: len(tokens)]
        result.copy_(tokens, non_blocking=True)
        copied = copy_scores(scores)
        done = torch.cuda.Event()
        done.record()
        return HostTokens(SampledTokens(tokens, tokens, None, request_ids), [result], done, copied)
