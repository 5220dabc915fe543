"""Requests over kept HTTP/1.1 connections, for a client that must not be what is slow: no layer between the parser in C
and who takes the answer.

    HttpClient --a free connection, or a new one--> Connection --pieces of the body, with their times--> Receiver

It goes straight to the server: no proxy, no redirect, nothing compressed.
"""

from __future__ import annotations

import asyncio
import base64
import ssl
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, Protocol, TypeVar, cast
from urllib.parse import unquote

import httptools
import httpx

Item = TypeVar("Item")
Result = TypeVar("Result")


class Receiver(Protocol):
    """Who takes an answer.

    Attributes:
        status: set before the first piece.
    """

    status: int

    def receive(self, piece: bytes, now: float) -> float | None:
        """Take a piece of the body, which was there at `now` (`time.perf_counter()`).

        Returns:
            Seconds after which the client hangs up, if the answer has not ended until then, because what was asked for
            is there. None goes on.
        """
        ...


@dataclass(slots=True)
class Reply:
    """A whole answer."""

    status: int = 0
    body: bytearray = field(default_factory=bytearray)

    def receive(self, piece: bytes, now: float) -> None:  # noqa: ARG002
        """See `Receiver`."""
        self.body += piece


class Connection(asyncio.Protocol):
    """One connection; one exchange at a time.

    Attributes:
        is_idle: its last answer is whole, and the server keeps it open.
        is_unheard: of its last request nothing was answered.
    """

    def __init__(self) -> None:
        self.is_idle, self.is_unheard = True, True
        self._done: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        self._parser = httptools.HttpResponseParser(self)

    async def exchange(self, request: bytes, answer: Receiver, patience: float) -> None:
        """Send `request`, and hand its answer to `answer`. The connection is closed where it is not idle behind that.

        Raises:
            TimeoutError: nothing came for `patience` seconds.
            OSError: the connection broke, or the other side does not speak HTTP.
        """
        loop = asyncio.get_running_loop()
        self._answer, self._is_over, self._has_end = answer, False, False
        self.is_idle, self.is_unheard = False, True
        self._done, self._heard = loop.create_future(), time.perf_counter()
        self._alarm = loop.call_later(patience, self._listen, patience)
        self.transport.write(request)
        try:
            await self._done
        finally:
            self._alarm.cancel()
            self._done = None
            if not self.is_idle:
                self.transport.abort()

    def _listen(self, patience: float) -> None:
        left = self._heard + patience - time.perf_counter()
        if left <= 0:
            self._end(TimeoutError(f"nothing came for {patience:g} s"))
        else:
            self._alarm = asyncio.get_running_loop().call_later(left, self._listen, patience)

    def _end(self, error: BaseException | None = None) -> None:
        if self._done is None or self._done.done():
            return
        if error is None:
            self._done.set_result(None)
        else:
            self._done.set_exception(error)

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        if self._done is None or self._done.done():
            self.transport.abort()  # nobody asked for it
            return
        self._heard, self.is_unheard = time.perf_counter(), False
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self.is_idle = False
            cause = error.__context__  # of a receiver that raised
            self._end(cause if cause is not None else ConnectionError(f"the answer is no HTTP ({error})"))

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        if self._done is None:
            return
        ends_here = exc is None and self._answer.status >= 200 and not self._has_end
        whole = self._is_over or ends_here
        self._end(None if whole else exc or ConnectionError("the connection was closed within the answer"))

    @property
    def _is_asked(self) -> bool:
        """Whether an answer is due; what comes behind one is nobody's."""
        return self._done is not None and not self._done.done()

    def on_message_begin(self) -> None:
        """The parser's: an answer that nobody asked for leaves nothing to rely on."""
        self.is_idle = False

    def on_header(self, name: bytes, value: bytes) -> None:
        """The parser's: without one of these an answer ends with its connection. Raises ConnectionError."""
        if (name := name.lower()) in (b"content-length", b"transfer-encoding"):
            self._has_end = True
        elif name == b"content-encoding" and value.lower() != b"identity":
            raise ConnectionError(
                f"the answer is compressed ({value.decode(errors='replace')}), which nobody asked for"
            )

    def on_headers_complete(self) -> None:
        """The parser's."""
        if self._is_asked:
            self._answer.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        """The parser's: a part of the answer."""
        if not self._is_asked or (left := self._answer.receive(body, self._heard)) is None:
            return
        self._is_over = True
        self._alarm.cancel()
        if left > 0:
            self._alarm = asyncio.get_running_loop().call_later(left, self._end)
        else:
            self._end()

    def on_message_complete(self) -> None:
        """The parser's: the answer is whole."""
        if self._is_asked and self._answer.status >= 200:
            self.is_idle = self._parser.should_keep_alive()
            self._end()


