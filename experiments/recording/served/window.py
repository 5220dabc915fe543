"""What is kept of a server's recording: the latest steps and the requests that ran in them, within bounds.

    frames of the engine --add--> | part | part | part |          steps, ledger, token times, KV map
                          oldest parts go ^                       requests by row, until nothing that is kept shows them

All times and rows come as the engine has them. `write` counts both from the first that is kept.
"""

from __future__ import annotations

import math
from array import array
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kvarena.engine.ledger import LedgerPart, into_classes
from kvarena.experiments.caching.accesses import RawEvent, Reuse
from kvarena.experiments.caching.optimum import Ask
from kvarena.experiments.recording.kv_map import MAX_SNAPSHOTS
from kvarena.experiments.recording.record import write_request_chunks, write_steps
from kvarena.experiments.recording.reuse_file import reuse_columns, write_reuse
from kvarena.experiments.recording.served.accesses import EVENT_BYTES, served_reuse
from kvarena.experiments.recording.served.log import Progress, Submitted
from kvarena.experiments.recording.served.prefixes import block_hashes, hidden_name, write_prefixes
from kvarena.experiments.recording.token_times import TokenTimes
from kvarena.reports.reading.columns import schema_of
from kvarena.reports.reading.names import KV_MAP_FILE, PREFIXES_FILE, REQUESTS_FILE, REUSE_FILE, STEPS_FILE

REQUEST_BYTES = 600  # of a request beside its tokens, as it is held
NAN = math.nan


class Frame(NamedTuple):
    """What an engine hands on every few seconds.

    Attributes:
        ordinals: of the steps that ended, their numbers among those that were launched: int64.
        steps: their columns, without number and ledger.
        token_times: rows that sampled, and when, as `TokenTimes.take` gives them.
        ledger: of the steps that were launched.
        snapshots: rows of kv_map.parquet.
        residents: rows of the requests that own slots now, ended or not.
        submitted, progress: requests.
        accesses: what was asked of the prefix cache, as `AccessLog.take` gives it; None: nobody keeps that.
        seconds: what recording has taken of the engine's thread so far.
        processor_seconds: of the engine's process so far, all its threads together.
    """

    ordinals: np.ndarray
    steps: dict[str, np.ndarray]
    token_times: list[tuple[array[int], array[float]]]
    ledger: LedgerPart
    snapshots: list[dict[str, Any]]
    residents: list[int]
    submitted: list[Submitted]
    progress: list[Progress]
    accesses: list[RawEvent] | None
    seconds: float
    processor_seconds: float


@dataclass(frozen=True)
class Bounds:
    """How much is kept, and of what.

    Attributes:
        max_bytes: as it is held in memory; files are smaller.
        max_seconds: from the oldest step to the latest.
        content: `tokens`, or `hashes` of blocks in their place.
        block_size: tokens of a block that is hashed.
        key: of the hashes.
        num_blocks: of the pool and the levels below it, for the bound of its prefix cache's hits.
    """

    max_bytes: int
    max_seconds: float
    content: str
    block_size: int
    key: bytes
    num_blocks: int = 0


@dataclass
class _Part:
    """The steps of a frame."""

    frame: Frame
    first: int  # the number of its first launched step
    num_launched: int
    start: float
    end: float
    num_bytes: int


@dataclass
class _Kept:
    """A request."""

    came: Submitted
    now: Progress
    prompt: np.ndarray
    outputs: list[np.ndarray] = field(default_factory=list)
    early_times: list[float] = field(default_factory=list)  # of tokens whose steps are kept no longer
    hashes: np.ndarray | None = None
    num_output: int = 0
    last_seen: float = -math.inf  # in a snapshot

    @property
    def num_bytes(self) -> int:
        """As it is held."""
        held = [self.prompt, *self.outputs, *([] if self.hashes is None else [self.hashes])]
        return REQUEST_BYTES + sum(one.nbytes for one in held)


