"""Measurements of a run: what happened to each request and in each step, as Parquet. Schema: docs/files.md."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np

from kvarena.engine.classes import LEDGER
from kvarena.engine.contract import CopyKind, StepPlan
from kvarena.engine.core import StepOutput
from kvarena.engine.ledger import MemoryLedger
from kvarena.engine.request import FinishReason, Request
from kvarena.experiments.caching.accesses import Reuse
from kvarena.experiments.recording.decisions import decision_hash
from kvarena.experiments.recording.request_log import LISTS, REQUEST_COLUMNS, RequestLog
from kvarena.experiments.recording.reuse_file import reuse_columns
from kvarena.experiments.recording.step_features import step_features
from kvarena.experiments.recording.token_times import TokenTimes
from kvarena.reports.reading.columns import schema_of, types_of
from kvarena.reports.reading.names import REQUESTS_FILE, STEPS_FILE

# The columns of a step that are taken in as it ends, with the codes of their arrays; the ledger settles later.
CODES = {"double": "d", "int32": "i", "int64": "q"}
OTHERS = ("step", "replica", *LEDGER)
STEP_COLUMNS = {name: CODES[kind] for name, kind in types_of(STEPS_FILE).items() if name not in OTHERS}
BOUND = "num_optimal_cached_tokens"
ROWS_AT_ONCE = 16384  # requests of a row group


class RunRecorder:
    """Collects the times of every request and the counts of every step.

    What it does in a step must not show in the step: most steps compute the requests of the step before, and then
    nothing is done request by request in Python.

    Args:
        tokens: keep token ids and the time of every token; False leaves those columns empty, for runs of many requests.
        log: where requests are kept; None: one that keeps all.
    """

    def __init__(self, tokens: bool = True, log: RequestLog | None = None) -> None:
        self._log = RequestLog(tokens) if log is None else log
        self._token_times = TokenTimes() if tokens else None
        self._steps: dict[str, array[Any]] = {name: array(code) for name, code in STEP_COLUMNS.items()}
        self._columns = list(self._steps.values())
        self._num_recomputed: dict[Request, int] = {}  # of requests that computed something again
        # The last step's requests with their rows, and numbers of new tokens: the next step's are mostly the same.
        self._requests: tuple[Request, ...] = ()
        self._rows: array[int] = array("q")
        self._new: tuple[int, ...] = ()
        self._counts: array[int] = array("q")
        self._reuse: Reuse | None = None
        self.num_finished = 0
        self.num_output_tokens = 0
        self.max_lateness = 0.0

    def on_submit(self, req: Request, now: float) -> None:
        """`req` was handed to the engine at `now`."""
        self._log.add(req, now)
        self.max_lateness = max(self.max_lateness, now - req.arrival_time)

    def on_rejected(self, req: Request, now: float, error: str) -> None:
        """The engine refused `req`, which was handed over at `now`."""
        req.error = error
        req.finish_reason = FinishReason.REJECTED
        self._end(req, now)

    def on_step(self, step: StepOutput) -> None:
        """Take one finished step in."""
        plan, log, row_of = step.plan, self._log, self._log.rows.__getitem__
        requests, starts, new = zip(*plan.scheduled, strict=True) if plan.scheduled else ((), (), ())
        # Tuples of the same objects compare without a look into them.
        if requests != self._requests:
            self._requests, self._rows = requests, array("q", list(map(row_of, requests)))
        if new != self._new:
            self._new, self._counts = new, array("q", new)
        num_sampled = plan.samples.count(True)
        if num_sampled and self._token_times is not None:
            all_sample = num_sampled == len(requests)
            rows = self._rows if all_sample else array("q", compress(self._rows, plan.samples))
            self._token_times.add(rows, step.end_time)
        num_decodes, recomputed = self._take_others(step)
        num_known = log.num_leaving
        for req in step.finished:
            self._end(req, step.end_time)
        for req in plan.rejected:
            self._end(req, step.start_time)
        self.num_output_tokens += num_sampled
        features = step_features(plan, sum(starts), step.result.num_kv_saved)
        num_swapped_out, num_swapped_in = _num_swapped(plan)
        preempted, rejected = (list(map(row_of, others)) for others in (plan.preempted, plan.rejected))
        values = (
            step.start_time,
            step.launch_time,
            step.launched_time,
            step.end_time,
            step.num_running,
            step.num_waiting,
            len(requests),
            features.num_tokens,
            features.num_tokens - num_decodes,
            num_decodes,
            num_sampled,
            len(preempted),
            recomputed,
            len(plan.copies),
            num_swapped_out,
            num_swapped_in,
            step.result.copy_time,
            features.num_prefill_requests,
            features.longest_prefill,
            features.num_kv_tokens,
            features.num_distinct_kv_tokens,
            features.num_attention_pairs,
            step.result.num_experts_read,
            decision_hash(self._rows, array("q", starts), self._counts, preempted, rejected, step.usage),
        )
        for column, value in zip(self._columns, values, strict=True):
            column.append(value)
        # With overlap a request that ended with this step may be in the next one, and in none after that.
        log.forget_ended(keep=log.num_leaving - num_known)

    def _take_others(self, step: StepOutput) -> tuple[int, int]:
        """The scheduled requests that may be more than a decode; how many tokens of the step were decodes, recomputed.

        A decode computes only the newest output token; everything else is prompt, or recomputed.
        """
        plan, log = step.plan, self._log
        num_decodes, recomputed = plan.num_decodes, 0
        others = zip(plan.scheduled[num_decodes:], plan.samples[num_decodes:], strict=True)
        for (req, start, num_new_tokens), sampled in others:
            row = log.rows[req]
            log.admit(row, step.start_time)
            # A beam's first token may be drawn and not taken, as others' are still to come.
            if sampled and (len(req.output_token_ids) == 1 or req.search is not None):
                log.first_token(row, step.end_time)
            if req.num_recomputed_tokens:
                recomputed += req.num_recomputed_tokens - self._num_recomputed.get(req, 0)
                self._num_recomputed[req] = req.num_recomputed_tokens
            num_decodes += num_new_tokens == 1 and start >= req.num_prompt_tokens
        return num_decodes, recomputed

    def interrupt(self, error: str) -> None:
        """Nothing comes any more: the requests that have not ended are aborted at the end of the last step."""
        for req in [req for req in self._log.rows if req.finish_reason is None]:
            req.error, req.finish_reason = error, FinishReason.ABORT
            self._log.end(req, self.wall_time)

    @property
    def num_submitted(self) -> int:
        """Requests that were handed over."""
        return len(self._log)

    def on_left(self, req: Request) -> None:
        """`req` ended outside of a step, and its log knows."""
        self._num_recomputed.pop(req, None)
        self.num_finished += 1

    def _end(self, req: Request, when: float) -> None:
        self._log.end(req, when)
        self.on_left(req)

    @property
    def num_steps(self) -> int:
        """Steps recorded."""
        return len(self._steps["start_time"])

    @property
    def wall_time(self) -> float:
        """End of the last step, in seconds since the run's start."""
        return self._steps["end_time"][-1] if self.num_steps else 0.0

    def take_steps(self) -> tuple[dict[str, np.ndarray], list[tuple[array[int], array[float]]]]:
        """The steps since the last call as columns, without number and ledger, and their token times by row."""
        columns = {name: np.array(column) for name, column in self._steps.items()}
        for name, code in STEP_COLUMNS.items():
            self._steps[name] = array(code)
        self._columns = list(self._steps.values())
        return columns, [] if self._token_times is None else self._token_times.take()

    def row(self, req: Request) -> int:
        """The row that a request which has not ended will have in requests.parquet."""
        return self._log.rows[req]

    def request_rows(self) -> list[dict[str, Any]]:
        """One row per request, by REQUEST_COLUMNS, in order of submission; times that never came are None."""
        rows = []
        for columns in self._chunks():
            values = [column.tolist() if isinstance(column, np.ndarray) else column for column in columns.values()]
            rows += [dict(zip(columns, row, strict=True)) for row in zip(*values, strict=True)]
        for row in rows:
            row |= {name: None for name, value in row.items() if isinstance(value, float) and value != value}
            row |= {name: [] if row[name] is None else list(row[name]) for name in LISTS}
        return rows

    def set_reuse(self, reuse: Reuse) -> None:
        """What came of what was asked of the prefix cache."""
        self._log.optimal_hits = dict(zip(reuse.request_ids, reuse.optimal_tokens.tolist(), strict=True))
        self._reuse = reuse

    def reuse_columns(self) -> dict[str, np.ndarray] | None:
        """The columns of reuse.parquet; None where nobody knows them."""
        return None if self._reuse is None else reuse_columns(self._reuse, self._log.request_ids)

    def _chunks(self) -> Iterator[dict[str, Any]]:
        times = None if self._token_times is None else self._token_times.lists(len(self._log))
        return self._log.chunks(ROWS_AT_ONCE, times)

    def write_requests(self, path: Path) -> None:
        """Write requests.parquet."""
        write_request_chunks(path, self._chunks())

    def request_columns(self) -> dict[str, Any]:
        """The rows as columns by REQUEST_COLUMNS, all at once."""
        times = None if self._token_times is None else self._token_times.lists(len(self._log))
        return next(self._log.chunks(max(len(self._log), 1), times), {name: [] for name in REQUEST_COLUMNS})

    def step_columns(self) -> dict[str, np.ndarray]:
        """The steps as columns, without the ledger."""
        columns = {"step": np.arange(self.num_steps, dtype=np.int32), "replica": np.zeros(self.num_steps, np.int32)}
        return columns | {name: np.array(column) for name, column in self._steps.items()}

    def write_steps(self, path: Path, ledger: MemoryLedger) -> None:
        """Write steps.parquet: the steps and, beside them, the settled ledger."""
        write_steps(path, self.step_columns() | ledger.settle())


