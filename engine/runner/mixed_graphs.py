"""CUDA graphs of small steps with prompts in them: prompts, chunks of prompts, and decodes beside them.

Launched one by one, the forward's kernels cost the host about 10 ms whatever the step holds; a step that the device
does in less is bound by the host. Such steps are padded to a bucket of new tokens and a bucket of requests:

    host      tokens, positions, rows [T] | rows, context lengths, starts, sampled tokens [R]  --one copy-->  device
    graph     expand -> embedding -> layers -> logits [R, V]

Padding tokens belong to no request: their KV goes to the null block and nobody reads their attention. Padding requests
have no new token. A pair of buckets runs as it is the first time, which compiles what it needs, and is captured the
second time: most pairs of a short run come once. A measured run has them all captured before (`warm_up`).
"""

from __future__ import annotations

from bisect import bisect_left
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvarena.engine.attention.base import AttentionMetadata
from kvarena.engine.contract import StepPlan
from kvarena.engine.kernels.step import expand_tokens
from kvarena.engine.runner.decode_inputs import TableMirror, WordSender
from kvarena.engine.runner.graphs import Forward, GraphCapture, ReservingBackend

TOKEN_FIELDS = 3
# Beyond that many operations the device needs longer than the host does for the launches (10 ms at 600 TFLOP/s).
HOST_BOUND_OPERATIONS = 6e12
MAX_TOKENS = 2048
ROW_BUCKETS = (8, 64)


def graph_tokens(num_parameters: int) -> int:
    """Most new tokens of a step that is worth a graph, for a model of that many parameters."""
    return min(MAX_TOKENS, int(HOST_BOUND_OPERATIONS / (2 * num_parameters)))


def token_buckets(most: int) -> list[int]:
    """Token counts that get a graph: every 16 up to 128, every 32 up to 512, every 64 beyond, and `most`."""
    sizes = [*range(16, 129, 16), *range(160, 513, 32), *range(576, most + 1, 64), most]
    return sorted({size for size in sizes if size <= most})


def row_buckets(most: int) -> list[int]:
    """Request counts that get a graph, `most` among them."""
    return sorted({*(size for size in ROW_BUCKETS if size < most), most})


class MixedStep(NamedTuple):
    """A step as the host knows it, in batch order; n requests with T new tokens.

    Attributes:
        tokens: int32 [T], -1 where the device has the token.
        starts, counts: int64 [n], position of each request's first new token, and how many there are.
        rows: int64 [n], the requests' rows.
        samples: bool [n].
    """

    tokens: np.ndarray
    starts: np.ndarray
    counts: np.ndarray
    rows: np.ndarray
    samples: np.ndarray


