"""Drives a server over HTTP: each request is sent when it is due, whatever the server does with those before.

One event loop sends and reads. What it cannot keep up with shows as lateness (`submit_time` - `arrival_time`), and a
run that was later than `driver.max_lateness` is marked invalid, as in this process.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable
from typing import Any

from kvarena.engine.request import Request
from kvarena.experiments.load.driver import ClosedLoop
from kvarena.experiments.load.http_client import Answer, HttpServer
from kvarena.experiments.recording.interruption import Signals
from kvarena.experiments.recording.request_log import LISTS, REQUEST_COLUMNS

LOOK = 0.05  # seconds between looks for a signal
INTERRUPTED = "the run was interrupted"
FINISH_REASONS = ("stop", "length", "abort")
# In how many whole answers the count of tokens (usage) and the chunks differ (manifest, target.token_counts).
TOKEN_COUNTS = ("not_stated", "other_than_shown", "merged")


class HttpDriver:
    """Sends requests and keeps one row each (docs/files.md).

    Args:
        server: where they go.
        tokens: keep token ids and the time of each chunk.
        on_progress: called with the number of ended requests.
    """

    def __init__(self, server: HttpServer, tokens: bool, on_progress: Callable[[int], None]) -> None:
        self._server, self._tokens, self._on_progress = server, tokens, on_progress
        self._origin = 0.0
        self.rows: list[dict[str, Any]] = []
        self.max_lateness = 0.0
        self.wall_time = 0.0
        self.num_other_prompt_lens = 0
        self.token_counts = dict.fromkeys(TOKEN_COUNTS, 0)
        self.num_ended = 0

    async def run(
        self, requests: Iterable[Request], closed_loop: ClosedLoop | None, signals: Signals | None = None
    ) -> None:
        """Send `requests` at their arrival times, or those of `closed_loop`, and wait for every answer.

        A signal, of which `signals` are told, ends that: answers that are not whole are rows with what had come.
        """
        load = asyncio.create_task(self._load(requests, closed_loop))
        while not load.done() and not (signals is not None and signals.came):
            await asyncio.wait([load], timeout=None if signals is None else LOOK)
        load.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await load

    async def _load(self, requests: Iterable[Request], closed_loop: ClosedLoop | None) -> None:
        self._origin = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            if closed_loop is not None:
                for req in closed_loop.first:
                    group.create_task(self._user(req, closed_loop))
                return
            for req in requests:
                await self._until(req.arrival_time)
                group.create_task(self._send(req))

    async def _until(self, when: float) -> None:
        while (delay := self._origin + when - time.perf_counter()) > 0:  # uvloop may wake half a millisecond early
            await asyncio.sleep(delay)

    async def _user(self, req: Request | None, closed_loop: ClosedLoop) -> None:
        while req is not None:
            await self._until(req.arrival_time)
            await self._send(req)
            req = closed_loop.on_end(time.perf_counter() - self._origin)

    async def _send(self, req: Request) -> None:
        submit = time.perf_counter() - self._origin
        row: dict[str, Any] = dict.fromkeys(REQUEST_COLUMNS)
        self.rows.append(row)
        answer = Answer()
        try:
            await self._server.complete(req.prompt_token_ids, req.sampling, answer)
        except asyncio.CancelledError:
            answer.error, answer.end = INTERRUPTED, time.perf_counter()
            row |= self._row(req, submit, answer) | {"finish_reason": "abort"}
            self.wall_time = max(self.wall_time, float(row["finish_time"]))
            raise
        row |= self._row(req, submit, answer)
        self.max_lateness = max(self.max_lateness, submit - req.arrival_time)
        self.wall_time = max(self.wall_time, float(row["finish_time"]))
        if not answer.error:
            self.token_counts["not_stated"] += answer.counted is None
            self.token_counts["other_than_shown"] += answer.num_tokens != answer.num_shown
            self.token_counts["merged"] += answer.has_merged_chunks
        counted = answer.usage.get("prompt_tokens")
        self.num_other_prompt_lens += counted is not None and counted != req.num_prompt_tokens
        self.num_ended += 1
        self._on_progress(self.num_ended)

    def _row(self, req: Request, submit: float, answer: Answer) -> dict[str, Any]:
        last = answer.last_token_time
        times = [when - self._origin for when in answer.chunk_times]
        row = {
            "request_id": req.request_id,
            "client_id": req.client_id,
            "kind": req.kind,
            "prompt_token_ids": req.prompt_token_ids,
            "output_token_ids": answer.token_ids,
            "num_prompt_tokens": req.num_prompt_tokens,
            "num_output_tokens": answer.num_tokens,
            "num_first_tokens": answer.num_first_tokens,
            "max_tokens": req.sampling.max_tokens,
            "arrival_time": req.arrival_time,
            "submit_time": submit,
            "first_token_time": times[0] if times else None,
            "last_token_time": None if last is None else last - self._origin,
            "finish_time": answer.end - self._origin,
            "token_times": times,
            "finish_reason": _finish_reason(answer),
            "priority": req.priority,
            "num_loaded_tokens": 0,  # a server does not say it
            "num_optimal_cached_tokens": None,
            "num_cached_tokens": answer.usage.get("cached_tokens", 0),
            "num_preemptions": 0,
            "num_recomputed_tokens": 0,
            "error": answer.error,
        }
        return row if self._tokens else row | dict.fromkeys(LISTS)


def _finish_reason(answer: Answer) -> str:
    if answer.error:
        return "rejected" if answer.refused else "error"
    return answer.finish_reason if answer.finish_reason in FINISH_REASONS else "stop"
