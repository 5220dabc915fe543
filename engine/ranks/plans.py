"""A step's plan as bytes, and what every rank must know to read it.

An entry is a row of `RequestRows`, two bytes; what most entries have in common is not said. So 256 decodes take half a
kilobyte, and 3 kB when every one of them enters a new block:

    header | rows | exceptions | tables that changed | rows given back | new requests | tokens | copies
             2 B     16 B         6 B + 4 B a block                      JSON, tokens, pixels

    an entry without an exception: one new token, where the request's last step ended, and it samples

Whoever plans says of each request once what it is. Tokens that the devices have are never sent.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import orjson

from kvarena.engine.contract import BlockCopy, CopyKind, ScheduledRequest, StepPlan
from kvarena.engine.errors import EngineError
from kvarena.engine.request import ImageSpan, Request, SamplingParams
from kvarena.engine.sampling.streams import as_seed64

STEP, CALL = 1, 2
_KINDS = tuple(CopyKind)
_entry: Callable[[tuple[Request, int, int]], ScheduledRequest] = partial(tuple.__new__, ScheduledRequest)
_HEADER = 14
_FIRST_ROWS = 256
_WIDE = 1 << 16


class NewRow(NamedTuple):
    """A request that got a row: what the other ranks need of it."""

    row: int
    req: Request
    seed: int
    is_plain: bool


@dataclass
class StepMessage:
    """What a step's message says.

    Attributes:
        step: its number.
        plan: the step; its requests are those of the planning rank.
        rows: int64 [n], of the plan's entries.
        exceptions: int32 [k, 4], (entry, start, new tokens, samples) of entries that need saying.
        tables: block tables that changed: row, first column that did, blocks from there on.
        released: rows whose requests ended or lost their slots, before the step.
        new: requests with a new row.
        tokens: of some rows, tokens behind those that the ranks know.
        checksum: of what the step comes to (`checksum`), or 0.
    """

    step: int
    plan: StepPlan
    rows: np.ndarray
    exceptions: np.ndarray
    tables: list[tuple[int, int, Sequence[int]]] = field(default_factory=list)
    released: list[int] = field(default_factory=list)
    new: list[NewRow] = field(default_factory=list)
    tokens: list[tuple[int, list[int]]] = field(default_factory=list)
    checksum: int = 0

    def to_bytes(self) -> bytes:
        """The message."""
        tables, plan = self.tables, self.plan
        most = max([0, *self.released, *(max(row, first, len(part)) for row, first, part in tables)])
        if len(self.rows):
            most = max(most, int(self.rows.max()))
        short = np.dtype("<u4") if most >= _WIDE else np.dtype("<u2")
        values = [value for _, _, part in tables for value in part]
        new, blobs = _describe(self.new)
        token_rows = [(row, len(part)) for row, part in self.tokens]
        sent = [token for _, part in self.tokens for token in part]
        copies = [(_KINDS.index(copy.kind), copy.src, copy.dst) for copy in plan.copies]
        header = (
            STEP, self.step, short.itemsize, len(self.rows), len(self.exceptions), len(tables), len(values),
            len(self.released), len(new), len(token_rows), len(sent), len(copies), plan.num_decodes,
            self.checksum - (1 << 31),
        )  # fmt: skip
        return b"".join([
            np.array(header, "<i4").tobytes(),
            self.rows.astype(short).tobytes(),
            self.exceptions.astype("<i4").tobytes(),
            np.array([(row, first, len(part)) for row, first, part in tables], short).tobytes(),
            np.array(values, "<i4").tobytes(),
            np.array(self.released, short).tobytes(),
            np.array(token_rows, "<i4").tobytes(),
            np.array(sent, "<i4").tobytes(),
            np.array(copies, "<i4").tobytes(),
            new,
            *blobs,
        ])  # fmt: skip


def _describe(new: list[NewRow]) -> tuple[bytes, list[bytes]]:
    """The JSON of new rows, and the arrays behind it: tokens, pixels."""
    if not new:
        return b"", []
    records, blobs = [], []
    for row, req, seed, is_plain in new:
        tokens = req.prompt_token_ids + req.output_token_ids
        blobs.append(np.array(tokens, "<i4").tobytes())
        images = []
        for image in req.images:
            pixels = np.ascontiguousarray(np.stack(image.pixels))
            blobs.append(pixels.tobytes())
            shape = [pixels.dtype.str, *pixels.shape]
            images.append(
                [image.start, image.stop, str(image.identity), image.num_tiles, image.tile_weight, image.grid, shape]
            )
        sampling = req.sampling
        records.append(
            [row, req.num_prompt_tokens, len(tokens), str(seed), sampling.temperature, is_plain,
             sampling.prompt_logprobs, images]
        )  # fmt: skip
    return orjson.dumps(records), blobs


class _NotPlain:
    """Stands for what the planning rank alone does to the logits of a request: nobody asks it anything."""

    num_late = 0
    failure = ""
    is_free = False

    def fill(self, bitmask: Any) -> None:  # noqa: ARG002
        """See `TokenConstraint.fill`."""
        raise EngineError("only the planning rank constrains tokens; a bug of the ranks' sampling")

    def accept(self, token_id: int) -> None:  # noqa: ARG002
        """See `TokenConstraint.accept`."""
        raise EngineError("only the planning rank constrains tokens; a bug of the ranks' sampling")


class Mirror:
    """The planning rank's requests and block tables as another rank knows them. An allocator to the runner.

    Attributes:
        block_size: of the pool.
        scheduled: the entries of the step that was read last.
        rows: int64 [n], their rows.
        new: requests by row that came since whoever keeps rows has last cleared it.
        changed: rows whose tables changed since whoever keeps rows has last cleared it.
    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.scheduled: list[ScheduledRequest] = []
        self.rows = np.empty(0, np.int64)
        self.new: dict[int, Request] = {}
        self.changed: set[int] = set()
        self._requests: dict[int, Request] = {}
        self._tables: dict[str, list[int]] = {}
        self._next = np.zeros(_FIRST_ROWS, np.int64)  # by row: where its last step ended

    def block_table(self, req: Request) -> list[int]:
        """As `KVAllocator.block_table`."""
        return self._tables[req.request_id]

    def table(self, row: int) -> list[int]:
        """The block table of a row."""
        return self._tables[str(row)]

    def read(self, message: bytes) -> tuple[list[str], StepPlan, int, int]:
        """Take a step's message in.

        Returns:
            The requests that are gone, the step, its number and its checksum (0: it has none).
        """
        header = np.frombuffer(message, "<i4", _HEADER).tolist()
        _, step, width, num_rows, num_odd, num_tables, num_values = header[:7]
        num_released, num_new, num_token_rows, num_tokens, num_copies, num_decodes, checksum = header[7:]
        take = _Reader(message, 4 * _HEADER)
        short = f"<u{width}"
        self.rows = take(short, num_rows).astype(np.int64)
        odd = take("<i4", 4 * num_odd).reshape(-1, 4)
        tables = take(short, 3 * num_tables).reshape(-1, 3).tolist()
        values: list[int] = take("<i4", num_values).tolist()
        released: list[int] = take(short, num_released).tolist()
        token_rows = take("<i4", 2 * num_token_rows).reshape(-1, 2).tolist()
        tokens: list[int] = take("<i4", num_tokens).tolist()
        copies = take("<i4", 3 * num_copies).reshape(-1, 3).tolist()
        gone = [self._forget(row) for row in released]
        if num_new:
            self._add(orjson.loads(take.raw(num_new)), take)
        at = 0
        for row, first, count in tables:
            self.table(row)[first:] = values[at : at + count]
            self.changed.add(row)
            at += count
        at = 0
        for row, count in token_rows:
            self._requests[row].output_token_ids += tokens[at : at + count]
            at += count
        plan = self._plan(odd)
        plan.copies = [BlockCopy(_KINDS[kind], src, dst) for kind, src, dst in copies]
        plan.num_decodes = num_decodes
        return gone, plan, step, checksum + (1 << 31)

    def _plan(self, odd: np.ndarray) -> StepPlan:
        rows, samples = self.rows, [True] * len(self.rows)
        starts, counts = self._next[rows], np.ones(len(rows), np.int64)
        if len(odd):
            entries = odd[:, 0]
            starts[entries], counts[entries] = odd[:, 1], odd[:, 2]
            for entry, sampled in zip(entries.tolist(), odd[:, 3].tolist(), strict=True):
                samples[entry] = bool(sampled)
        self._next[rows] = starts + counts
        requests = map(self._requests.__getitem__, rows.tolist())
        # The other ranks wait for this one, so no call of Python a request.
        self.scheduled = list(map(_entry, zip(requests, starts.tolist(), counts.tolist(), strict=True)))
        return StepPlan(self.scheduled, samples)

    def _add(self, records: list[Any], take: _Reader) -> None:
        for row, num_prompt, num_tokens, seed, temperature, is_plain, prompt_logprobs, images in records:
            tokens = take("<i4", num_tokens).tolist()
            spans = tuple(
                ImageSpan(
                    start,
                    stop,
                    int(identity),
                    num_tiles,
                    take(dtype, int(np.prod(shape))).reshape(shape),
                    weight,
                    None if grid is None else tuple(grid),
                )
                for start, stop, identity, num_tiles, weight, grid, (dtype, *shape) in images
            )
            self._requests[row] = Request(
                str(row), tokens[:num_prompt],
                SamplingParams(temperature=temperature, seed=int(seed), prompt_logprobs=prompt_logprobs),
                constraint=None if is_plain else _NotPlain(), images=spans, output_token_ids=tokens[num_prompt:],
            )  # fmt: skip
            self.new[row], self._tables[str(row)] = self._requests[row], []
            if row >= len(self._next):
                self._next = np.concatenate([self._next, np.zeros(row + 1, np.int64)])
            self._next[row] = 0

    def _forget(self, row: int) -> str:
        del self._requests[row], self._tables[str(row)]
        self.new.pop(row, None)
        self.changed.discard(row)
        return str(row)