def write_requests(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write requests.parquet from rows by REQUEST_COLUMNS."""
    write_request_chunks(path, [{name: [row[name] for row in rows] for name in REQUEST_COLUMNS}])


def write_request_columns(path: Path, parts: Sequence[Mapping[str, Any]], order: np.ndarray) -> None:
    """Write requests.parquet from the columns of several recorders, in another order.

    Args:
        path: of the file.
        parts: as `RunRecorder.request_columns` gives them.
        order: of the rows of all parts, one part behind the other.
    """
    import pyarrow as pa

    schema = schema_of(REQUESTS_FILE)
    columns = {
        field.name: pa.concat_arrays([pa.array(part[field.name], field.type, from_pandas=True) for part in parts])
        for field in schema
    }
    whole = pa.Table.from_arrays([columns[field.name] for field in schema], schema=schema)
    write_request_chunks(path, [_columns(whole.take(order[start : start + ROWS_AT_ONCE]))
                           for start in range(0, max(len(order), 1), ROWS_AT_ONCE)])  # fmt: skip


def _columns(table: Any) -> dict[str, Any]:
    return {name: table.column(name).combine_chunks() for name in table.column_names}


def write_request_chunks(path: Path, chunks: Iterable[Mapping[str, Any]]) -> None:
    """Write requests.parquet from pieces, each a row group of columns; times that never came are null."""
    # Here and below imported late: a machine that only measures need not have pyarrow.
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = schema_of(REQUESTS_FILE)
    with pq.ParquetWriter(path, schema) as writer:
        for columns in chunks:
            # Who does not know the bound of its hits, or kinds of requests, has no such column.
            num_rows = len(columns["request_id"])
            columns = {BOUND: [None] * num_rows, "kind": [""] * num_rows} | dict(columns)
            arrays = [
                column if isinstance(column := columns[field.name], pa.Array)
                else pa.array(column, field.type, from_pandas=True) for field in schema
            ]  # fmt: skip
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))


def write_steps(path: Path, columns: Mapping[str, np.ndarray]) -> None:
    """Write steps.parquet from columns of one length."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = schema_of(STEPS_FILE)
    there = pa.schema([field for field in schema if field.name in columns], schema.metadata)  # old recordings lack some
    pq.write_table(pa.table(dict(columns), there), path)


def _num_swapped(plan: StepPlan) -> tuple[int, int]:
    """Blocks copied to the host and back."""
    if not plan.copies:
        return 0, 0
    kinds = [copy.kind for copy in plan.copies]
    return kinds.count(CopyKind.SWAP_OUT), kinds.count(CopyKind.SWAP_IN)