class MixedGraphs:
    """Runs small steps at fixed addresses, captured where that is possible.

    Args:
        forward: the model.
        backend: attention, prepared here.
        mirror: what the device's block tables hold.
        last_tokens: int64 [num_rows], each row's last token.
        tables: int32 [num_rows, width]; written.
        null_row: the row of padding tokens.
        logits: [most requests of a step, V], written.
        block_size: slots per block.
        max_tokens: most new tokens of a step that comes here.
        capture: captures the graphs; None runs every step without one (the same kernels, launched one by one).
    """

    def __init__(
        self,
        forward: Forward,
        backend: ReservingBackend,
        mirror: TableMirror,
        last_tokens: Tensor,
        tables: Tensor,
        null_row: int,
        logits: Tensor,
        block_size: int,
        max_tokens: int,
        *,
        capture: GraphCapture | None,
    ) -> None:
        max_rows = len(logits)
        self.max_tokens = max_tokens
        self._token_buckets = token_buckets(max_tokens)
        self._row_buckets = row_buckets(max_rows)
        self._forward = forward
        self._backend = backend
        self._mirror = mirror
        self._last_tokens = last_tokens
        self._tables = tables
        self._null_row = null_row
        self._logits = logits
        self._block_size = block_size
        self._capture = capture
        self._sender = WordSender(TOKEN_FIELDS * max_tokens + 4 * max_rows + 1, tables)
        device = tables.device
        self._ids, self._positions, self._slots = (
            torch.zeros(max_tokens, dtype=torch.int64, device=device) for _ in range(3)
        )
        self._block_table = torch.zeros(max_rows, tables.shape[1], dtype=torch.int32, device=device)
        self._indices = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self._metas: dict[tuple[int, int], AttentionMetadata] = {}
        self._graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}

    def takes(self, plan: StepPlan) -> bool:
        """Whether `plan` is small enough and asks for nothing but sampled tokens."""
        return (
            plan.num_new_tokens <= self.max_tokens
            and len(plan.scheduled) <= len(self._logits)
            and all(entry.req.sampling.prompt_logprobs is None for entry in plan.scheduled)
        )

    def run(self, step: MixedStep) -> Tensor:
        """Run a step whose block tables are in the mirror.

        Returns:
            [num_sampled, V]; overwritten by the next step.
        """
        num_tokens, num_rows = int(step.counts.sum()), len(step.rows)
        key = (
            self._token_buckets[bisect_left(self._token_buckets, num_tokens)],
            self._row_buckets[bisect_left(self._row_buckets, num_rows)],
        )
        self._run_bucket(key, step)
        return self._logits[: int(step.samples.sum())]

    def warm_up(self) -> int:
        """Run every pair of buckets, the largest first, twice: compiled, then captured. Returns how many there are.

        Only between steps, with nothing in flight. Writes KV to the null block alone.
        """
        nothing = np.zeros(0, dtype=np.int64)
        step = MixedStep(nothing.astype(np.int32), nothing, nothing, nothing, nothing.astype(np.bool_))
        keys = [(tokens, rows) for tokens in reversed(self._token_buckets) for rows in reversed(self._row_buckets)]
        for key in keys:
            for _ in range(1 if self._capture is None else 2):
                self._run_bucket(key, step)
        return len(keys)

    def _run_bucket(self, key: tuple[int, int], step: MixedStep) -> None:
        is_new = key not in self._metas
        words, loc, seq_lens = self._words(step, *key)
        self._sender.send_words(words, *self._mirror.take())
        meta = self._meta(key)
        meta.host_query_start_loc, meta.host_seq_lens = loc, seq_lens
        meta.max_query_len, meta.max_seq_len = int(step.counts.max(initial=1)), int(seq_lens.max())
        self._backend.prepare(meta)
        captured = self._graphs.get(key)
        if captured is not None:
            captured.replay()
            return
        self._run(key, meta)
        if self._capture is not None and not is_new:
            what = f"the forward for {key[0]} new tokens of {key[1]} requests"
            self._graphs[key] = self._capture(lambda: self._run(key, meta), what)

    def _words(self, step: MixedStep, num_tokens: int, num_rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The integers to send, laid out as `_views` reads them; the requests' starts and context lengths."""
        wanted, count = len(step.tokens), len(step.rows)
        loc = np.full(num_rows + 1, wanted, dtype=np.int32)
        loc[0] = 0
        np.cumsum(step.counts, out=loc[1 : count + 1])
        seq_lens = np.ones(num_rows, dtype=np.int32)
        seq_lens[:count] = step.starts + step.counts
        words = np.zeros(TOKEN_FIELDS * num_tokens + 4 * num_rows + 1, dtype=np.int32)
        fields = words[: TOKEN_FIELDS * num_tokens].reshape(TOKEN_FIELDS, num_tokens)
        fields[0, :wanted] = step.tokens
        fields[1, :wanted] = np.arange(wanted) + np.repeat(step.starts - loc[:count], step.counts)
        fields[2] = self._null_row
        fields[2, :wanted] = np.repeat(step.rows, step.counts)
        rows, lens, sampled, starts = np.split(words[fields.size :], [num_rows, 2 * num_rows, 3 * num_rows])
        rows[:] = self._null_row
        rows[:count] = step.rows
        lens[:] = seq_lens
        sampled[: int(step.samples.sum())] = loc[1 : count + 1][step.samples] - 1
        starts[:] = loc
        return words, loc, seq_lens

    def _views(self, num_tokens: int, num_rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Token fields, and of the requests rows, context lengths, sampled tokens and starts, on the device."""
        split = TOKEN_FIELDS * num_tokens
        rest = self._sender.sent[split : split + 4 * num_rows + 1]
        parts = rest.split([num_rows, num_rows, num_rows, num_rows + 1])
        return self._sender.sent[:split].view(TOKEN_FIELDS, num_tokens), *parts

    def _run(self, key: tuple[int, int], meta: AttentionMetadata) -> None:
        num_tokens, num_rows = key
        fields, rows, _, sampled, _ = self._views(*key)
        ids, positions, slots = (x[:num_tokens] for x in (self._ids, self._positions, self._slots))
        expand_tokens(fields, self._last_tokens, self._tables, ids, positions, slots, self._block_size)
        torch.index_select(self._tables, 0, rows, out=self._block_table[:num_rows])
        self._indices[:num_rows].copy_(sampled)
        self._forward(ids, positions, meta, out=self._logits[:num_rows])

    def _meta(self, key: tuple[int, int]) -> AttentionMetadata:
        meta = self._metas.get(key)
        if meta is None:
            num_tokens, num_rows = key
            _, _, seq_lens, _, starts = self._views(*key)
            meta = self._metas[key] = AttentionMetadata(
                query_start_loc=starts,
                seq_lens=seq_lens,
                slot_mapping=self._slots[:num_tokens],
                block_table=self._block_table[:num_rows],
                logits_indices=self._indices[:num_rows],
                max_query_len=1,
                max_seq_len=1,
                block_size=self._block_size,
                host_query_start_loc=np.zeros(num_rows + 1, dtype=np.int32),
                host_seq_lens=np.ones(num_rows, dtype=np.int32),
            )
            self._backend.reserve(meta, num_rows, num_tokens)
        return meta
