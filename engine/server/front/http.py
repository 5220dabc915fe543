"""What every HTTP request passes through: request id, keys, size limits, counting, access log.

A plain ASGI layer: it costs a few microseconds per request and nothing per event of a stream.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hmac
import logging
import re
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import orjson
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvarena.engine.server.shared.config import ADMIN_PATHS, OPEN_PATHS, ServerConfig
from kvarena.engine.server.shared.errors import ApiError, as_messages_error, bad_request, unavailable
from kvarena.engine.server.shared.metrics import HANDLERS, Row

Body = TypeVar("Body", bound=BaseModel)

access_log = logging.getLogger("kvarena.access")

OPEN_PREFIX = "/static/"  # the pages' scripts and styles, the same on every server
_UNCOUNTED = frozenset({"/load", "/metrics", "/health", "/ready", "/ping", "/version"})
_BOUNDS = ("greater_than_equal", "less_than_equal")  # kinds of errors that programs look for
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:\-]{1,128}")
MESSAGES_PATH = "/v1/messages"
MAX_HEADERS = 256
MAX_HEADER_BYTES = 64 * 1024


class Gate:
    """The outermost layer. It keeps of a request, in its `scope["state"]`:

        request_id: the caller's, or a fresh one
        key: the position of the API key that it gave, or -1
        send: what is outside of the gate; it adds nothing
        status: of the answer; who uses `send` sets it

    Args:
        app: what is behind.
        config: keys and limits.
        row: this front's metrics.
        load: the server's load in the form that a request's `endpoint-load-metrics-format` names; empty: none.
    """

    def __init__(
        self, app: ASGIApp, config: ServerConfig, row: Row, load: Callable[[str], bytes] = lambda _: b""
    ) -> None:
        self._app, self._row, self._load = app, row, load
        self._keys = [key.encode() for key in config.api_keys]
        self._has_admin = config.enable_admin
        self._admin_keys = [key.encode() for key in config.admin_keys] or self._keys
        self._max_body = int(config.max_body_mib * 2**20)
        self._log = config.log_requests
        self._open = OPEN_PATHS - config.all_protected_paths()
        self._root = config.root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection's request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if self._root and scope["path"].startswith(f"{self._root}/"):
            scope["path"] = scope["path"][len(self._root) :]  # a proxy may leave it on, or take it off
        start = time.monotonic()
        headers = dict(scope["headers"])
        request_id = _request_id(headers.get(b"x-request-id"))
        load_format = headers.get(b"endpoint-load-metrics-format")
        # A stream writes through `send`, with no layer of the app in between.
        key = _place_of(headers, self._keys)
        scope["state"] = state = {"request_id": request_id, "key": key, "send": send, "status": 0}

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                state["status"] = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
                if load_format is not None and (said := self._load(load_format.decode("latin-1"))):
                    message["headers"].append((b"endpoint-load-metrics", said))
            await send(message)

        self._row.inc("kvarena:open_requests")
        try:
            error = self._refusal(scope, headers)
            if error is not None:
                await error_response(error, scope["path"])(scope, receive, send_with_id)
            else:
                await self._app(scope, receive, send_with_id)
        except asyncio.CancelledError:
            # The server leaves, or the client reads no more. Who has no answer yet gets one; a stream just ends.
            if not state["status"]:
                leaving = unavailable("The server is shutting down.", "draining", retry_after=5)
                await error_response(leaving, scope["path"])(scope, receive, send_with_id)
        finally:
            self._row.inc("kvarena:open_requests", by=-1)
            self._count(scope, time.monotonic() - start)

    def _refusal(self, scope: Scope, headers: dict[bytes, bytes]) -> ApiError | None:
        if len(scope["headers"]) > MAX_HEADERS or sum(len(k) + len(v) for k, v in scope["headers"]) > MAX_HEADER_BYTES:
            return ApiError(431, "The request's headers are too large.", code="headers_too_large")
        path = scope["path"]
        is_open = path in self._open or path.startswith(OPEN_PREFIX) or scope["method"] == "OPTIONS"
        is_admin = self._has_admin and path in ADMIN_PATHS and scope["method"] != "OPTIONS"
        if is_admin and _place_of(headers, self._admin_keys) < 0:  # without any key nobody may
            return _unknown_key("admin")
        if self._keys and not is_open and not is_admin and scope["state"]["key"] < 0:
            return _unknown_key("API")
        length = headers.get(b"content-length")
        if length is not None and length.isdigit() and int(length) > self._max_body:
            return too_large(self._max_body)
        return None

    def _count(self, scope: Scope, seconds: float) -> None:
        status = scope["state"]["status"]
        path = scope["path"]
        route = scope.get("route")
        handler = getattr(route, "path", path)
        if path not in _UNCOUNTED:
            handler = handler if handler in HANDLERS else "none"
            method = scope["method"] if scope["method"] in ("GET", "POST") else "other"
            family = f"{status // 100}xx" if 200 <= status < 600 else "5xx" if status == 0 else "2xx"
            self._row.inc("http_requests", handler, method, family)
            self._row.observe("http_request_duration_seconds", seconds, handler, method)
        if self._log:
            client = scope.get("client") or ("-", 0)
            access_log.info(
                'client=%s method=%s path="%s" status=%d seconds=%.4f request_id=%s',
                client[0],
                scope["method"],
                path.encode("unicode_escape").decode()[:200].replace('"', "'"),
                status,
                seconds,
                scope["state"]["request_id"],
            )


def _place_of(headers: dict[bytes, bytes], keys: Sequence[bytes]) -> int:
    """The position of the key that a request gives, or -1."""
    bearer, other = headers.get(b"authorization", b""), headers.get(b"x-api-key", b"")
    bearer = bearer[7:] if bearer[:7].lower() == b"bearer " else b""
    # Every key is compared, each in constant time: the answer's timing tells nothing.
    same = hmac.compare_digest  # one right key suffices
    matches = [same(bearer, known) | same(other, known) for known in keys]
    return matches.index(True) if any(matches) else -1


def _unknown_key(kind: str) -> ApiError:
    return ApiError(
        401, f"Incorrect or missing {kind} key.", code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"}
    )


def _request_id(given: bytes | None) -> str:
    """The caller's id when it is harmless, else a fresh one: it reaches logs and headers."""
    if given is not None:
        text = given.decode("latin-1")
        if _REQUEST_ID.fullmatch(text):
            return text
    return uuid.uuid4().hex


