"""Base of the workloads that replay a file: rows in, limits, order, repetition and notes done once."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kvarena.engine.checks import check_bool, check_int
from kvarena.engine.errors import ConfigError, TraceError
from kvarena.experiments.workloads.parts.base import FloatArray, LengthTable, LimitedWorkload
from kvarena.experiments.workloads.parts.reading import trace_path


class TraceRow(NamedTuple):
    """One request of a file.

    Attributes:
        time: in ticks of the format (an exact integer where the file has one), or None.
        prompt_len: in tokens.
        output_len: in tokens.
        client_id: whose request it is.
        hash_ids: identities of the prompt's blocks, where the format has them.
        kind: which kind of request it is.
    """

    time: float | None
    prompt_len: int
    output_len: int
    client_id: str = ""
    hash_ids: tuple[int, ...] = ()
    kind: str = ""


class TraceWorkload(LimitedWorkload):
    """A workload read from a file, row by row, in order of time.

    Rows whose time goes back are sorted into place (stable), and the description says how many there were. Times count
    from the first row that is used.

    Args:
        path: the file.
        num_requests: requests to take from the start; None takes all rows.
        skip: rows to pass over first.
        repeat: when the file has fewer rows than `num_requests`, replay it again after its end (one mean interval
            later), with fresh prompts.
        common: see LimitedWorkload.

    Raises:
        ConfigError: an option out of range, or more requests asked for than there are rows.
        TraceError: a malformed file, from the first use of the workload.
    """

    ticks_per_second: int = 1

    def __init__(
        self,
        *,
        path: str | None,
        num_requests: int | None = None,
        skip: int = 0,
        repeat: bool = False,
        **common: Any,
    ) -> None:
        super().__init__(num_requests=num_requests, **common)
        self.path: Path = trace_path(path)
        self._skip = check_int("workload.skip", skip, 0)
        self._repeat = check_bool("workload.repeat", repeat)
        self._left_out: Counter[str] = Counter()
        self._rows_per_pass = 0

    @property
    def source(self) -> str:  # type: ignore[override]
        """The file's name."""
        return f"file {self.path.name}"

    @abstractmethod
    def _read(self) -> Iterator[TraceRow | str]:
        """The file's rows in file order; a text instead of a row says why that row cannot be used."""

    def _spread(self, times: FloatArray) -> FloatArray:
        """Change the times of one pass; formats with coarse times override it."""
        return times

    def _keep_hashes(self, rows: list[TraceRow]) -> None:
        """Formats with hash ids keep them here."""

    def _build(self) -> LengthTable:
        rows = self._take_rows()
        moved = self._sort(rows)
        self._rows_per_pass = len(rows)
        self._keep_hashes(rows)
        num = self.num_requests or len(rows)
        order = np.arange(num) % len(rows)
        clients, kinds = [row.client_id for row in rows], [row.kind for row in rows]
        notes = [self._limits.note(), f"sorted {moved} rows whose time went back" if moved else ""]
        notes += [f"dropped {count} {why}" for why, count in self._left_out.items()]
        notes += [f"{num / len(rows):.3g} passes over {len(rows)} rows" if num > len(rows) else ""]
        return LengthTable(
            np.array([row.prompt_len for row in rows], dtype=np.int64)[order],
            np.array([row.output_len for row in rows], dtype=np.int64)[order],
            self._times(rows, order),
            [clients[row] for row in order] if any(clients) else None,
            kinds=[kinds[row] for row in order] if any(kinds) else None,
            notes=tuple(note for note in notes if note),
        )

    def _take_rows(self) -> list[TraceRow]:
        """The rows to use in file order, with their final lengths."""
        rows: list[TraceRow] = []
        for index, row in enumerate(self._read()):
            if index < self._skip:
                continue
            if isinstance(row, str):
                self._left_out[row] += 1
                continue
            lens = self._limits.apply(row.prompt_len, row.output_len)
            if lens is not None:
                rows.append(row._replace(prompt_len=lens[0], output_len=lens[1]))
                if len(rows) == self.num_requests:
                    return rows
        if not rows:
            raise TraceError(
                f"{self.path}: no row is left of the {self._limits.num_seen + sum(self._left_out.values())} read after "
                f"workload.skip={self._skip}; check skip and the length limits"
            )
        if self.num_requests is not None and not self._repeat:
            raise ConfigError(
                f"workload.num_requests={self.num_requests}, but {self.path} gives {len(rows)} requests; ask for at "
                f"most {len(rows)}, or set workload.repeat=true"
            )
        return rows

    def _sort(self, rows: list[TraceRow]) -> int:
        """Sort by time; returns how many rows were earlier than one before them."""
        if rows[0].time is None:
            return 0
        times = np.array([row.time for row in rows])
        moved = int((times < np.maximum.accumulate(times)).sum())
        if moved:
            rows.sort(key=lambda row: row.time or 0)
        return moved

    def _times(self, rows: list[TraceRow], order: np.ndarray) -> FloatArray | None:
        first = rows[0].time
        if first is None:
            return None
        ticks = [(row.time or 0) - first for row in rows]
        times = self._spread(np.array(ticks, dtype=np.float64) / self.ticks_per_second)
        interval = times[-1] / (len(rows) - 1) if len(rows) > 1 else 0.0
        passes = np.arange(len(order)) // len(rows)
        return np.asarray(times[order] + passes * (times[-1] + interval))
