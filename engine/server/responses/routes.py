"""The routes of the Responses API: make a response, ask for it again, end it, forget it."""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from typing import Any

import orjson
from fastapi import FastAPI, Request
from pydantic import BaseModel
from starlette.responses import Response

from kvarena.engine.server.api.answers import as_api_error, while_connected
from kvarena.engine.server.api.app import answers_of, body_of, responses_of
from kvarena.engine.server.api.service import Service
from kvarena.engine.server.responses.answer import ResponseAnswer, empty_response, new_id
from kvarena.engine.server.responses.items import at_this_edge, input_items, to_chat
from kvarena.engine.server.responses.protocol import Deleted, ItemList, ResponseBody, ResponsesRequest, check_request
from kvarena.engine.server.responses.store import ResponseStore, Stored
from kvarena.engine.server.shared.errors import ApiError, bad_request

logger = logging.getLogger("kvarena.front")

_POLL_SECONDS = 0.2
_MAX_CANCEL_SECONDS = 5.0
_MAX_LISTED = 100
OPEN = ("queued", "in_progress", "ending")


class ResponsesApi:
    """Responses of one front.

    Args:
        service: answers chats.
        store: keeps responses; None: none is kept.
    """

    def __init__(self, service: Service, store: ResponseStore | None) -> None:
        self._service, self._store = service, store
        self._tasks: set[asyncio.Task[None]] = set()

    async def create(self, request: Request) -> Response:
        """`POST /v1/responses`."""
        arrival = time.monotonic()
        asked = await self._service.read(request, ResponsesRequest)
        check_request(asked)
        items = [*self._before(asked, request.state.key), *input_items(asked.input)]
        try:
            req = to_chat(asked, items)
            make = functools.partial(
                ResponseAnswer,
                asked=asked,
                response_id=new_id("resp"),
                stores=self._stores(asked),
                on_state=functools.partial(self._keep, asked, items, request.state.key),
            )
            if asked.background:
                return self._in_background(request, asked, items, req, make, arrival)
            answer = self._service.converse(request, req, make, arrival, clamps=True)
            return await while_connected(request.receive, answer)
        except ApiError as error:
            raise at_this_edge(error) from None

    def _stores(self, asked: ResponsesRequest) -> bool:
        return self._store is not None and asked.store is not False

    def _before(self, asked: ResponsesRequest, key: int) -> list[dict[str, Any]]:
        """The conversation that a request goes on with. Raises ApiError."""
        if asked.previous_response_id is None:
            return []
        before = self._stored(asked.previous_response_id, key, "previous_response_id")
        if before.body["status"] in OPEN:
            raise bad_request("the previous response is not finished yet", "previous_response_id")
        return [*before.items, *before.body["output"]]

    def _stored(self, response_id: str, key: int, param: str = "response_id") -> Stored:
        if self._store is None:
            raise bad_request("this server keeps no responses (--response-store-size is 0)", param)
        found = self._store.get(response_id, key)
        if found is None:
            raise ApiError(404, f"Response with id {response_id[:100]!r} not found.", param, "not_found")
        return found

    def _keep(self, asked: ResponsesRequest, items: list[dict[str, Any]], key: int, body: dict[str, Any]) -> None:
        """A response has got another status."""
        if self._store is None or not self._stores(asked):
            return
        if asked.background and self._store.status(body["id"]) in (None, "ending"):
            return  # deleted, or about to end
        body["store"] = self._store.put(key, body, items)

    # Background

    def _in_background(
        self,
        request: Request,
        asked: ResponsesRequest,
        items: list[dict[str, Any]],
        req: Any,
        make: functools.partial[ResponseAnswer],
        arrival: float,
    ) -> Response:
        """Begin a response that nobody waits for. Raises ApiError."""
        if self._store is None or asked.store is False:
            raise bad_request(
                "background can only be used when `store` is true: the response is asked for later by its id",
                "background",
            )
        model = self._service.admit(req)
        body = empty_response(asked, make.keywords["response_id"], model, stores=True)
        if not self._store.put(request.state.key, body, items):
            raise ApiError(503, "The response cannot be kept now.", code="store_failed", headers={"Retry-After": "1"})
        work = self._run(request, items, req, make, arrival, body)
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return _json(body)

    async def _run(
        self,
        request: Request,
        items: list[dict[str, Any]],
        req: Any,
        make: functools.partial[ResponseAnswer],
        arrival: float,
        body: dict[str, Any],
    ) -> None:
        """A background response until its end, or until somebody does not want it any more."""
        assert self._store is not None
        task = asyncio.ensure_future(self._service.converse(request, req, make, arrival, clamps=True))
        try:
            while not task.done():
                await asyncio.wait([task], timeout=_POLL_SECONDS)
                if self._store.status(body["id"]) in (None, "ending"):
                    task.cancel()
            if not task.cancelled() and (error := task.exception()) is not None:
                said = as_api_error(error if isinstance(error, Exception) else EOFError())
                body |= {"status": "failed", "error": {"code": "server_error", "message": said.message}}
            elif self._store.status(body["id"]) == "ending":
                body |= {"status": "cancelled"}
            else:
                return
            if self._store.status(body["id"]) is not None:
                self._store.put(request.state.key, body, items)
        finally:
            task.cancel()

    # Stored ones

    async def retrieve(self, request: Request, response_id: str) -> Response:
        """`GET /v1/responses/{id}`."""
        if request.query_params.get("stream") in ("true", "1"):
            raise bad_request("a stored response cannot be streamed", "stream")
        return _json(self._shown(response_id, request.state.key))

    def _shown(self, response_id: str, key: int) -> dict[str, Any]:
        return self._stored(response_id, key).body

    async def cancel(self, request: Request, response_id: str) -> Response:
        """`POST /v1/responses/{id}/cancel`: ends a background response."""
        body = self._shown(response_id, request.state.key)
        if not body["background"]:
            raise bad_request("Cannot cancel a synchronous response.", "response_id")
        assert self._store is not None
        self._store.ask_to_end(response_id)
        until = time.monotonic() + _MAX_CANCEL_SECONDS
        while self._store.status(response_id) in OPEN and time.monotonic() < until:
            await asyncio.sleep(_POLL_SECONDS / 4)
        return _json(self._shown(response_id, request.state.key))

    async def delete(self, request: Request, response_id: str) -> Response:
        """`DELETE /v1/responses/{id}`."""
        self._stored(response_id, request.state.key)
        assert self._store is not None
        self._store.delete(response_id, request.state.key)
        return _json({"id": response_id, "object": "response.deleted", "deleted": True})

    async def input_items(self, request: Request, response_id: str) -> Response:
        """`GET /v1/responses/{id}/input_items`: the conversation that it answers, the latest item first."""
        items = self._stored(response_id, request.state.key).items
        query = request.query_params
        order, limit, after = query.get("order", "desc"), query.get("limit", "20"), query.get("after")
        if order not in ("asc", "desc"):
            raise bad_request("order must be asc or desc", "order")
        if not (limit.isascii() and limit.isdigit() and len(limit) < 9 and 1 <= int(limit) <= _MAX_LISTED):
            raise bad_request(f"limit must be 1 to {_MAX_LISTED}", "limit")
        items = items if order == "asc" else items[::-1]
        if after is not None:
            places = [place for place, item in enumerate(items) if item["id"] == after]
            if not places:
                raise bad_request(f"after names {after[:100]!r}, which is no item of this response", "after")
            items = items[places[0] + 1 :]
        shown = items[: int(limit)]
        ends = {"first_id": shown[0]["id"] if shown else "", "last_id": shown[-1]["id"] if shown else ""}
        return _json({"object": "list", "data": shown, "has_more": len(items) > len(shown), **ends})


