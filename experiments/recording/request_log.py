"""What happened to each request, as columns; a request that has ended is not held any longer.

A million requests take about a hundred MiB without their tokens. With them, the lists of a request are kept.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from kvarena.engine.request import Request
from kvarena.reports.reading.columns import names_of
from kvarena.reports.reading.names import REQUESTS_FILE

NAN = float("nan")
TokenTimesOf = Callable[[int], np.ndarray]
TIMES = ("arrival_time", "submit_time", "admission_time", "first_token_time", "finish_time")  # seconds; NaN: not yet
COUNTS = (
    "num_prompt_tokens",
    "num_output_tokens",
    "max_tokens",
    "priority",
    "num_cached_tokens",
    "num_loaded_tokens",
    "num_preemptions",
    "num_recomputed_tokens",
)
LISTS = ("prompt_token_ids", "output_token_ids", "token_times")

REQUEST_COLUMNS = names_of(REQUESTS_FILE)


class RequestLog:
    """Columns with one row per request, in order of submission.

    Args:
        tokens: keep prompt and output tokens.

    Attributes:
        rows: the row of every request that may still show up in a step.
        times: the columns TIMES.
        request_ids: by row.
    """

    def __init__(self, tokens: bool) -> None:
        self.tokens = tokens
        self.rows: dict[Request, int] = {}
        self.times: dict[str, array[float]] = {name: array("d") for name in TIMES}
        self._counts: dict[str, array[int]] = {name: array("i") for name in COUNTS}
        self.request_ids: list[str] = []
        self._client_ids: list[str] = []
        self._kinds: list[str] = []
        self._finish_reasons: list[str | None] = []
        self._errors: dict[int, str] = {}
        self._lists: list[tuple[list[int], list[int]]] = []
        self._leaving: list[Request] = []
        # By request id, what the best prefix cache would have found; those that are not there are not known.
        self.optimal_hits: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self.request_ids)

    def add(self, req: Request, now: float) -> None:
        """A new row for `req`, handed over at `now`."""
        self.rows[req] = len(self)
        for name, value in zip(TIMES, (req.arrival_time, now, NAN, NAN, NAN), strict=True):
            self.times[name].append(value)
        for column in self._counts.values():
            column.append(0)
        self.request_ids.append(req.request_id)
        self._client_ids.append(req.client_id)
        self._kinds.append(req.kind)
        self._finish_reasons.append(None)
        if self.tokens:
            self._lists.append((req.prompt_token_ids, req.output_token_ids))

    def admit(self, row: int, when: float) -> None:
        """The first step that computes something of a request began at `when`; later ones change nothing."""
        admitted = self.times["admission_time"]
        if admitted[row] != admitted[row]:  # NaN
            admitted[row] = when

    def first_token(self, row: int, when: float) -> None:
        """Its first token was there at `when`; later ones change nothing."""
        first = self.times["first_token_time"]
        if first[row] != first[row]:
            first[row] = when

    def end(self, req: Request, when: float) -> None:
        """`req` ended at `when`."""
        row = self.rows[req]
        self.times["finish_time"][row] = when
        self._fill(req, row)
        self._leaving.append(req)

    def forget_ended(self, keep: int) -> None:
        """Let go of the requests that ended, but for the last `keep`."""
        gone = len(self._leaving) - keep
        for req in self._leaving[:gone]:
            self.rows.pop(req, None)
        del self._leaving[:gone]

    @property
    def num_leaving(self) -> int:
        """Requests that ended and are still known."""
        return len(self._leaving)

    def _fill(self, req: Request, row: int) -> None:
        """Copy what a request knows of itself."""
        values = (
            req.num_prompt_tokens, len(req.output_token_ids), req.sampling.max_tokens, req.priority,
            req.num_cached_tokens, req.num_loaded_tokens, req.num_preemptions, req.num_recomputed_tokens,
        )  # fmt: skip
        for column, value in zip(self._counts.values(), values, strict=True):
            column[row] = value
        self._finish_reasons[row] = req.finish_reason.value if req.finish_reason else None
        if req.error:
            self._errors[row] = req.error

    def chunks(self, size: int, token_times: TokenTimesOf | None) -> Iterator[dict[str, Any]]:
        """The rows in pieces of `size`, as columns by REQUEST_COLUMNS.

        Args:
            size: rows of a piece.
            token_times: of a row, when its tokens came; the last of them may belong to a token past the request's end,
                which was dropped. None without tokens: the lists are None then.
        """
        for req, row in self.rows.items():
            self._fill(req, row)
        for start in range(0, len(self), size):
            rows = slice(start, start + size)
            columns: dict[str, Any] = {
                "request_id": self.request_ids[rows],
                "client_id": self._client_ids[rows],
                "kind": self._kinds[rows],
                "finish_reason": self._finish_reasons[rows],
                "error": [self._errors.get(row, "") for row in range(start, min(start + size, len(self)))],
            }
            columns |= {name: np.array(column[rows]) for name, column in (self.times | self._counts).items()}
            # Here tokens come one by one, and the last one ends its request.
            columns["num_first_tokens"] = np.minimum(columns["num_output_tokens"], 1)
            optimal = (self.optimal_hits.get(name, NAN) for name in self.request_ids[rows])
            columns["num_optimal_cached_tokens"] = np.fromiter(optimal, dtype=np.float64)
            columns["last_token_time"] = np.where(columns["num_output_tokens"] > 0, columns["finish_time"], NAN)
            if token_times is None:
                columns |= {name: [None] * len(columns["request_id"]) for name in LISTS}
            else:
                prompts, outputs = zip(*self._lists[rows], strict=True)
                times = [token_times(start + i)[: len(output)] for i, output in enumerate(outputs)]
                columns |= dict(zip(LISTS, (prompts, outputs, times), strict=True))
            yield {name: columns[name] for name in REQUEST_COLUMNS}