def too_large(limit: int) -> ApiError:
    """413."""
    return ApiError(413, f"The request's body is larger than {limit} bytes.", code="request_too_large")


def error_response(error: ApiError, path: str) -> Response:
    """The response for an error at a path, in the form of the API that the path belongs to."""
    body = as_messages_error(error) if path.startswith(MESSAGES_PATH) else error.body()
    return Response(orjson.dumps(body), error.status, error.headers, media_type="application/json")


async def disconnected(receive: Receive) -> None:
    """Wait until the client closes the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def read_json(request: Request, config: ServerConfig, *, may_be_empty: bool = False) -> dict[str, Any]:
    """The request's body as a JSON object; no bytes are an empty one where it `may_be_empty`.

    Raises:
        ApiError: 400 malformed, 408 too slow, 413 too large, 415 another content type.
    """
    content_type = request.headers.get("content-type", "application/json").split(";")[0].strip().lower()
    if content_type != "application/json" and not content_type.endswith("+json"):
        raise ApiError(415, "The content type must be application/json.", code="unsupported_media_type")
    limit = int(config.max_body_mib * 2**20)
    chunks: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(config.body_timeout):
            async for chunk in request.stream():
                size += len(chunk)
                if size > limit:
                    raise too_large(limit)
                chunks.append(chunk)
    except ClientDisconnect:
        raise ApiError(499, "The client closed the connection.", code="client_closed") from None
    except TimeoutError:
        raise ApiError(408, "The request's body did not arrive in time.", code="request_timeout") from None
    if may_be_empty and not size:
        return {}
    try:
        with _without_collection():
            body = orjson.loads(b"".join(chunks))
    except orjson.JSONDecodeError as error:
        raise bad_request(f"The body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(body, dict):
        raise bad_request("The body must be a JSON object.", code="invalid_json")
    return body


@contextlib.contextmanager
def _without_collection() -> Iterator[None]:
    """No passes of the garbage collector: for a body of millions of lists they take ten times as long as its parsing,
    and find nothing.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def validated(body: dict[str, Any], kind: type[Body]) -> Body:
    """The body as `kind`. Raises a 400 that names the first parameters at fault."""
    try:
        with _without_collection():
            return kind.model_validate(body)
    except ValidationError as error:
        raise _validation_error(error) from None
    except RecursionError:
        raise bad_request("The body is nested too deeply.", code="invalid_json") from None


def _validation_error(error: ValidationError) -> ApiError:
    """A 400 that names the first parameters at fault; what the caller sent is not repeated."""
    parts = []
    first: str | None = None
    for entry in error.errors(include_url=False, include_input=False, include_context=False)[:5]:
        where = ".".join(str(part) for part in entry["loc"])[:100]
        first = first or (str(entry["loc"][0])[:100] if entry["loc"] else None)
        said = f"{entry['msg']} ({entry['type']})" if entry["type"] in _BOUNDS else entry["msg"]
        parts.append(f"{where}: {said}" if where else said)
    return bad_request("; ".join(parts), first, "invalid_parameter")