class _Route(NamedTuple):
    """Where a path is, and what stands above a request to it."""

    origin: tuple[str, int, bool]  # host, port, whether it is encrypted
    head: str


class HttpClient:
    """A server, and the connections to it that are free; as many are made as are needed.

    Args:
        url: of the server; paths are taken to be below its own. A name and password in it are sent with each request.
        headers: of every request.
        patience: seconds of silence after which a request has failed.
        keeps: use a connection for more than one request.

    Raises:
        httpx.InvalidURL: `url` is none.
    """

    def __init__(
        self, url: str | httpx.URL, headers: Mapping[str, str] | None = None, *, patience: float = 600.0,
        keeps: bool = True,
    ) -> None:  # fmt: skip
        self.url = httpx.URL(url)
        lines = dict(headers or {}) | ({} if keeps else {"Connection": "close"})
        if self.url.userinfo:
            lines.setdefault("Authorization", f"Basic {base64.b64encode(unquote(self.url.userinfo).encode()).decode()}")
        self._headers = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        self._patience, self._keeps = patience, keeps
        self._routes: dict[str, _Route] = {}
        self._idle: dict[tuple[str, int, bool], list[Connection]] = {}

    async def send(self, method: str, path: str, body: bytes, answer: Receiver) -> None:
        """One request, whose answer goes to `answer`.

        Args:
            method: of HTTP.
            path: below the server's address, or a whole URL.
            body: of the request.
            answer: takes it.

        Raises:
            OSError: the server cannot be reached, is silent, breaks off, or does not speak HTTP.
            httpx.InvalidURL: `path` is none.
        """
        message, origin = self.message(method, path, body), self._route(path).origin
        connection = self._free_connection(origin)
        if connection is not None:
            try:
                await connection.exchange(message, answer, self._patience)
            except TimeoutError:
                raise
            except OSError:
                # The server closed it while the request was on its way, and has not read that: a new one is asked.
                if not connection.is_unheard:
                    raise
                connection = None
        if connection is None:
            connection = await self._new_connection(origin)
            await connection.exchange(message, answer, self._patience)
        if connection.is_idle and self._keeps:
            self._idle[origin].append(connection)
        else:
            connection.transport.close()

    async def request(self, method: str, path: str, body: bytes = b"") -> Reply:
        """One request and its whole answer. Raises as `send`."""
        reply = Reply()
        await self.send(method, path, body, reply)
        return reply

    def message(self, method: str, path: str, body: bytes = b"") -> bytes:
        """A request as it is sent. Raises httpx.InvalidURL."""
        length = f"Content-Length: {len(body)}\r\n" if body or method == "POST" else ""
        return f"{method} {self._route(path).head}{self._headers}{length}\r\n".encode() + body

    def close(self) -> None:
        """Close the connections that are free."""
        for connections in self._idle.values():
            while connections:
                connections.pop().transport.close()

    def _route(self, path: str) -> _Route:
        if (known := self._routes.get(path)) is not None:
            return known
        url = httpx.URL(path)
        if url.is_relative_url:
            url = self.url.copy_with(raw_path=self.url.raw_path.rstrip(b"/") + url.raw_path)
        if url.scheme not in ("http", "https"):
            raise httpx.InvalidURL(f"{url} is neither http:// nor https://")
        encrypted = url.scheme == "https"
        origin = (url.raw_host.decode(), url.port or (443 if encrypted else 80), encrypted)
        route = _Route(origin, f"{url.raw_path.decode()} HTTP/1.1\r\nHost: {url.netloc.decode()}\r\n")
        return self._routes.setdefault(path, route)

    def _free_connection(self, origin: tuple[str, int, bool]) -> Connection | None:
        idle = self._idle.setdefault(origin, [])
        while idle:
            connection = idle.pop()
            if not connection.transport.is_closing():
                return connection
        return None

    async def _new_connection(self, origin: tuple[str, int, bool]) -> Connection:
        host, port, encrypted = origin
        tls = self._tls if encrypted else None
        try:
            async with asyncio.timeout(self._patience):
                _, made = await asyncio.get_running_loop().create_connection(Connection, host, port, ssl=tls)
        except TimeoutError:
            raise TimeoutError(f"no connection to {host}:{port} in {self._patience:g} s") from None
        return made

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        return httpx.create_ssl_context()


def run_async(main: Coroutine[Any, Any, Result]) -> Result:
    """`asyncio.run`; on uvloop where that is installed (it comes with `serve`): a tenth less time an event."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(main)
    return uvloop.run(main)


async def in_turns(num_clients: int, items: Iterator[Item], send: Callable[[Item], Awaitable[None]]) -> None:
    """A closed loop: so many clients, each of which takes the next item when its last one was answered."""

    async def client() -> None:
        for item in items:
            await send(item)

    await asyncio.gather(*(client() for _ in range(num_clients)))
