"""Steps and requests as a Chrome trace (Trace Event Format), for chrome://tracing or ui.perfetto.dev.

Process 1 holds the engine: planning and running of each step, and counters of the KV ledger and the queue. Process 2
holds the requests, one track each, by phase.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from kvarena.engine.classes import CLASSES
from kvarena.reports.drawing.timeline import request_phases
from kvarena.reports.reading.files import RunFiles
from kvarena.reports.reading.writing import replacing

ENGINE, REQUESTS = 1, 2
MICROSECONDS = 1e6
STEP_ARGS = ("num_running", "num_waiting", "num_scheduled", "num_prefill_tokens", "num_decode_tokens", "num_preempted")


def write_chrome_trace(run: RunFiles, path: Path) -> None:
    """Write the trace, one event a line, without holding it in memory.

    Raises:
        NotWritten: the file cannot be written.
    """
    with replacing(path) as partial, partial.open("w", encoding="utf-8") as file:
        file.write('{"displayTimeUnit": "ms", "traceEvents": [')
        separator = "\n"
        for event in trace_events(run):
            file.write(separator + json.dumps(event, separators=(",", ":")))
            separator = ",\n"
        file.write("\n]}\n")


def trace_events(run: RunFiles) -> Iterator[dict[str, Any]]:
    """Every event of the trace."""
    yield _name("process_name", REQUESTS, 0, "requests")
    for number in range(run.num_replicas):
        who = "engine" if run.num_replicas == 1 else f"replica {number}"
        yield _name("process_name", _engine(number), 0, f"{who}: {run.manifest['name']}")
        yield _name("thread_name", _engine(number), 1, "plan")
        yield _name("thread_name", _engine(number), 2, "run")
    yield from _steps(run)
    rows = np.argsort(run.requests["arrival_time"], kind="stable")
    for track, row in enumerate(rows, start=1):
        yield _name("thread_name", REQUESTS, track, str(run.requests["request_id"][row]))
    tracks = {int(row): track for track, row in enumerate(rows, start=1)}
    for name, start, end, row in request_phases(run, rows):
        yield _span(name, REQUESTS, tracks[row], start, end, {})


def _engine(replica: int) -> int:
    """The process of a replica; the requests are between the first and the others."""
    return ENGINE if not replica else REQUESTS + replica


def _steps(run: RunFiles) -> Iterator[dict[str, Any]]:
    steps = {name: column.tolist() for name, column in run.steps.items()}
    for index in range(run.num_steps):
        start, launch, end = (steps[name][index] for name in ("start_time", "launch_time", "end_time"))
        arguments = {name: steps[name][index] for name in STEP_ARGS}
        engine = _engine(steps["replica"][index])
        yield _span("plan", engine, 1, start, launch, {})
        yield _span(f"step {steps['step'][index]}", engine, 2, launch, end, arguments)
        ledger = {name: steps[name][index] for name in CLASSES}
        yield {"name": "KV slots", "ph": "C", "pid": engine, "ts": start * MICROSECONDS, "args": ledger}
        queue = {"running": steps["num_running"][index], "waiting": steps["num_waiting"][index]}
        yield {"name": "requests", "ph": "C", "pid": engine, "ts": start * MICROSECONDS, "args": queue}


def _span(name: str, process: int, track: int, start: float, end: float, arguments: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "ph": "X",
        "pid": process,
        "tid": track,
        "ts": start * MICROSECONDS,
        "dur": (end - start) * MICROSECONDS,
        "args": arguments,
    }


def _name(kind: str, process: int, track: int, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": process, "tid": track, "args": {"name": name}}