class _Reader:
    """Reads arrays one behind the other."""

    def __init__(self, message: bytes, at: int) -> None:
        self._message, self._at = message, at

    def __call__(self, dtype: str, count: int) -> np.ndarray:
        """The next `count` numbers."""
        kind = np.dtype(dtype)
        found = np.frombuffer(self._message, kind, count, self._at)
        self._at += count * kind.itemsize
        return found

    def raw(self, count: int) -> bytes:
        """The next `count` bytes."""
        self._at += count
        return self._message[self._at - count : self._at]


def request_seed(req: Request, derived: int) -> int:
    """The seed of a request's random stream; `derived`: the one that it gets without its own."""
    return derived if req.sampling.seed is None else as_seed64(req.sampling.seed)


def checksum(plan: StepPlan, tables: Sequence[Sequence[int]], block_size: int) -> int:
    """What a step comes to on a rank: positions, blocks and copies. Equal on all ranks, or one has another plan.

    Args:
        plan: the step.
        tables: the block table of each entry.
        block_size: slots of a block.
    """
    words: list[int] = []
    for (_, start, count), table, sampled in zip(plan.scheduled, tables, plan.samples, strict=True):
        words += (start, count, sampled)
        words += table[: -(-(start + count) // block_size)]
    words += [word for copy in plan.copies for word in (_KINDS.index(copy.kind), copy.src, copy.dst)]
    # Never 0, which stands for none.
    return zlib.crc32(np.array(words, "<i4").tobytes()) | 1
