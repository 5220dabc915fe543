"""uvicorn's HTTP/1.1 connection with bounds on what a client may send before its request is taken in.

The library keeps headers and trailers, finished or not, until the last one is here, and waits for it as long as the
client likes: without a bound, anybody without a key could fill the memory.
"""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from engine.server.errors import ApiError

MAX_HEAD_BYTES = 128 * 1024


class BoundedConnection(HttpToolsProtocol):
    """One client's connection.

    Args:
        head_timeout: seconds that a request's first line and headers may take.
        options: as for the base class.
    """

    def __init__(self, *, head_timeout: float, **options: Any) -> None:
        super().__init__(**options)
        self._head_timeout = head_timeout
        self._head_timer: asyncio.TimerHandle | None = None
        self._num_pending = 0  # bytes that are neither body nor a finished head

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Give the first request its time."""
        super().connection_made(transport)
        self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock."""
        self._disarm()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take bytes in; refuse a head, a chunk's extension or trailers that do not end."""
        self._num_pending += len(data)
        super().data_received(data)
        if self._num_pending > MAX_HEAD_BYTES and not self.transport.is_closing():
            self._refuse(ApiError(431, "The request's headers are too large.", code="headers_too_large"))

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        super().on_message_begin()
        self._arm()

    def on_headers_complete(self) -> None:
        """The head is here."""
        self._num_pending = 0
        self._disarm()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A part of the body."""
        self._num_pending = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is here."""
        self._num_pending = 0
        super().on_message_complete()

    def _arm(self) -> None:
        self._disarm()
        self._head_timer = self.loop.call_later(self._head_timeout, self._on_timeout)

    def _disarm(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _on_timeout(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._arm()  # an earlier request on this connection is being answered
        elif not self.transport.is_closing():
            self._refuse(ApiError(408, "The request's headers did not arrive in time.", code="request_timeout"))

    def _refuse(self, error: ApiError) -> None:
        body = orjson.dumps(error.body())
        reason = {408: "Request Timeout", 431: "Request Header Fields Too Large"}[error.status]
        head = (
            f"HTTP/1.1 {error.status} {reason}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
            "connection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()
