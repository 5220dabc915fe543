"""Mooncake traces (FAST'25): JSON lines with hash ids of the prompt's blocks.

Each line: `timestamp` (integer ms), `input_length`, `output_length` (tokens) and `hash_ids`, one id per 512-token block
of the prompt, the last block partial. Equal ids mean equal blocks, so equal leading ids mean a shared prefix.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np

from kvarena.engine.checks import check_bool, check_int, is_int
from kvarena.experiments.workloads.parts.base import FloatArray
from kvarena.experiments.workloads.parts.limits import MAX_LENGTH
from kvarena.experiments.workloads.parts.reading import fail, json_lines, length_problem
from kvarena.experiments.workloads.parts.seeds import Purpose, generator
from kvarena.experiments.workloads.parts.trace import TraceRow, TraceWorkload

MAX_INT = 2**63
_CACHED_TOKENS = 4_000_000
_MAX_CACHED_BLOCKS = 65_536


class MooncakeWorkload(TraceWorkload):
    """A Mooncake trace whose prompts share tokens exactly where the trace's hash ids agree.

    The tokens of a block are a function of (seed, hash id), and a partial block is the beginning of the full one. So
    two prompts have the same first k tokens whenever their ids agree on the blocks of these k tokens, at any block size
    of the engine. A repeated pass (`repeat`) has blocks of its own.

    Args:
        hash_block_size: tokens per hash id: 512 in Mooncake's files, 16 in files of the same shape by others.
        spread_bins: spread the rows of one time stamp uniformly over its bin. The published stamps fall in bins of
            about 3 s, and replayed as they are they make a train of bursts. A bin reaches to the next stamp, at most
            the median distance of stamps.
        options: see TraceWorkload.
    """

    name = "mooncake"
    ticks_per_second = 1000
    keys: ClassVar[tuple[str, ...]] = ("timestamp", "input_length", "output_length", "hash_ids")

    def __init__(self, *, hash_block_size: int = 512, spread_bins: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.hash_block_size = check_int("workload.hash_block_size", hash_block_size, 1, MAX_LENGTH)
        self._spread_bins = check_bool("workload.spread_bins", spread_bins)
        self._hash_ids: list[tuple[int, ...]] = []
        num_cached = min(_MAX_CACHED_BLOCKS, max(1, _CACHED_TOKENS // hash_block_size))
        self._block = functools.lru_cache(maxsize=num_cached)(self._make_block)

    def _read(self) -> Iterator[TraceRow | str]:
        for line, text in json_lines(self.path):
            yield self._parse(line, text)

    def _parse(self, line: int, text: str) -> TraceRow | str:
        def bad(key: str, message: str) -> None:
            place = re.search(rf'"{key}"\s*:\s*', text)
            fail(self.path, line, place.end() + 1 if place else len(text.rstrip()), f"{key}: {message}")

        record: Any = None
        try:
            record = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_int=_parse_int)
        except json.JSONDecodeError as error:
            fail(self.path, line, error.colno, f"not JSON: {error.msg}")
        except _HugeNumberError as error:
            fail(self.path, line, text.find(str(error)) + 1, f"a number of {len(str(error))} digits is too large")
        except (ValueError, RecursionError) as error:
            fail(self.path, line, 1, f"not JSON that can be read: {error}")
        if not isinstance(record, dict):
            fail(self.path, line, 1, f"expected an object with the keys {', '.join(self.keys)}")
        for key in self.keys:
            if key not in record:
                bad(key, "this key is missing")
        for key in ("input_length", "output_length"):
            if not is_int(record[key]):
                bad(key, f"{short(record[key])} must be an integer number of tokens")
            problem = length_problem(record[key], 1)
            if problem:
                bad(key, problem)
        hash_ids = record["hash_ids"]
        if not isinstance(hash_ids, list) or not all(is_int(h) and 0 <= h < MAX_INT for h in hash_ids):
            bad("hash_ids", "must be a list of integers, each at least 0 and below 2^63")
        return self._row(record, bad)

    def _row(self, record: dict[str, Any], bad: Callable[[str, str], None]) -> TraceRow | str:
        """The request of a line whose lengths and ids are in order; `bad` tells what else is wrong at which key."""
        time, hash_ids, length = record["timestamp"], record["hash_ids"], record["input_length"]
        if not is_int(time) or not 0 <= time < MAX_INT:
            bad("timestamp", f"{short(time)} must be an integer number of milliseconds, at least 0 and below 2^63")
        num_blocks = -(-length // self.hash_block_size)
        if len(hash_ids) != num_blocks:
            bad(
                "hash_ids",
                f"{len(hash_ids)} ids for {length} tokens; {num_blocks} are needed, one per block of "
                f"{self.hash_block_size} (workload.hash_block_size)",
            )
        return TraceRow(time, length, record["output_length"], hash_ids=tuple(hash_ids))

    def _keep_hashes(self, rows: list[TraceRow]) -> None:
        self._hash_ids = [row.hash_ids for row in rows]

    def block_ids(self) -> list[tuple[int, ...]]:
        """The hash ids of each request of one pass."""
        number = len(self.table)  # which reads the file
        return self._hash_ids[: min(number, self._rows_per_pass)]

    def block_hits(self) -> tuple[int, int]:
        """(blocks seen before, all blocks) of one pass: the hits of a cache without end."""
        seen: set[int] = set()
        hits = total = 0
        for row in range(min(len(self.table), self._rows_per_pass)):
            hits += sum(h in seen for h in self._hash_ids[row])
            total += len(self._hash_ids[row])
            seen.update(self._hash_ids[row])
        return hits, total

    def token_hits(self, block_size: int) -> tuple[int, int]:
        """(prompt tokens found, all prompt tokens) of one pass in a cache without end, made of full engine blocks.

        A prompt is there for the next one at once; at least one token of a prompt is computed, and hits are whole
        blocks. So no cache of `block_size` finds more, in whatever order the requests run that keeps theirs.

        Args:
            block_size: of the engine, in tokens.
        """
        known: dict[int, int] = {}  # hash id -> most tokens of its block seen so far
        hits = total = 0
        for row in range(min(len(self.table), self._rows_per_pass)):
            length, found, whole = int(self.table.prompt_lens[row]), 0, True
            for index, hash_id in enumerate(self._hash_ids[row]):
                own = min(self.hash_block_size, length - index * self.hash_block_size)
                if whole:
                    found += min(known.get(hash_id, 0), own)
                    whole = known.get(hash_id, 0) >= self.hash_block_size
                known[hash_id] = max(known.get(hash_id, 0), own)
            hits += min(found, length - 1) // block_size * block_size
            total += length
        return hits, total

    def _make_block(self, hash_id: int, epoch: int) -> list[int]:
        return self._tokens.take(hash_id, self.hash_block_size, epoch=epoch)

    def prompt(self, row: int) -> list[int]:
        """The token ids of one row's prompt, block by block."""
        length = int(self.table.prompt_lens[row])
        epoch, source_row = divmod(row, self._rows_per_pass)
        prompt: list[int] = []
        for hash_id in self._hash_ids[source_row]:
            if len(prompt) >= length:
                break
            prompt += self._block(hash_id, epoch)
        del prompt[length:]
        return prompt

    def _spread(self, times: FloatArray) -> FloatArray:
        if not self._spread_bins:
            return times
        stamps, bins = np.unique(times, return_inverse=True)
        if len(stamps) < 2:
            return times
        gaps = np.diff(stamps)
        typical = float(np.median(gaps))
        widths = np.append(np.minimum(gaps, typical), typical)
        places = generator(self.seed, Purpose.TIMES).random(len(times))
        return np.asarray(np.sort(stamps[bins] + places * widths[bins]))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        raise ValueError("a key occurs twice")
    return record


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


class _HugeNumberError(ValueError):
    """Carries the digits of an integer that no field can hold."""


def _parse_int(digits: str) -> int:
    if len(digits) > 20:
        raise _HugeNumberError(digits)
    return int(digits)


def short(value: object) -> str:
    """A value for a message, cut to a readable length."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
