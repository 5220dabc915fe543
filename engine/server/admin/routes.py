"""Routes of an operator's: `/pause`, `/resume`, `/is_paused`, `/abort_requests`, `/reset_prefix_cache`.

Names, parameters and answers are vLLM's. Parameters come in the query or in a JSON body; each engine does what is
ordered (`engine/orders.py`), and the answer comes when all have.
"""

from __future__ import annotations

import logging
from typing import Annotated, Any, Literal, TypeVar

import orjson
from fastapi import FastAPI, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from kvarena.engine.server.api.answers import while_connected
from kvarena.engine.server.api.app import responses_of
from kvarena.engine.server.api.service import Service
from kvarena.engine.server.front.http import read_json, validated
from kvarena.engine.server.shared.errors import ApiError, bad_request

logger = logging.getLogger("kvarena.front")

MAX_IDS = 4096


class Order(BaseModel):
    """An order; what it does not know is an error, not silence."""

    model_config = ConfigDict(extra="forbid")


class PauseOrder(Order):
    """`/pause`."""

    mode: Literal["abort", "wait", "keep"] = "abort"
    clear_cache: bool = True


class AbortOrder(Order):
    """`/abort_requests`: ids of answers, or `X-Request-Id`s; none, or an empty list, means all requests."""

    request_ids: Annotated[list[str], Field(max_length=MAX_IDS, fail_fast=True)] | None = None


class ResetOrder(Order):
    """`/reset_prefix_cache`. There is no external cache, so that nothing of one is left either way."""

    reset_running_requests: bool = False
    reset_external: bool = False


class ResumeOrder(Order):
    """`/resume` has no parameters."""


Kind = TypeVar("Kind", bound=Order)


def add_admin_routes(app: FastAPI, service: Service) -> tuple[type[BaseModel], ...]:
    """Add the routes to an app, where the server's settings have them; there are no bodies that must be described."""
    if not service.config.enable_admin:
        return ()
    errors = responses_of(400, 408, 413, 415, 503)

    @app.post("/pause", summary="Stand still: refuse requests, or let them wait", responses=errors | responses_of(409))
    async def pause(request: Request) -> Response:
        asked = await _asked(request, service, PauseOrder)
        if service.draining:
            raise ApiError(503, "The server is shutting down: it cannot be paused.", code="draining")
        logger.warning("paused by an operator: mode=%s", asked.mode)
        made = await _ordered(request, service, "pause", **asked.model_dump())
        if any(one.get("resumed") for one in made):
            raise ApiError(409, "The server was resumed before all requests had ended.", code="resumed")
        return _json({"status": "paused"})

    @app.post("/resume", summary="Go on", responses=errors)
    async def resume(request: Request) -> Response:
        await _asked(request, service, ResumeOrder)
        await _ordered(request, service, "resume")
        logger.warning("resumed by an operator")
        return _json({"status": "resumed"})

    @app.get("/is_paused", summary="Does it stand still?", responses=responses_of())
    async def is_paused() -> Response:
        return _json({"is_paused": any(service.client.pauses)})

    @app.post("/abort_requests", summary="End requests, or all of them", responses=errors)
    async def abort_requests(request: Request) -> Response:
        asked = await _asked(request, service, AbortOrder, needs_body=True)
        ids = asked.request_ids or None
        made = await _ordered(request, service, "abort", request_ids=ids)
        ended = {one for engine in made for one in engine["ended"]}
        found = {one for engine in made for one in engine["found"]}
        logger.warning("%d requests were ended by an operator", len(ended))
        unknown = [] if ids is None else [one for one in dict.fromkeys(ids) if one not in found]
        return _json({"status": "aborted", "aborted": len(ended), "unknown": unknown})

    @app.post("/reset_prefix_cache", summary="Forget what the prefix cache holds", responses=errors)
    async def reset_prefix_cache(request: Request) -> Response:
        asked = await _asked(request, service, ResetOrder)
        if asked.reset_running_requests:
            raise bad_request(
                "requests that run keep their blocks; POST /pause with mode=abort or mode=wait first, which empties "
                "the cache when they have ended",
                "reset_running_requests",
            )
        used = sum(one["blocks_in_use"] for one in await _ordered(request, service, "reset"))
        return _json({"success": not used, "blocks_in_use": used})

    return ()


async def _ordered(request: Request, service: Service, kind: str, **given: Any) -> list[dict[str, Any]]:
    """What came of an order in each engine; a client that leaves does not take it back."""
    return await while_connected(request.receive, service.client.order(kind, **given))


async def _asked(request: Request, service: Service, kind: type[Kind], needs_body: bool = False) -> Kind:
    """The order with its parameters, of the query and of the body together. Raises ApiError."""
    body = await read_json(request, service.config, may_be_empty=not needs_body)
    names = [name for name, _ in request.query_params.multi_items()]
    twice = next((name for name in names if name in body or names.count(name) > 1), None)
    if twice is not None:
        raise bad_request(f"{twice[:100]} is given twice", twice[:100])
    return validated({**request.query_params, **body}, kind)


def _json(body: dict[str, Any]) -> Response:
    return Response(orjson.dumps(body), media_type="application/json")
