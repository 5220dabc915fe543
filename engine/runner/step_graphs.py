"""Steps of fixed shape: decode steps, and small steps with prompts in them, padded to a shape that has a graph.

    decode     tokens, positions, rows, temperatures, keys, filters [R]          --one copy-->  device
    mixed      tokens, positions, rows [T] | rows, lengths, sampled, starts [R]  --one copy-->  device
               both with one more number a token where it is turned elsewhere than it is counted (rope_positions.py)
    graph      expand -> embedding -> layers -> logits [R, V] -> of decode steps, tokens: the draw
               the rest of the draw, of steps in which a request filters (top-k, top-p, min-p)

Padding entries stand for the null row: context length 1, their KV goes to the null block, and nobody looks at their
logits. Mixed steps are worth it where the host, which needs about 10 ms for the launches of any forward, would be
slower than the device. A decode shape is captured at its first step, a mixed one at its second: most mixed shapes of a
short run come once. A measured run has those that its load can reach captured before (`warm_up`).
"""

from __future__ import annotations

import functools
from bisect import bisect_left
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from kvarena.engine.attention.base import AttentionMetadata
from kvarena.engine.contract import StepPlan
from kvarena.engine.kernels.step import StepBuffers, expand_decode, expand_tokens
from kvarena.engine.runner.draw import Draw
from kvarena.engine.runner.graphs import CapturedGraph, Forward, GraphCapture, GraphShape, ReservingBackend
from kvarena.engine.runner.request_rows import RequestRows
from kvarena.engine.runner.sender import WordSender
from kvarena.engine.sampling.params import NUM_PARAMS, SKIPPED, TOP_K
from kvarena.engine.sharing.reads import SharedReads, reads_alone
from kvarena.engine.sharing.step_reads import StepReads

DECODE_FIELDS = 2 + NUM_PARAMS
TOKEN_FIELDS = 3
# Beyond that many operations the device needs longer than the host does for the launches: 20 ms at 600 TFLOP/s, which
# the 8B shape's steps with prompts beside decodes took (`host` of conf/profile/h200-llama-3.1-8b-overlap.yaml).
HOST_BOUND_OPERATIONS = 1.2e13
MAX_TOKENS = 2048
# Steps of few requests have buckets of their own: of more, what 256 rows of logits cost is a small part.
FEW_ROWS = 8


def graph_tokens(active_parameters: int) -> int:
    """Most new tokens of a mixed step that is worth a graph, for a model with so many weights for each token."""
    return min(MAX_TOKENS, int(HOST_BOUND_OPERATIONS / (2 * active_parameters)))


def decode_buckets(most: int) -> list[int]:
    """Request counts of decode steps: powers of two up to 8, every 8 up to 256, every 32 beyond, and `most`."""
    sizes = [1, 2, 4, *range(8, min(most, 256) + 1, 8), *range(288, most + 1, 32), most]
    return sorted({size for size in sizes if size <= most})


def token_buckets(most: int) -> list[int]:
    """Token counts of mixed steps, and `most`; none for 0.

    32, 64 and 128: below that weights take the time and padding is free. Every 32 up to 512, every 64 up to 1,024,
    every 128 beyond. A run waits for the capture of each that it can reach.
    """
    sizes = [32, 64, 128, *range(160, 513, 32), *range(576, 1025, 64), *range(1152, most + 1, 128), most]
    return sorted({size for size in sizes if 0 < size <= most})


def row_buckets(most: int) -> list[int]:
    """Request counts of mixed steps, `most` among them."""
    return sorted({min(FEW_ROWS, most), most})


class MixedStep(NamedTuple):
    """A step as the host knows it, in batch order; n requests with T new tokens.

    Attributes:
        tokens: int [T], -1 where the device has the token.
        starts, counts: int64 [n], position of each request's first new token, and how many there are.
        rows: int64 [n], the requests' rows.
        samples: bool [n].
        turned: int [T], where each token is turned; of graphs with `has_grids`.
    """

    tokens: np.ndarray
    starts: np.ndarray
    counts: np.ndarray
    rows: np.ndarray
    samples: np.ndarray
    turned: np.ndarray | None = None


