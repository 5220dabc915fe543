"""Measurements of a run: what happened to each request and in each step, as Parquet. Schema: docs/files.md."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.core import StepOutput
from engine.ledger import MemoryLedger
from engine.plan import CopyKind
from engine.request import FinishReason, Request
from engine.runner.step_time import step_features
from experiments.decisions import decision_hash

if TYPE_CHECKING:
    import pyarrow as pa

STEP_TIMES = ("start_time", "launch_time", "end_time", "copy_time")
STEP_COUNTS = (
    "num_running",
    "num_waiting",
    "num_scheduled",
    "num_new_tokens",
    "num_prefill_tokens",
    "num_decode_tokens",
    "num_sampled",
    "num_preempted",
    "num_recomputed_tokens",
    "num_copies",
    "num_swapped_out",
    "num_swapped_in",
    "num_prefill_requests",
)
STEP_SUMS = ("num_kv_tokens", "num_attention_pairs", "decision_hash")  # 64 bits wide

REQUEST_COLUMNS = {
    "request_id": "string",
    "client_id": "string",
    "prompt_token_ids": "list<int32>",
    "output_token_ids": "list<int32>",
    "num_prompt_tokens": "int32",
    "num_output_tokens": "int32",
    "max_tokens": "int32",
    "priority": "int32",
    "arrival_time": "double",
    "submit_time": "double",
    "admission_time": "double",
    "first_token_time": "double",
    "finish_time": "double",
    "token_times": "list<double>",
    "finish_reason": "string",
    "num_cached_tokens": "int32",
    "num_preemptions": "int32",
    "num_recomputed_tokens": "int32",
    "error": "string",
}


@dataclass(slots=True)
class _RequestTimes:
    """When things happened to one request; NaN until they do."""

    req: Request
    submit_time: float
    admission_time: float = float("nan")
    finish_time: float = float("nan")
    num_recomputed_tokens: int = 0
    token_times: array[float] = field(default_factory=lambda: array("d"))


class RunRecorder:
    """Collects the times of every request and the counts of every step."""

    def __init__(self) -> None:
        self._requests: dict[Request, _RequestTimes] = {}
        self._rows: dict[Request, int] = {}  # in order of submission
        self._steps: dict[str, array[Any]] = {name: array("d") for name in STEP_TIMES} | {
            name: array("q") for name in (*STEP_COUNTS, *STEP_SUMS)
        }
        self.num_finished = 0
        self.num_output_tokens = 0
        self.max_lateness = 0.0

    def on_submit(self, req: Request, now: float) -> None:
        """`req` was handed to the engine at `now`."""
        self._rows[req] = len(self._rows)
        self._requests[req] = _RequestTimes(req, now)
        self.max_lateness = max(self.max_lateness, now - req.arrival_time)

    def on_rejected(self, req: Request, now: float, error: str) -> None:
        """The engine refused `req`, which was handed over at `now`."""
        req.error = error
        req.finish_reason = FinishReason.REJECTED
        self._end(req, now)

    def on_step(self, step: StepOutput) -> None:
        """Take one finished step in."""
        prefill = decode = recomputed = 0
        for (req, start, num_new_tokens), sampled in zip(step.plan.scheduled, step.plan.samples, strict=True):
            times = self._requests[req]
            if times.admission_time != times.admission_time:  # NaN: its first step
                times.admission_time = step.start_time
            # A token sampled past a stop token (overlap) or after an abort was dropped.
            if sampled and len(times.token_times) < len(req.output_token_ids):
                times.token_times.append(step.end_time)
            if req.num_recomputed_tokens != times.num_recomputed_tokens:
                recomputed += req.num_recomputed_tokens - times.num_recomputed_tokens
                times.num_recomputed_tokens = req.num_recomputed_tokens
            # A decode computes only the newest output token; everything else is prompt, or recomputed.
            if num_new_tokens == 1 and start >= req.num_prompt_tokens:
                decode += 1
            else:
                prefill += num_new_tokens
        for req in step.finished:
            self._end(req, step.end_time)
        for req in step.plan.rejected:
            self._end(req, step.start_time)
        num_sampled = sum(step.plan.samples)
        self.num_output_tokens += num_sampled
        plan = step.plan
        features = step_features(plan)
        counts = (
            step.num_running,
            step.num_waiting,
            len(plan.scheduled),
            prefill + decode,
            prefill,
            decode,
            num_sampled,
            len(plan.preempted),
            recomputed,
            len(plan.copies),
            sum(copy.kind is CopyKind.SWAP_OUT for copy in plan.copies),
            sum(copy.kind is CopyKind.SWAP_IN for copy in plan.copies),
            features.num_prefill_requests,
        )
        sums = (features.num_kv_tokens, features.num_attention_pairs, decision_hash(step, self._rows.__getitem__))
        times_of_step = (step.start_time, step.launch_time, step.end_time, step.result.copy_time)
        for name, when in zip(STEP_TIMES, times_of_step, strict=True):
            self._steps[name].append(when)
        for name, value in zip((*STEP_COUNTS, *STEP_SUMS), (*counts, *sums), strict=True):
            self._steps[name].append(value)

    def _end(self, req: Request, when: float) -> None:
        times = self._requests[req]
        times.finish_time = when
        self.num_finished += 1

    @property
    def num_steps(self) -> int:
        """Steps recorded."""
        return len(self._steps["start_time"])

    @property
    def wall_time(self) -> float:
        """End of the last step, in seconds since the run's start."""
        return self._steps["end_time"][-1] if self.num_steps else 0.0

    def request_rows(self) -> list[dict[str, Any]]:
        """One row per request, by REQUEST_COLUMNS, in order of submission."""
        return [_request_row(times) for times in self._requests.values()]

    def write_requests(self, path: Path) -> None:
        """Write requests.parquet."""
        write_requests(path, self.request_rows())

    def step_columns(self) -> dict[str, np.ndarray]:
        """The steps as columns, without the ledger."""
        columns: dict[str, np.ndarray] = {"step": np.arange(self.num_steps, dtype=np.int32)}
        columns |= {name: np.array(self._steps[name], dtype=np.float64) for name in STEP_TIMES}
        columns |= {name: np.array(self._steps[name], dtype=np.int32) for name in STEP_COUNTS}
        return columns | {name: np.array(self._steps[name], dtype=np.int64) for name in STEP_SUMS}

    def write_steps(self, path: Path, ledger: MemoryLedger) -> None:
        """Write steps.parquet: the steps and, beside them, the settled ledger."""
        write_steps(path, self.step_columns() | ledger.settle())