class Window:
    """The latest of a recording.

    Args:
        bounds: how much of it.

    Attributes:
        num_dropped_steps, num_dropped_requests: that are kept no longer.
        seconds, processor_seconds: as the latest frame has them.
    """

    def __init__(self, bounds: Bounds) -> None:
        self._bounds = bounds
        self._parts: deque[_Part] = deque()
        self._rows: dict[int, _Kept] = {}
        self._waste: dict[int, int] = {}
        self._still_open: dict[int, int] = {}
        self._base = 0  # slots that were wasted when the first kept step was launched, as booked before it
        self._residents: frozenset[int] = frozenset()
        self._num_launched = 0
        self._num_bytes = 0
        # Of all steps so far, or None: without the first ones nobody knows what the cache held when the others came.
        self._accesses: list[RawEvent] | None = []
        self.num_dropped_steps = self.num_dropped_requests = 0
        self.seconds = self.processor_seconds = 0.0

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, frame: Frame) -> None:
        """Take a frame in, and drop the oldest of what is too much."""
        self.seconds, self.processor_seconds = frame.seconds, frame.processor_seconds
        if frame.accesses is None:
            self._accesses = None
        elif self._accesses is not None:
            self._accesses += frame.accesses
            self._num_bytes += EVENT_BYTES * len(frame.accesses)
        for came in frame.submitted:
            now = Progress(came.row, NAN, NAN, NAN, 0, 0, 0, 0, None, "", b"")
            self._rows[came.row] = kept = _Kept(came, now, np.frombuffer(came.prompt, dtype=np.int32))
            self._num_bytes += kept.num_bytes
        for now in frame.progress:
            self._go_on(self._rows[now.row], now)
        for snapshot in frame.snapshots:
            owners = np.unique(snapshot["owner"])
            for row in owners[owners >= 0].tolist():
                self._rows[row].last_seen = snapshot["time"]
        for step, slots in frame.ledger.waste.items():
            self._waste[step] = self._waste.get(step, 0) + slots
        self._still_open = frame.ledger.still_open
        launched = len(frame.ledger.columns["total"])
        if launched or len(frame.ordinals):
            self._keep(frame, launched)
        self._residents = frozenset(frame.residents)
        self._drop()

    def _go_on(self, kept: _Kept, now: Progress) -> None:
        before = kept.num_bytes
        kept.now = now
        kept.outputs.append(np.frombuffer(now.output, dtype=np.int32))
        kept.num_output += len(kept.outputs[-1])
        if now.finish_reason is not None and (self._wants_hashes(kept) or self._accesses is not None):
            kept.hashes = self._hash(kept)
            if self._bounds.content == "hashes":
                kept.outputs = []
        self._num_bytes += kept.num_bytes - before

    def _wants_hashes(self, kept: _Kept) -> bool:
        return self._bounds.content == "hashes" or kept.came.identities is not None or bool(kept.came.salt)

    def _hash(self, kept: _Kept) -> np.ndarray:
        came, bounds = kept.came, self._bounds
        output = np.concatenate([np.empty(0, np.int32), *kept.outputs])
        sequence: Any = np.concatenate([kept.prompt, output])
        if came.identities is not None:
            sequence = [*came.identities, *output.tolist()]
        return block_hashes(bounds.key, sequence, bounds.block_size, came.salt)

    def _keep(self, frame: Frame, launched: int) -> None:
        starts, ends = frame.steps["start_time"], frame.steps["end_time"]
        last = self._parts[-1].end if self._parts else 0.0
        arrays = [frame.ordinals, *frame.steps.values(), *frame.ledger.columns.values()]
        size = sum(one.nbytes for one in arrays) + sum(
            4 * len(rows) + 8 * len(times) for rows, times in frame.token_times
        )
        size += sum(one["owner"].nbytes + one["filled"].nbytes for one in frame.snapshots)
        token_times = [(array("i", rows), times) for rows, times in frame.token_times]
        start, end = (float(starts[0]), float(ends[-1])) if len(ends) else (last, last)
        kept = frame._replace(token_times=token_times, submitted=[], progress=[])
        part = _Part(kept, self._num_launched, launched, start, end, size)
        self._num_launched += launched
        self._parts.append(part)
        self._num_bytes += size

    def _drop(self) -> None:
        """Let go of the oldest parts, and of the requests that no kept step shows."""
        bounds, gone = self._bounds, []
        if self._accesses and len(self._parts) > 1 and self._num_bytes > bounds.max_bytes:
            self._num_bytes -= EVENT_BYTES * len(self._accesses)
            self._accesses = None
        while len(self._parts) > 1 and (
            self._num_bytes > bounds.max_bytes or self._parts[-1].end - self._parts[0].start > bounds.max_seconds
        ):
            if self._accesses is not None:
                self._num_bytes -= EVENT_BYTES * len(self._accesses)
                self._accesses = None
            part = self._parts.popleft()
            self._num_bytes -= part.num_bytes
            self.num_dropped_steps += len(part.frame.ordinals)
            gone.append(part)
            self._forget(self._parts[0].start)
        for part in gone:
            self._keep_times(part)
        first = self._parts[0].first if self._parts else 0
        for step in [step for step in self._waste if step < first]:
            self._base += self._waste.pop(step)

    def _forget(self, begin: float) -> None:
        for row, kept in list(self._rows.items()):
            finish = kept.now.finish_time
            if finish < begin and kept.last_seen < begin and row not in self._residents:
                self._num_bytes -= kept.num_bytes
                del self._rows[row]
                self.num_dropped_requests += 1

    def _keep_times(self, part: _Part) -> None:
        """A request that is kept has the times of all its tokens, whose steps may be gone."""
        for rows, times in part.frame.token_times:
            for row in rows:
                if (kept := self._rows.get(row)) is not None:
                    kept.early_times.extend(times)

    # ---- files

    def write(self, folder: Path) -> dict[str, Any]:
        """Write the Parquet files; there must be a request.

        Returns:
            What the manifest is to say: `num_requests`, `num_open`, `num_steps`, `has_bound`, `num_not_greedy`, `zero`
            (of the files' times, in seconds on the engine's clock), `wall_time` and `max_lateness`.

        Raises:
            EngineError: the ledger does not add up.
        """
        rows = sorted(self._rows)
        ordinals = np.concatenate([np.empty(0, np.int64), *(part.frame.ordinals for part in self._parts)])
        first = self._parts[0].first if self._parts else 0
        kept = ordinals >= first
        starts = [part.frame.steps["start_time"] for part in self._parts]
        zero = min([self._rows[row].came.arrival_time for row in rows] + [float(one[0]) for one in starts if len(one)])
        steps = self._steps(ordinals, kept, first, zero)
        write_steps(folder / STEPS_FILE, steps)
        reuse = self._reuse(rows)
        self._write_requests(folder / REQUESTS_FILE, rows, zero, reuse)
        if reuse is not None:
            write_reuse(folder / REUSE_FILE, reuse_columns(reuse, [self._rows[row].came.request_id for row in rows]))
        self._write_map(folder / KV_MAP_FILE, rows, set((ordinals[kept] - first).tolist()), first, zero)
        self._write_prefixes(folder / PREFIXES_FILE, rows)
        every = [self._rows[row] for row in rows]
        ends = [one.now.finish_time - zero for one in every if one.now.finish_reason is not None]
        return {
            "num_requests": len(rows),
            "num_open": len(rows) - len(ends),
            "num_steps": int(kept.sum()),
            "has_bound": reuse is not None,
            "num_not_greedy": sum(not one.came.is_greedy for one in every),
            "zero": zero,
            "wall_time": max([0.0, *ends, *steps["end_time"][-1:].tolist()]),
            "max_lateness": max(one.came.submit_time - one.came.arrival_time for one in every),
        }

    def _steps(self, ordinals: np.ndarray, kept: np.ndarray, first: int, zero: float) -> dict[str, np.ndarray]:
        """The columns of steps.parquet."""
        parts = self._parts
        launched = sum(part.num_launched for part in parts)
        delta = np.zeros(launched + 1, dtype=np.int64)
        base = self._base
        for changes in (self._waste, self._still_open):
            for step, slots in changes.items():
                if step < first:
                    base += slots
                else:
                    delta[min(step - first, launched)] += slots
        names = parts[0].frame.ledger.columns if parts else {}
        raw = {name: np.concatenate([part.frame.ledger.columns[name] for part in parts]) for name in names}
        classes = into_classes(raw, base + np.cumsum(delta)[:launched])
        at = ordinals[kept] - first
        columns = {
            name: np.concatenate([part.frame.steps[name] for part in parts])[kept] for name in parts[0].frame.steps
        }
        for name in ("start_time", "launch_time", "launched_time", "end_time"):
            columns[name] = columns[name] - zero
        numbers = {"step": at.astype(np.int32), "replica": np.zeros(len(at), np.int32)}
        return numbers | columns | {name: column[at] for name, column in classes.items()}

    def _reuse(self, rows: list[int]) -> Reuse | None:
        """What came of what was asked of the prefix cache; None where that is not known."""
        if not self._accesses:
            return None
        every = {row: self._rows[row] for row in rows}
        hashes = {row: self._hash(one) if one.hashes is None else one.hashes for row, one in every.items()}
        lengths = {row: len(one.prompt) for row, one in every.items()}
        ids = {row: one.came.request_id for row, one in every.items()}
        loaded = {row: one.now.num_loaded_tokens for row, one in every.items()}
        size, num_blocks = self._bounds.block_size, self._bounds.num_blocks
        return served_reuse(self._accesses, hashes, lengths, ids, loaded, size, num_blocks)

    def _write_requests(self, path: Path, rows: list[int], zero: float, reuse: Reuse | None) -> None:
        times = TokenTimes()
        for part in self._parts:
            for batch, when in part.frame.token_times:
                mine = _places(rows, np.asarray(batch, dtype=np.int64))
                # Under overlap a step may sample for a request that had ended, and is kept no longer.
                times.extend(array("q", mine[mine >= 0].tolist()), when)
        columns = self._request_columns(rows, times.lists(len(rows)), zero)
        if reuse is not None:
            asked = np.isin(rows, [what[1] for what in self._accesses or () if what[0] is Ask])
            columns["num_optimal_cached_tokens"] = np.where(asked, reuse.optimal_tokens, NAN)
        write_request_chunks(path, [columns])

    def _request_columns(self, rows: list[int], times_of: Any, zero: float) -> dict[str, Any]:
        every = [self._rows[row] for row in rows]
        hides = self._bounds.content == "hashes"
        came, now = [one.came for one in every], [one.now for one in every]
        key = self._bounds.key
        times = [np.concatenate([one.early_times, times_of(i)])[: one.num_output] - zero for i, one in enumerate(every)]
        ends = np.array([one.finish_time for one in now]) - zero
        outputs = [np.concatenate([np.empty(0, np.int32), *one.outputs]) for one in every]
        counts = np.array([one.num_output for one in every], dtype=np.int32)
        return {
            "request_id": [one.request_id for one in came],
            "client_id": [hidden_name(key, one.client_id) if hides else one.client_id for one in came],
            "prompt_token_ids": [None if hides else one.prompt for one in every],
            "output_token_ids": [None if hides else tokens for tokens in outputs],
            "token_times": times,
            "num_prompt_tokens": [len(one.prompt) for one in every],
            "num_output_tokens": counts,
            "max_tokens": [one.max_tokens for one in came],
            "num_first_tokens": np.minimum(counts, 1),
            "priority": [one.priority for one in came],
            "arrival_time": np.array([one.arrival_time for one in came]) - zero,
            "submit_time": np.array([one.submit_time for one in came]) - zero,
            "admission_time": np.array([one.admission_time for one in now]) - zero,
            "first_token_time": np.array([one.first_token_time for one in now]) - zero,
            "finish_time": ends,
            "last_token_time": np.array([one[-1] if len(one) else NAN for one in times]),
            "finish_reason": [one.finish_reason or "abort" for one in now],
            "num_cached_tokens": [one.num_cached_tokens for one in now],
            "num_loaded_tokens": [one.num_loaded_tokens for one in now],
            "num_preemptions": [one.num_preemptions for one in now],
            "num_recomputed_tokens": [one.num_recomputed_tokens for one in now],
            "error": ["open when this was written" if one.finish_reason is None else one.error for one in now],
        }

    def _write_map(self, path: Path, rows: list[int], steps: set[int], first: int, zero: float) -> None:
        """At most as many snapshots as a run has, even over those that there are."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        taken = [one for part in self._parts for one in part.frame.snapshots if one["step"] - first in steps]
        chosen = np.unique(np.linspace(0, len(taken) - 1, min(len(taken), MAX_SNAPSHOTS)).round().astype(int))
        shown = []
        for one in (taken[at] for at in chosen):
            owner = one["owner"].copy()
            mine = owner >= 0
            owner[mine] = _places(rows, owner[mine])
            shown.append(one | {"step": one["step"] - first, "time": one["time"] - zero, "owner": owner})
        schema = schema_of(KV_MAP_FILE)
        columns = {name: [one[name] for one in shown] for name in schema.names}
        pq.write_table(pa.table(columns, schema=schema), path, compression="zstd")

    def _write_prefixes(self, path: Path, rows: list[int]) -> None:
        every = [self._rows[row] for row in rows if self._wants_hashes(self._rows[row])]
        if every:
            hashes = [self._hash(one) if one.hashes is None else one.hashes for one in every]
            write_prefixes(path, [one.came.request_id for one in every], self._bounds.block_size, hashes)


def _places(rows: list[int], some: np.ndarray) -> np.ndarray:
    """Where each of `some` stands among `rows`, which ascend; -1: nowhere."""
    kept = np.asarray(rows, dtype=np.int64)
    at = np.minimum(np.searchsorted(kept, some), len(kept) - 1)
    return np.where(kept[at] == some, at, -1)