class Between(Protocol):
    """What a forward of some of a model's layers has beside it, where no graph can hold it.

    The forward reads its rows from a fixed place and leaves them in another.
    """

    def receive(self, num_tokens: int) -> None:
        """Wait for a step's rows, into the place from which the forward reads them."""
        ...

    def send(self, num_tokens: int) -> None:
        """Hand the rows on that the forward has left."""
        ...


class StepGraphs:
    """Runs steps of fixed shape, and keeps their graphs by shape.

    Args:
        forward: the model.
        backend: attention, prepared here.
        rows: the requests; block tables of a step's rows are up to date in `rows.tables`.
        logits: [most requests of a step, V], written.
        block_size: slots per block.
        mixed_tokens: most new tokens of a mixed step that comes here; 0: none comes.
        capture: captures the graphs; None runs every step without one.
        has_grids: tokens of requests with images are turned elsewhere than they are counted, and each has that number
            too. No step here computes an image's own positions.
        draw: draws the tokens of decode steps, as the end of their graphs; None: nobody does here.
        between: of a forward of some layers; None: it has all.
        reads: what decodes have in common is read once, in graphs of their own; the backend can do that. None: never.

    Attributes:
        num_fields: of a request in a decode step.
        draw_params: int32 [NUM_PARAMS, >= n] on the device, what the last decode step's draw needs.
    """

    def __init__(
        self,
        forward: Forward,
        backend: ReservingBackend,
        rows: RequestRows,
        logits: Tensor,
        block_size: int,
        mixed_tokens: int,
        *,
        capture: GraphCapture | None,
        has_grids: bool = False,
        draw: Draw | None = None,
        between: Between | None = None,
        reads: StepReads | None = None,
    ) -> None:
        max_rows, device = len(logits), logits.device
        self._reads = reads
        self._between = between
        self._decode_buckets = decode_buckets(max_rows)
        self._token_buckets = token_buckets(mixed_tokens)
        self._row_buckets = row_buckets(max_rows)
        self._forward = forward
        self._backend = backend
        self._rows = rows
        self._logits = logits
        self._block_size = block_size
        self._mixed_tokens = mixed_tokens
        self._capture = capture
        self._draw = draw
        self._graphs: dict[GraphShape, CapturedGraph] = {}
        self._ends_of_draws: dict[int, CapturedGraph] = {}
        self._buffers = StepBuffers(max(max_rows, mixed_tokens), max_rows, rows.device_tables.shape[1], device)
        # A multiple of four, so that each field is aligned for wide loads.
        self.num_fields = DECODE_FIELDS + has_grids
        self._token_fields, self._has_grids = TOKEN_FIELDS + has_grids, has_grids
        self._fields = np.zeros((self.num_fields, -(-max_rows // 4) * 4), dtype=np.int32)
        self._sender = WordSender(max(self._fields.size, self._token_fields * mixed_tokens + 4 * max_rows + 1), rows)
        self._sent_fields = self._sender.sent[: self._fields.size].view(*self._fields.shape)
        self.draw_params = self._sent_fields[2:DECODE_FIELDS]
        # Of decode steps: request i owns token i.
        self._host_loc = np.arange(max_rows + 1, dtype=np.int32)
        self._loc = torch.arange(max_rows + 1, dtype=torch.int32, device=device)
        self._every_row = torch.arange(max_rows, device=device)
        # The largest first: what the backend reserves for it serves the others, and never moves.
        self._graph(_decode_shape(max_rows))

    @property
    def padded_sizes(self) -> list[int]:
        """Numbers of tokens to which mixed steps are padded, ascending."""
        return self._token_buckets

    def takes(self, plan: StepPlan) -> bool:
        """Whether `plan`, no decode step, is small enough for `mixed` and asks for nothing but sampled tokens."""
        return (
            plan.num_new_tokens <= self._mixed_tokens
            and len(plan.scheduled) <= len(self._logits)
            and all(entry.req.sampling.prompt_logprobs is None for entry in plan.scheduled)
        )

    def decode(self, fields: np.ndarray, *, filters: bool = False) -> Tensor:
        """Run a step in which every request computes one token and samples, and draw its tokens.

        Args:
            fields: int32 [num_fields, n]: tokens (-1 where the device has it), positions, and `draw_params`, of
                which the first are the rows; with `has_grids` where each is turned.
            filters: some request of which the draw has the token to draw filters.

        Returns:
            [n, V]; overwritten by the next step.
        """
        count = fields.shape[1]
        missing = _smallest(self._decode_buckets, count) - count
        padded = np.concatenate([fields, self._padding(missing)], axis=1) if missing else fields
        return self._decode(padded, count, self._shared(padded[2], padded[1] + 1), filters=filters)

    def _shared(self, rows: np.ndarray, seq_lens: np.ndarray, decodes: np.ndarray | None = None) -> SharedReads | None:
        """What a step's decodes read of what they have in common; see `StepReads`."""
        return None if self._reads is None else self._reads(rows, seq_lens, decodes)

    def _decode(self, fields: np.ndarray, num_real: int, reads: SharedReads | None, *, filters: bool) -> Tensor:
        """A step of as many entries as a bucket has, padding among them."""
        bucket = fields.shape[1]
        words = self._fields
        words[:, :bucket] = fields
        self._sender.send(words.reshape(-1))
        self._run(_decode_shape(bucket), self._host_loc[: bucket + 1], fields[1] + 1, 1, num_real, reads)
        if filters:
            self._end_of_draw(bucket).run()
        return self._logits[:num_real]

    def mixed(self, step: MixedStep) -> Tensor:
        """Run a small step.

        Returns:
            [num_sampled, V]; overwritten by the next step.
        """
        num_tokens = _smallest(self._token_buckets, len(step.tokens))
        num_rows = _smallest(self._row_buckets, len(step.rows))
        reads = self._shared(step.rows, step.starts + step.counts, np.flatnonzero(step.counts == 1))
        self._run_mixed(GraphShape(num_tokens, num_rows, is_decode=False), step, reads)
        return self._logits[: int(step.samples.sum())]

    def warm_up(self, max_rows: int, max_tokens: int) -> int:
        """Run each shape that steps can reach once, the largest first, and capture it; those that were stay.

        Only between steps, with nothing in flight. Writes KV to the null block alone.

        Args:
            max_rows: most requests of a step.
            max_tokens: most new tokens of one.

        Returns:
            How many shapes were captured, or run where nothing is captured.
        """
        nothing = np.zeros(0, dtype=np.int64)
        empty = MixedStep(nothing, nothing, nothing, nothing, nothing.astype(np.bool_))
        num_run = 0
        for shape in self.reachable(max_rows, max_tokens):
            draws = shape.is_decode and self._draw is not None
            graphs = [self._graph(shape), *([self._end_of_draw(shape.num_rows)] if draws else [])]
            if all(graph.is_ready for graph in graphs):
                continue
            for graph in graphs:
                graph.hurry()
            num_run += 1
            if shape.is_decode:
                reads = reads_alone(shape.num_rows) if shape.shares else None
                self._decode(self._padding(shape.num_rows), 0, reads, filters=draws)
            else:
                self._run_mixed(shape, empty, reads_alone(0) if shape.shares else None)
        return num_run

    def reachable(self, max_rows: int, max_tokens: int) -> list[GraphShape]:
        """Shapes of steps of at most so many requests and new tokens; decode steps first, the largest first.

        Of more than one request each twice, where reads may be shared.
        """
        decodes = [_decode_shape(size) for size in reversed(_reached(self._decode_buckets, min(max_rows, max_tokens)))]
        rows, tokens = _reached(self._row_buckets, max_rows), _reached(self._token_buckets, max_tokens)
        # A request has at least one new token, so a step of few tokens has few requests.
        fewest = {size: self._row_buckets[i - 1] + 1 if i else 1 for i, size in enumerate(self._row_buckets)}
        plain = decodes + [
            GraphShape(num_tokens, num_rows, is_decode=False)
            for num_tokens in reversed(tokens)
            for num_rows in reversed(rows)
            if fewest[num_rows] <= min(num_tokens, max_tokens)
        ]
        kinds = (False,) if self._reads is None else (False, True)
        return [
            shape._replace(shares=shares) for shape in plain for shares in kinds if shape.num_rows > 1 or not shares
        ]

    def _padding(self, count: int) -> np.ndarray:
        """Fields of padding entries: token 0 of the null row, at position 0, and nothing is drawn."""
        fields = np.zeros((self.num_fields, count), dtype=np.int32)
        fields[2] = self._rows.num_rows
        fields[2 + TOP_K] = SKIPPED
        return fields

    def _run_mixed(self, shape: GraphShape, step: MixedStep, reads: SharedReads | None) -> None:
        words, loc, seq_lens = self._words(step, shape.num_tokens, shape.num_rows)
        self._sender.send(words)
        self._run(shape, loc, seq_lens, int(step.counts.max(initial=1)), len(step.tokens), reads)

    def _run(
        self,
        shape: GraphShape,
        loc: np.ndarray,
        seq_lens: np.ndarray,
        max_query_len: int,
        num_real: int,
        reads: SharedReads | None,
    ) -> None:
        """Run the step whose words have been sent.

        Args:
            shape: of the step.
            loc, seq_lens, max_query_len: int32 [R + 1], int32 [R] and a number, as in its metadata.
            num_real: tokens that are no padding.
            reads: as in its metadata.
        """
        graph = self._graph(shape._replace(shares=reads is not None))
        meta = graph.meta
        assert meta is not None
        meta.reads = reads
        meta.host_query_start_loc, meta.host_seq_lens = loc, seq_lens
        meta.max_query_len, meta.max_seq_len = max_query_len, int(seq_lens.max())
        self._backend.prepare(meta)
        if self._between is None or not num_real:
            graph.run()
            return
        self._between.receive(num_real)
        graph.run()
        self._between.send(num_real)

    def _graph(self, shape: GraphShape) -> CapturedGraph:
        graph = self._graphs.get(shape)
        if graph is None:
            meta = self._meta(shape)
            shared = {"shares": True} if shape.shares else {}
            self._backend.reserve(meta, shape.num_rows, 0 if shape.is_decode else shape.num_tokens, **shared)
            launch = functools.partial(self._launch_decode if shape.is_decode else self._launch_mixed, shape, meta)
            graph = CapturedGraph(shape, meta, launch, 1 if shape.is_decode else 2, self._capture)
            self._graphs[shape] = graph
        return graph

    def _meta(self, shape: GraphShape) -> AttentionMetadata:
        buffers, num_rows = self._buffers, shape.num_rows
        if shape.is_decode:
            loc, seq_lens, indices = self._loc[: num_rows + 1], buffers.seq_lens[:num_rows], self._every_row[:num_rows]
        else:
            _, _, seq_lens, _, loc = self._views(shape)
            indices = buffers.logits_indices[:num_rows]
        return AttentionMetadata(
            query_start_loc=loc,
            seq_lens=seq_lens,
            slot_mapping=buffers.slots[: shape.num_tokens],
            block_table=buffers.block_table[:num_rows],
            logits_indices=indices,
            max_query_len=1,
            max_seq_len=1,
            block_size=self._block_size,
            host_query_start_loc=self._host_loc[: num_rows + 1],
            host_seq_lens=self._host_loc[:0],
        )

    def _launch_decode(self, shape: GraphShape, meta: AttentionMetadata) -> None:
        rows, buffers, count = self._rows, self._buffers, shape.num_rows
        expand_decode(self._sent_fields, rows.last_tokens, rows.device_tables, buffers, count, self._block_size)
        turned = self._sent_fields[DECODE_FIELDS] if self._has_grids else buffers.positions
        self._forward(buffers.ids[:count], turned[:count], meta, out=self._logits[:count], all_rows=True)
        if self._draw is not None:
            self._draw.begin(self._logits[:count], self.draw_params, rows.last_tokens)

    def _end_of_draw(self, num_rows: int) -> CapturedGraph:
        graph = self._ends_of_draws.get(num_rows)
        if graph is None:
            assert self._draw is not None
            arguments = self._logits[:num_rows], self.draw_params, self._rows.last_tokens
            launch = functools.partial(self._draw.end, *arguments)
            graph = CapturedGraph(f"the draw for {num_rows} requests", None, launch, 1, self._capture)
            self._ends_of_draws[num_rows] = graph
        return graph

    def _launch_mixed(self, shape: GraphShape, meta: AttentionMetadata) -> None:
        num_tokens, num_rows, buffers = shape.num_tokens, shape.num_rows, self._buffers
        fields, rows, _, sampled, _ = self._views(shape)
        tables = self._rows.device_tables
        expand_tokens(fields[:TOKEN_FIELDS], self._rows.last_tokens, tables, buffers, num_tokens, self._block_size)
        torch.index_select(tables, 0, rows, out=buffers.block_table[:num_rows])
        buffers.logits_indices[:num_rows].copy_(sampled)
        turned = fields[TOKEN_FIELDS] if self._has_grids else buffers.positions
        self._forward(buffers.ids[:num_tokens], turned[:num_tokens], meta, out=self._logits[:num_rows])

    def _words(self, step: MixedStep, num_tokens: int, num_rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The integers to send, laid out as `_views` reads them; the requests' starts and context lengths."""
        wanted, count = len(step.tokens), len(step.rows)
        loc = np.full(num_rows + 1, wanted, dtype=np.int32)
        loc[0] = 0
        np.cumsum(step.counts, out=loc[1 : count + 1])
        seq_lens = np.ones(num_rows, dtype=np.int32)
        seq_lens[:count] = step.starts + step.counts
        words = np.zeros(self._token_fields * num_tokens + 4 * num_rows + 1, dtype=np.int32)
        fields = words[: self._token_fields * num_tokens].reshape(self._token_fields, num_tokens)
        fields[0, :wanted] = step.tokens
        fields[1, :wanted] = np.arange(wanted) + np.repeat(step.starts - loc[:count], step.counts)
        fields[2] = self._rows.num_rows
        fields[2, :wanted] = np.repeat(step.rows, step.counts)
        if step.turned is not None:
            fields[TOKEN_FIELDS, :wanted] = step.turned
        rows, lens, sampled, starts = np.split(words[fields.size :], [num_rows, 2 * num_rows, 3 * num_rows])
        rows[:] = self._rows.num_rows
        rows[:count] = step.rows
        lens[:] = seq_lens
        sampled[: int(step.samples.sum())] = loc[1 : count + 1][step.samples] - 1
        starts[:] = loc
        return words, loc, seq_lens

    def _views(self, shape: GraphShape) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Token fields, and of the requests rows, context lengths, sampled tokens and starts, on the device."""
        split, num_rows = self._token_fields * shape.num_tokens, shape.num_rows
        parts = self._sender.sent[split : split + 4 * num_rows + 1].split([num_rows] * 3 + [num_rows + 1])
        return self._sender.sent[:split].view(self._token_fields, shape.num_tokens), *parts


def _decode_shape(num_rows: int) -> GraphShape:
    return GraphShape(num_rows, num_rows, is_decode=True)


def _smallest(buckets: list[int], count: int) -> int:
    """The smallest bucket that holds `count`."""
    return buckets[bisect_left(buckets, count)]


def _reached(buckets: list[int], most: int) -> list[int]:
    """Those that counts from 1 to `most` are padded to."""
    return buckets[: bisect_left(buckets, most) + 1]
