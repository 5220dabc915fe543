"""`/dashboard`: the KV pool's map, live. One static page; its data comes as server-sent events."""

from __future__ import annotations

import asyncio
from importlib.resources import files
from typing import Any

import orjson
from fastapi import FastAPI, Request
from starlette.responses import HTMLResponse, Response
from starlette.types import Receive, Scope, Send

from engine.server.client import EngineClient
from engine.server.ipc import unpack_ids

MAX_WATCHERS = 16


class PoolFeed:
    """Hands the engine's snapshots to the browsers that watch. The engine makes none while nobody does."""

    def __init__(self) -> None:
        self._client: EngineClient | None = None
        self._watchers: set[asyncio.Queue[bytes]] = set()
        self.closed = asyncio.Event()  # the server leaves

    def attach(self, client: EngineClient) -> None:
        """Tell where snapshots come from."""
        self._client = client

    def publish(self, snapshot: dict[str, Any]) -> None:
        """A snapshot arrived. A browser that is behind misses it."""
        snapshot["cells"] = unpack_ids(snapshot["cells"])
        event = b"data: " + orjson.dumps(snapshot) + b"\n\n"
        for queue in self._watchers:
            if not queue.full():
                queue.put_nowait(event)

    @property
    def num_watchers(self) -> int:
        """Browsers that watch."""
        return len(self._watchers)

    def enter(self) -> asyncio.Queue[bytes]:
        """A new watcher."""
        queue: asyncio.Queue[bytes] = asyncio.Queue(2)
        self._watchers.add(queue)
        if self._client is not None and len(self._watchers) == 1:
            self._client.watch(True)
        return queue

    def leave(self, queue: asyncio.Queue[bytes]) -> None:
        """A watcher has gone."""
        self._watchers.discard(queue)
        if self._client is not None and not self._watchers:
            self._client.watch(False)


class _FeedResponse(Response):
    """Streams snapshots until the browser leaves."""

    media_type = "text/event-stream"

    def __init__(self, feed: PoolFeed) -> None:
        super().__init__(headers={"cache-control": "no-cache"})
        self._feed = feed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        headers = [(key, value) for key, value in self.raw_headers if key != b"content-length"]
        queue = self._feed.enter()
        ends = (asyncio.create_task(_disconnected(receive)), asyncio.create_task(self._feed.closed.wait()))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            while True:
                event = asyncio.create_task(queue.get())
                await asyncio.wait((event, *ends), return_when=asyncio.FIRST_COMPLETED)
                if any(end.done() for end in ends):
                    event.cancel()
                    break
                await send({"type": "http.response.body", "body": event.result(), "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            for end in ends:
                end.cancel()
            self._feed.leave(queue)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def add_dashboard(app: FastAPI, feed: PoolFeed) -> None:
    """Add the page and its events."""
    page = files("engine.server").joinpath("static/dashboard.html").read_text()

    @app.get("/dashboard", include_in_schema=False)
    async def dashboard() -> Response:
        return HTMLResponse(page)

    @app.get("/dashboard/events", include_in_schema=False)
    async def events(_: Request) -> Response:
        if feed.num_watchers >= MAX_WATCHERS:
            return Response(status_code=503)
        return _FeedResponse(feed)
