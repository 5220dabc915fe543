"""uvicorn's HTTP/1.1 connection with bounds on what a client may send before its request is taken in, and on how long
it may leave an answer unread.

The library keeps headers and trailers, finished or not, until the last one is here, and waits for it as long as the
client likes: without a bound, anybody without a key could fill the memory. An answer that nobody reads is kept as long.
"""

from __future__ import annotations

import asyncio
import logging
from http import HTTPStatus
from typing import Any

import orjson
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from kvarena.engine.server.shared.errors import ApiError

logger = logging.getLogger("kvarena.front")

MAX_HEAD_BYTES = 128 * 1024
MIN_BYTES_PER_SECOND = 256 * 1024


class BoundedConnection(HttpToolsProtocol):
    """One client's connection.

    Args:
        timeout: seconds that a request's first line and headers may take. A client that does not read has as long, be
            it that a stream cannot go on or that a finished answer waits, and a second more for each
            `MIN_BYTES_PER_SECOND` of a finished one.
        options: as for the base class.
    """

    def __init__(self, *, timeout: float, **options: Any) -> None:
        super().__init__(**options)
        self._timeout = timeout
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._num_pending = 0  # bytes that are neither body nor a finished head

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Give the first request its time."""
        super().connection_made(transport)
        self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clocks."""
        self._disarm()
        self._disarm_write()
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

    def pause_writing(self) -> None:
        """The client does not read, or not fast enough."""
        super().pause_writing()
        self._arm_write(self._timeout)

    def resume_writing(self) -> None:
        """It reads again."""
        super().resume_writing()
        self._disarm_write()
        if self.cycle is None or self.cycle.response_complete:
            self._limit_rest()

    def on_response_complete(self) -> None:
        """An answer is written, as far as the application knows."""
        self._limit_rest()
        super().on_response_complete()

    def _limit_rest(self) -> None:
        num_left = self.transport.get_write_buffer_size()
        if num_left:
            self._arm_write(self._timeout + num_left / MIN_BYTES_PER_SECOND)

    def _arm_write(self, seconds: float) -> None:
        self._disarm_write()
        self._write_timer = self.loop.call_later(seconds, self._on_unread)

    def _disarm_write(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _on_unread(self) -> None:
        self._write_timer = None
        if self.transport.get_write_buffer_size():
            logger.warning("a client did not read its answer in time; its connection is cut")
            self.transport.abort()

    def _arm(self) -> None:
        self._disarm()
        self._head_timer = self.loop.call_later(self._timeout, self._on_timeout)

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
        status = f"{error.status} {HTTPStatus(error.status).phrase}"
        head = (
            f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
            "connection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()
