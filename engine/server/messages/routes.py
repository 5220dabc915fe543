"""The routes of the Messages API."""

from __future__ import annotations

import functools
import time

import orjson
from fastapi import FastAPI, Request
from pydantic import BaseModel
from starlette.responses import Response

from kvarena.engine.server.api.answers import while_connected
from kvarena.engine.server.api.app import answers_of, body_of
from kvarena.engine.server.api.service import Service
from kvarena.engine.server.messages.answer import MessageAnswer
from kvarena.engine.server.messages.blocks import at_this_edge, to_chat
from kvarena.engine.server.messages.protocol import (
    CountRequest,
    MessageBody,
    MessagesRequest,
    TokenCount,
    check_request,
)
from kvarena.engine.server.shared.errors import ApiError


def add_message_routes(app: FastAPI, service: Service) -> tuple[type[BaseModel], ...]:
    """Add the routes to an app; what their bodies are, for its description."""

    @app.post(
        "/v1/messages", response_class=Response, responses=answers_of(MessageBody),
        openapi_extra=body_of(MessagesRequest),
    )  # fmt: skip
    async def create_message(request: Request) -> Response:
        arrival = time.monotonic()
        asked = await service.read(request, MessagesRequest)
        check_request(asked)
        try:
            make = functools.partial(MessageAnswer, max_tokens=asked.max_tokens)
            answer = service.converse(request, to_chat(asked, service.can_think), make, arrival, clamps=True)
            return await while_connected(request.receive, answer)
        except ApiError as error:
            raise at_this_edge(error) from None

    @app.post(
        "/v1/messages/count_tokens", response_class=Response, responses=answers_of(TokenCount),
        openapi_extra=body_of(CountRequest),
    )  # fmt: skip
    async def count_tokens(request: Request) -> Response:
        asked = await service.read(request, CountRequest)
        check_request(asked)
        try:
            req = to_chat(asked, service.can_think)
            service.check_model(req.model)
            ids = await service.chat_ids(req)
        except ApiError as error:
            raise at_this_edge(error) from None
        return Response(orjson.dumps({"input_tokens": len(ids)}), media_type="application/json")

    return MessagesRequest, CountRequest
