"""What the fast runner knows of each request, in arrays by row, so that a step gathers it without a loop."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from kvarena.engine.errors import EngineError
from kvarena.engine.request import Request, SamplingParams
from kvarena.engine.runner.inputs import BlockTables
from kvarena.engine.sampling.state import check_sampling
from kvarena.engine.sampling.streams import as_seed64, derive_seed, stream_keys


class RequestRows:
    """Rows of live requests, numbered by `BlockTables`.

    Args:
        tables: who numbers the rows.
        num_rows: how many there may be; the row `num_rows` itself is the null row, of padding entries.
        vocab_size: width of the logits.
        engine_seed: requests without a seed derive theirs from it.

    Attributes:
        sampled_to: int64 [num_rows + 1], the position of the last token that was sampled on the device, or -1.
        is_plain: bool, requests that `draw_tokens` can serve: greedy or temperature alone.
    """

    def __init__(self, tables: BlockTables, num_rows: int, vocab_size: int, engine_seed: int) -> None:
        self.num_rows = num_rows
        self.sampled_to = np.full(num_rows + 1, -1, dtype=np.int64)
        self.is_plain = np.zeros(num_rows + 1, dtype=np.bool_)
        self._tables = tables
        self._vocab_size = vocab_size
        self._engine_seed = engine_seed
        self._rows: dict[str, int] = {}
        self._num_prompt = np.zeros(num_rows + 1, dtype=np.int64)
        self._temperatures = np.zeros(num_rows + 1, dtype=np.float32)
        self._seeds = np.zeros(num_rows + 1, dtype=np.uint64)

    def row(self, req: Request) -> int:
        """The request's row.

        Raises:
            EngineError: more requests have a row than the runner was made for.
        """
        row = self._rows.get(req.request_id)
        return self._add(req) if row is None else row

    def forget(self, request_ids: Iterable[str]) -> None:
        """Requests that ended or lost their slots; a later step may bring them back."""
        for request_id in request_ids:
            row = self._rows.pop(request_id, None)
            if row is not None:
                self.sampled_to[row] = -1

    def draw_params(self, rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """The `params` of `draw_tokens`: int32 [4, n].

        Args:
            rows: int64 [n].
            positions: int64 [n], position in the request of the token to draw.
        """
        params = np.empty((4, len(rows)), dtype=np.int32)
        params[0] = rows
        params[1] = self._temperatures[rows].view(np.int32)
        params[2:] = stream_keys(self._seeds[rows], positions - self._num_prompt[rows]).T
        return params

    def _add(self, req: Request) -> int:
        row = self._tables.row(req.request_id)
        if row >= self.num_rows:
            raise EngineError(
                f"more than {self.num_rows} requests are in the runner at once, which was made for half as many that "
                "run; the runner's max_num_seqs must be the scheduler's"
            )
        params = req.sampling
        check_sampling(params, self._vocab_size)
        seed = derive_seed(self._engine_seed, req.request_id) if params.seed is None else as_seed64(params.seed)
        self._rows[req.request_id] = row
        self.sampled_to[row] = -1
        self.is_plain[row] = is_plain(params) and req.constraint is None
        self._num_prompt[row] = req.num_prompt_tokens
        self._temperatures[row] = params.temperature
        self._seeds[row] = seed
        return row


def is_plain(params: SamplingParams) -> bool:
    """Greedy or temperature alone: nothing filters or edits the logits, and nobody asks for log-probabilities."""
    return (
        params.top_k == 0
        and params.top_p == 1
        and params.min_p == 0
        and params.min_tokens == 0
        and params.presence_penalty == 0
        and params.frequency_penalty == 0
        and params.repetition_penalty == 1
        and not params.logit_bias
        and params.logprobs is None
    )