def write_requests(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write requests.parquet from rows by REQUEST_COLUMNS."""
    # Here and below imported late: a machine that only measures need not have pyarrow.
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([(name, _arrow_type(kind)) for name, kind in REQUEST_COLUMNS.items()])
    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows], schema=schema), path)


def write_steps(path: Path, columns: Mapping[str, np.ndarray]) -> None:
    """Write steps.parquet from columns of one length."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(dict(columns)), path)


def _arrow_type(kind: str) -> pa.DataType:
    import pyarrow as pa

    if kind.startswith("list<"):
        return pa.list_(_arrow_type(kind[5:-1]))
    return pa.float64() if kind == "double" else pa.type_for_alias(kind)


def _or_none(value: float) -> float | None:
    return None if value != value else value


def _request_row(times: _RequestTimes) -> dict[str, Any]:
    req = times.req
    return {
        "request_id": req.request_id,
        "client_id": req.client_id,
        "prompt_token_ids": req.prompt_token_ids,
        "output_token_ids": req.output_token_ids,
        "num_prompt_tokens": req.num_prompt_tokens,
        "num_output_tokens": len(req.output_token_ids),
        "max_tokens": req.sampling.max_tokens,
        "priority": req.priority,
        "arrival_time": req.arrival_time,
        "submit_time": times.submit_time,
        "admission_time": _or_none(times.admission_time),
        "first_token_time": times.token_times[0] if times.token_times else None,
        "finish_time": _or_none(times.finish_time),
        "token_times": times.token_times.tolist(),
        "finish_reason": req.finish_reason.value if req.finish_reason else None,
        "num_cached_tokens": req.num_cached_tokens,
        "num_preemptions": req.num_preemptions,
        "num_recomputed_tokens": req.num_recomputed_tokens,
        "error": req.error,
    }
