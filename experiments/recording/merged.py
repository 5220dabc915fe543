r"""What several replicas recorded, as one run: the files of a run of one engine, and which replica each row is of.

replica 0: Recording  \      requests.parquet   in the order of arrival
replica 1: Recording  - } -> steps.parquet      by start, with the column `replica`
RoutingLog            /      routing.parquet    a row a request: its replica, and when it was sent there
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np

from kvarena.engine.ledger import MemoryLedger
from kvarena.experiments.recording.record import RunRecorder, write_request_columns, write_steps
from kvarena.experiments.recording.recording import Recording
from kvarena.experiments.recording.reuse_file import write_reuse
from kvarena.reports.reading.columns import schema_of
from kvarena.reports.reading.names import REQUESTS_FILE, REUSE_FILE, ROUTING_FILE, STEPS_FILE


class Routes(Protocol):
    """Which replica each request was sent to, and when, in the order of their arrival."""

    @property
    def replicas(self) -> Sequence[int]: ...  # noqa: D102

    @property
    def times(self) -> Sequence[float]: ...  # noqa: D102


class MergedRecording:
    """The recordings of all replicas of a run. A driver's recorder for progress; the replicas' own take the steps in.

    Args:
        recordings: one a replica, all of one level.
    """

    def __init__(self, recordings: Sequence[Recording]) -> None:
        self.recordings = recordings

    def __enter__(self) -> Self:
        for one in self.recordings:
            one.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for one in self.recordings:
            one.__exit__(kind, error, at)

    @property
    def num_finished(self) -> int:
        """Requests that ended, for whatever reason."""
        return sum(one.num_finished for one in self.recordings)

    @property
    def num_output_tokens(self) -> int:
        """Tokens sampled; under `none` of the requests that ended."""
        return sum(one.num_output_tokens for one in self.recordings)

    @property
    def wall_time(self) -> float:
        """End of the last step, in seconds since the run's start."""
        return max(one.wall_time for one in self.recordings)

    def step_columns(self) -> dict[str, np.ndarray] | None:
        """The steps of all as columns, without the ledger, by replica; None where they were not recorded."""
        found = [one.step_columns() for one in self.recordings]
        known = [columns for columns in found if columns is not None]
        return {name: np.concatenate([one[name] for one in known]) for name in known[0]} if known else None

    def interrupt(self, by: str, num_requests: int) -> dict[str, Any]:
        """The run ended before its requests had; see `Recording.interrupt`."""
        came = [one.interrupt(by, num_requests) for one in self.recordings]
        counts = {key: sum(one[key] for one in came) for key in ("num_submitted", "num_ended")}
        return {"by": by, "num_requests": num_requests} | counts

    def facts(self) -> dict[str, Any]:
        """What the manifest's section `run` says of it: times of the whole, sums over the replicas."""
        each = [one.facts() for one in self.recordings]
        first = each[0]
        seconds = sum(one["recording"]["seconds"] for one in each)
        shares = {key: sum(one["recording"][key] for one in each) / len(each)
                  for key in ("share", "delaying_share") if key in first["recording"]}  # fmt: skip
        facts = first | {
            "wall_time": self.wall_time,
            "num_steps": sum(one["num_steps"] for one in each),
            "max_lateness": max(one["max_lateness"] for one in each),
            "recording": {"seconds": seconds} | shares,
        }
        if "totals" in first:
            totals = [one["totals"] for one in each]
            facts["totals"] = {key: sum(one[key] for one in totals) for key in totals[0]}
            facts["totals"]["duration"] = max(one["duration"] for one in totals)
        return facts

    def writer(self, routes: Routes) -> Callable[[Path], None]:
        """What writes the Parquet files into a folder; none under `none`. It may be called for several folders."""
        ledgers: list[tuple[RunRecorder, MemoryLedger]] = [
            rows for one in self.recordings if (rows := one.rows) is not None
        ]
        settled: list[dict[str, np.ndarray]] = []

        def write(run_dir: Path) -> None:
            if not ledgers:
                return
            if not settled:  # the books close once
                settled.extend(ledger.settle() for _, ledger in ledgers)
            recorders = [recorder for recorder, _ in ledgers]
            _write_requests(run_dir, recorders, routes)
            columns = []
            for number, (recorder, ledger) in enumerate(zip(recorders, settled, strict=True)):
                kept = {name: column[: recorder.num_steps] for name, column in ledger.items()}
                replica = np.full(recorder.num_steps, number, dtype=np.int32)
                columns.append(recorder.step_columns() | kept | {"replica": replica})
            merged = {name: np.concatenate([one[name] for one in columns]) for name in columns[0]}
            order = np.lexsort((merged["replica"], merged["start_time"]))
            write_steps(run_dir / STEPS_FILE, {name: column[order] for name, column in merged.items()})

        return write


def _write_requests(run_dir: Path, recorders: Sequence[RunRecorder], routes: Routes) -> None:
    """requests.parquet in the order of arrival, with routing.parquet and reuse.parquet beside it.

    A replica records its requests in the order in which they were sent to it; of a run that was interrupted those that
    were still on their way are in neither file.
    """
    replicas, times = np.array(routes.replicas, dtype=np.int32), np.array(routes.times, dtype=np.float64)
    places = [np.flatnonzero(replicas == number)[: one.num_submitted] for number, one in enumerate(recorders)]
    order = np.argsort(np.concatenate(places), kind="stable")
    _write_reuse(run_dir, recorders, order)
    write_request_columns(run_dir / REQUESTS_FILE, [one.request_columns() for one in recorders], order)
    kept = np.sort(np.concatenate(places))
    write_routing(run_dir / ROUTING_FILE, replicas[kept], times[kept])


def _write_reuse(run_dir: Path, recorders: Sequence[RunRecorder], order: np.ndarray) -> None:
    """What was asked of the replicas' prefix caches, which all have one, or none has.

    Args:
        run_dir: where to.
        recorders: of the replicas.
        order: of the rows of requests.parquet among those of all recorders, one behind the other.
    """
    parts = [columns for one in recorders if (columns := one.reuse_columns()) is not None]
    if len(parts) < len(recorders):
        return
    row_of = np.argsort(order)
    first = np.cumsum([0, *(one.num_submitted for one in recorders)])
    for columns, begin in zip(parts, first, strict=False):
        columns["request"] = row_of[columns["request"] + begin].astype(np.int32)
    write_reuse(run_dir / REUSE_FILE, {name: np.concatenate([one[name] for one in parts]) for name in parts[0]})


def write_routing(path: Path, replicas: np.ndarray, times: np.ndarray) -> None:
    """Write routing.parquet: a row a request."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"replica": replicas, "time": times}, schema_of(ROUTING_FILE)), path)
