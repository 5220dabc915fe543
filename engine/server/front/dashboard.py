"""The pages' data: the KV pool's map and what the server does, as server-sent events.

    engine --4 frames a second, while somebody watches--> front: PoolFeed --an event each--> browsers

Everybody who may watch sees the pool, the counts and a row for each request. Names are for fewer: a request's id and
user are shown to who gave the API key that the request was sent with, and on a server without keys to nobody. Others
see that request under a number, and its user under a pseudonym of this process.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import secrets
from collections.abc import AsyncIterator, Sequence
from typing import Any, NamedTuple

import orjson

from kvarena.engine.server.front.engines import Engines
from kvarena.engine.server.shared import metrics
from kvarena.engine.server.shared.ipc import unpack_ids

MAX_WATCHERS = 16
BEAT_SECONDS = 0.5
# The engine's row of a request; `PoolView._row` makes it.
ROW = ("number", "state", "prompt", "output", "computed", "slots", "id", "user", "key")
# A page that sends requests may pick out its own among all: their ids start with a name that nobody can guess.
OWN_PREFIX = re.compile(r"[0-9a-f]{32}")
_LATENCIES = {
    "ttft": "vllm:time_to_first_token_seconds",
    "tpot": "vllm:request_time_per_output_token_seconds",
    "itl": "vllm:inter_token_latency_seconds",
}
_COUNTERS = {
    "steps": "kvarena:steps",
    "failed_steps": "kvarena:failed_steps",
    "generated": "vllm:generation_tokens",
    "prompt": "vllm:prompt_tokens",
    "queries": "vllm:prefix_cache_queries",
    "hits": "vllm:prefix_cache_hits",
    "preemptions": "vllm:num_preemptions",
    "slow_readers": "kvarena:slow_reader_aborts",
}


class Watcher(NamedTuple):
    """Who watches which engine: its API key's position or -1, what its own requests' ids start with, its events."""

    key: int
    own_prefix: str
    engine: int
    queue: asyncio.Queue[bytes]


class PoolFeed:
    """Hands the engines' snapshots to the browsers that watch. An engine makes none while nobody watches it."""

    def __init__(self) -> None:
        self._client: Engines | None = None
        self._rows: Sequence[Sequence[metrics.Row]] = ()
        self._model = ""
        self._watchers: set[Watcher] = set()
        self._salt = secrets.token_bytes(16)
        self.closed = asyncio.Event()  # the server leaves

    def attach(self, client: Engines, rows: metrics.Rows, model: str) -> None:
        """Tell where snapshots and metrics come from, and the model's name."""
        self._client, self._model = client, model
        self._rows = [rows.of_engine(engine) for engine in client.numbers]

    def publish(self, engine: int, snapshot: dict[str, Any]) -> None:
        """A snapshot of an engine arrived. A browser that is behind misses it."""
        assert self._client is not None
        snapshot["cells"] = unpack_ids(snapshot["cells"])
        snapshot["filled"] = list(snapshot["filled"])
        rows = [dict(zip(ROW, row, strict=True)) for row in snapshot.pop("requests")]
        infos = self._client.infos
        snapshot["about"] = {"model": self._model} | infos[engine].about
        snapshot |= self._measured(self._rows[engine]) | {"engine": engine, "num_engines": len(infos)}
        # The large part is made once for all.
        common = orjson.dumps(snapshot)[:-1] + b',"requests":'
        made: dict[tuple[int, str], bytes] = {}
        for watcher in self._watchers:
            if watcher.engine != engine or watcher.queue.full():
                continue
            who = watcher[:2]
            if who not in made:
                shown = orjson.dumps([self._shown(row, *who) for row in rows])
                made[who] = b"data: " + common + shown + b"}\n\n"
            watcher.queue.put_nowait(made[who])

    def _shown(self, row: dict[str, Any], key: int, own_prefix: str) -> dict[str, Any]:
        """A request as this watcher may see it."""
        shown = {name: value for name, value in row.items() if name != "key"}
        shown["mine"] = bool(own_prefix) and row["id"].startswith(own_prefix + "-")
        if not (shown["mine"] or row["key"] == key >= 0):
            shown["id"] = ""
            shown["user"] = self._pseudonym(row["user"])
        return shown

    def _pseudonym(self, user: str) -> str:
        """The same for the same user while this process lives; tells nothing of the name."""
        if not user:
            return ""
        return "user " + hashlib.blake2b(user.encode(), key=self._salt, digest_size=2).hexdigest()

    def _measured(self, rows: Sequence[metrics.Row]) -> dict[str, Any]:
        """Counters since the start: who watches takes differences."""
        counters = {name: metrics.total(rows, metric) for name, metric in _COUNTERS.items()}
        ended = {reason: metrics.total(rows, "vllm:request_success", reason) for reason in metrics.FINISH_REASONS}
        counters["finished"] = ended["stop"] + ended["length"]
        counters["failed"] = ended["error"] + ended["repetition"]
        counters["aborted"] = ended["abort"]
        counters["refused"] = metrics.family_total(rows, "vllm:admission_rejections")
        for status in ("4xx", "5xx"):
            counters["http_" + status] = metrics.family_total(rows, "http_requests", status=status)
        latency = {name: metrics.histogram(rows, metric) for name, metric in _LATENCIES.items()}
        return {"counters": counters, "latency": latency}

    @property
    def num_engines(self) -> int:
        """Engines that can be watched."""
        return len(self._rows)

    @property
    def num_watchers(self) -> int:
        """Browsers that watch."""
        return len(self._watchers)

    async def events(self, key: int, own_prefix: str, engine: int = 0) -> AsyncIterator[bytes]:
        """Snapshots until the server leaves, and a sign of life where there are none; the arguments as of `Watcher`."""
        watcher = Watcher(key, own_prefix, engine, asyncio.Queue(2))
        self._watchers.add(watcher)
        if self._client is not None and self._num_watching(engine) == 1:
            self._client.watch(engine, True)
        try:
            while not self.closed.is_set():
                try:
                    yield await asyncio.wait_for(watcher.queue.get(), BEAT_SECONDS)
                except TimeoutError:
                    yield b": alive\n\n"
        finally:
            self._watchers.discard(watcher)
            if self._client is not None and not self._num_watching(engine):
                self._client.watch(engine, False)

    def _num_watching(self, engine: int) -> int:
        return sum(watcher.engine == engine for watcher in self._watchers)