def _json(body: dict[str, Any]) -> Response:
    return Response(orjson.dumps(body), media_type="application/json")


def add_response_routes(app: FastAPI, service: Service, store: ResponseStore | None) -> tuple[type[BaseModel], ...]:
    """Add the routes to an app; what their bodies are, for its description."""
    api = ResponsesApi(service, store)
    one = "/v1/responses/{response_id}"
    found: dict[int | str, dict[str, Any]] = {200: {"model": ResponseBody}, **responses_of(400, 404)}

    @app.post(
        "/v1/responses", response_class=Response, responses=answers_of(ResponseBody),
        openapi_extra=body_of(ResponsesRequest),
    )  # fmt: skip
    async def create_response(request: Request) -> Response:
        return await api.create(request)

    @app.get(one, response_class=Response, responses=found)
    async def retrieve_response(request: Request, response_id: str) -> Response:
        return await api.retrieve(request, response_id)

    @app.post(one + "/cancel", response_class=Response, responses=found)
    async def cancel_response(request: Request, response_id: str) -> Response:
        return await api.cancel(request, response_id)

    @app.delete(one, response_class=Response, responses=found | {200: {"model": Deleted}})
    async def delete_response(request: Request, response_id: str) -> Response:
        return await api.delete(request, response_id)

    @app.get(one + "/input_items", response_class=Response, responses=found | {200: {"model": ItemList}})
    async def list_input_items(request: Request, response_id: str) -> Response:
        return await api.input_items(request, response_id)

    return (ResponsesRequest,)
