"""All that a runner keeps of a request, by the request's row.

A request gets a row at its first step and loses it when it ended or was preempted; one that comes back starts over in
another row. What is kept lies in arrays by row, so that a step gathers it without a loop:

               host                                                         device
    row 0      block table | sampled_to | prompt, seed, how it is drawn     last token | block table | token counts
    row 1      ...
    null row   of padding entries of steps of fixed shape

A token count takes 5 bytes per vocabulary entry: only rows that use penalties have them (`TokenCounts`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from kvarena.engine.contract import KVAllocator, ScheduledRequest
from kvarena.engine.errors import EngineError
from kvarena.engine.request import Request
from kvarena.engine.runner.block_tables import BlockTables
from kvarena.engine.runner.rope_positions import rope_shift
from kvarena.engine.sampling.batch import SamplingBatch
from kvarena.engine.sampling.params import draw_params, is_drawn, pack_params
from kvarena.engine.sampling.state import SamplerState, check_sampling
from kvarena.engine.sampling.streams import as_seed64, derive_seed

FIRST_ROWS = 16
COLUMNS = np.dtype(
    [
        ("sampled_to", np.int64),
        ("num_prompt", np.int64),
        ("rope_shift", np.int64),
        ("seed", np.uint64),
        ("temperature", np.float32),
        ("top_k", np.int32),
        ("top_p", np.float32),
        ("log_min_p", np.float32),
        ("filters", np.bool_),
        ("is_drawn", np.bool_),
        ("is_plain", np.bool_),
    ]
)


class RequestRows:
    """The requests in a runner, a row each.

    Args:
        vocab_size: width of the logits.
        device: where last tokens, block tables and token counts lie.
        engine_seed: requests without a seed derive theirs from it.
        num_rows: how many there may be, for graphs that hold addresses; None starts small and grows.
        width: columns of the device's block tables; 0: it has none.

    Attributes:
        num_rows: rows there are, used or free. The row `num_rows` itself is the null row.
        columns: [num_rows + 1] of `COLUMNS`: position of the last token that was sampled on the device, or -1; length
            of the prompt; `rope_shift` behind it; seed; `DrawParams`; whether they filter; whether
            the draw serves the request (`is_drawn`), and both: without filters (`is_plain`).
        tables: block tables as the allocator last gave them.
        device_tables: int32 [num_rows + 1, width], filled by whoever sends `tables.take_changes()`.
        last_tokens: int64 [num_rows + 1], the token that each row sampled last: its next input.
    """

    def __init__(
        self,
        vocab_size: int,
        device: torch.device | str,
        engine_seed: int = 0,
        *,
        num_rows: int | None = None,
        width: int = 0,
    ) -> None:
        self.num_rows = FIRST_ROWS if num_rows is None else num_rows
        self.columns = np.zeros(self.num_rows + 1, COLUMNS)
        self.tables = BlockTables(self.num_rows + 1, width)
        self.device_tables = torch.zeros(self.num_rows + 1, width, dtype=torch.int32, device=device)
        self.last_tokens = torch.zeros(self.num_rows + 1, dtype=torch.int64, device=device)
        self._sampler = SamplerState(vocab_size, device)
        self._engine_seed = engine_seed
        self._grows = num_rows is None
        self._rows: dict[str, int] = {}
        self._free = list(range(self.num_rows - 1, -1, -1))

    def of(self, requests: Iterable[Request]) -> np.ndarray:
        """int64 [n]: each request's row, a fresh one at its first step.

        Raises:
            RequestError: a request's token ids do not fit the vocabulary.
            EngineError: more requests have a row than the runner was made for.
        """
        get = self._rows.get
        rows = [self._add(req) if (row := get(req.request_id)) is None else row for req in requests]
        return np.array(rows, dtype=np.int64)

    def of_step(self, scheduled: Sequence[ScheduledRequest], allocator: KVAllocator) -> np.ndarray:
        """int64 [n]: the rows of a step's requests, their block tables brought up to date. Raises as `of`.

        Raises:
            EngineError: a block table ends before the request's new tokens.
        """
        rows: list[int] = []
        row_of, block_table, block_size = self._rows.get, allocator.block_table, allocator.block_size
        read, update = self.tables.read, self.tables.update
        for req, start, count in scheduled:
            row = row_of(req.request_id)
            if row is None:
                row = self._add(req)
            table = block_table(req)
            if len(table) * block_size < start + count:
                raise EngineError(
                    f"request {req.request_id!r} computes positions up to {start + count} and its block table holds "
                    f"{len(table) * block_size} slots; a bug of the allocator or scheduler"
                )
            if read[row] != table:
                update(row, table)
            rows.append(row)
        return np.array(rows, dtype=np.int64)

    def known(self, request_ids: Iterable[str]) -> list[int]:
        """The rows of those of the requests that have one."""
        return [self._rows[request_id] for request_id in request_ids if request_id in self._rows]

    def release(self, request_ids: Iterable[str]) -> None:
        """Give back the rows of requests that ended or lost their slots; ids without a row are fine."""
        rows = [self._rows.pop(request_id) for request_id in request_ids if request_id in self._rows]
        if rows:
            for row in rows:
                self.tables.forget(row)
            self._sampler.release(rows)
            self._free += rows

    def batch(
        self,
        requests: Sequence[Request],
        rows: np.ndarray | None = None,
        *,
        num_outputs: Sequence[int] | None = None,
        pending_token_ids: Tensor | None = None,
        allowed_tokens: Tensor | None = None,
        draws: bool = True,
    ) -> SamplingBatch:
        """What the sampler needs to pick a token for each of `requests`; see `SamplerState.batch`.

        Args:
            requests: in the order of the logits.
            rows: theirs, where the caller has them.
            num_outputs, pending_token_ids, allowed_tokens, draws: see there. By default the host has seen all tokens.
        """
        rows = self.of(requests) if rows is None else rows
        if num_outputs is None:
            num_outputs = [len(req.output_token_ids) for req in requests]
        seeds = self.columns["seed"][rows]
        return self._sampler.batch(
            requests, rows.tolist(), seeds, num_outputs, pending_token_ids=pending_token_ids,
            allowed_tokens=allowed_tokens, draws=draws,
        )  # fmt: skip

    def draw_params(self, rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """The `params` of `draw_tokens`: int32 [NUM_PARAMS, n].

        Args:
            rows: int64 [n].
            positions: int64 [n], position in the request of the token to draw.
        """
        return pack_params(self.columns, rows, positions - self.columns["num_prompt"][rows])

    def _add(self, req: Request) -> int:
        params = req.sampling
        check_sampling(params, self._sampler.vocab_size)
        row = self._rows[req.request_id] = self._free_row(req)
        seed = derive_seed(self._engine_seed, req.request_id) if params.seed is None else as_seed64(params.seed)
        draw, drawn = draw_params(params, self._sampler.vocab_size), is_drawn(params) and req.constraint is None
        self.columns[row] = (
            -1, req.num_prompt_tokens, rope_shift(req), seed, *draw, draw.filters, drawn, drawn and not draw.filters
        )  # fmt: skip
        return row

    def _free_row(self, req: Request) -> int:  # noqa: ARG002 - whoever has the rows from elsewhere asks it
        if not self._free:
            self._grow()
        return self._free.pop()

    def _grow(self) -> None:
        """Twice the rows."""
        count = self.num_rows
        if not self._grows:
            raise EngineError(
                f"more than {count} requests are in the runner at once, which was made for half as many that run; the "
                "runner's max_num_seqs must be the scheduler's"
            )
        self.num_rows = 2 * count
        self.columns = np.concatenate([self.columns, np.zeros(count, COLUMNS)])
        self.tables.add_rows(count)
        self.last_tokens = torch.cat([self.last_tokens, self.last_tokens.new_zeros(count)])
        self._free = list(range(2 * count - 1, count - 1, -1))
