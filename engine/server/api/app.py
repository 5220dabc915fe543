"""The HTTP routes and their OpenAPI document."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import orjson
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp

import kvarena
from kvarena.engine.server.api import protocol
from kvarena.engine.server.api.answers import Disconnected, as_api_error
from kvarena.engine.server.api.foreign import check_foreign
from kvarena.engine.server.api.operating import add_operating_routes, load_header, of_others
from kvarena.engine.server.api.service import Service
from kvarena.engine.server.front.cache_info import cache_info
from kvarena.engine.server.front.groups import ChoiceFailed, EngineGone
from kvarena.engine.server.front.http import Gate, error_response
from kvarena.engine.server.front.pages import add_docs, add_live_pages, add_static_files
from kvarena.engine.server.shared.config import ADMIN_PATHS
from kvarena.engine.server.shared.errors import ApiError, bad_request
from kvarena.engine.server.shared.exposition import render
from kvarena.engine.server.shared.metrics import Rows

_ERRORS = {
    400: "A parameter is wrong, or the prompt is beyond the context.",
    401: "The API key is missing or wrong.",
    403: "The key may not ask for this priority.",
    404: "No such model.",
    405: "The path does not know this method.",
    409: "The server was resumed meanwhile.",
    408: "The body did not arrive in time, or the client reads too slowly.",
    413: "The body is too large.",
    415: "The body is not JSON.",
    429: "The key has as many requests or tokens as it may have.",
    431: "The headers are too large.",
    500: "The server failed.",
    503: "The queue is full, the server is shutting down, or the engine is gone.",
}


def responses_of(*codes: int) -> dict[int | str, dict[str, Any]]:
    """Documented errors."""
    return {code: {"model": protocol.ErrorResponse, "description": _ERRORS[code]} for code in (401, 405, 431, *codes)}


def body_of(model: type[Any]) -> dict[str, Any]:
    """The OpenAPI entry of a body that the handler reads by itself."""
    ref = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": ref}}}}


_POST = responses_of(400, 403, 404, 408, 413, 415, 429, 500, 503)


def answers_of(model: type[Any]) -> dict[int | str, dict[str, Any]]:
    """Documented answers of a path that makes text: whole, streamed, and its errors."""
    success = {"model": model, "content": {"text/event-stream": {}}}
    return {200: success, **_POST}


AddRoutes = Callable[[FastAPI, Service], tuple[type[BaseModel], ...]]


def create_app(service: Service, rows: Rows, more: Sequence[AddRoutes] = ()) -> ASGIApp:
    """The application of one front.

    Args:
        service: what answers.
        rows: all processes' metrics.
        more: add the routes of other APIs; each gives the kinds of their bodies.
    """
    app = FastAPI(
        title="kvarena",
        version=kvarena.__version__,
        description="OpenAI-compatible LLM server.",
        docs_url=None,  # the library's page loads its script from elsewhere
        redoc_url=None,
        root_path=service.config.root_path,
    )
    _add_error_handlers(app)
    _add_status_routes(app, service, rows)
    _add_model_routes(app, service)
    add_operating_routes(app, service, rows, _POST)
    add_static_files(app)
    add_docs(app)
    if service.config.enable_dashboard:
        add_live_pages(app, service.feed)
    _add_schemas(app, [kind for add in more for kind in add(app, service)])
    gate = Gate(app, service.config, service.row, functools.partial(load_header, rows))
    if not service.config.cors_origins:
        return gate
    # Outermost: what the gate itself refuses must be readable for a browser, too.
    return CORSMiddleware(
        gate,
        allow_origins=service.config.cors_origins,
        allow_methods=["GET", "HEAD", "POST", "DELETE"],
        allow_headers=["*"],
        expose_headers=["X-Request-Id", "Retry-After"],
    )


def _add_error_handlers(app: FastAPI) -> None:
    async def on_error(request: Request, error: Exception) -> Response:
        return error_response(as_api_error(error), request.url.path)

    async def on_http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        messages = {404: "No such path.", 405: "This path does not know this method."}
        other = of_others(request.url.path) if error.status_code == 404 else ""
        if error.status_code == 404 and request.url.path in ADMIN_PATHS:
            other = "This path is an operator's, and off here: start the server with --enable-admin."
        text = other or messages.get(error.status_code, str(error.detail))
        return error_response(ApiError(error.status_code, text, headers=dict(error.headers or {})), request.url.path)

    async def on_validation_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return error_response(bad_request(str(error.errors()[:1])[:300]), request.url.path)

    async def on_disconnect(_: Request, error: Exception) -> Response:  # noqa: ARG001
        return Response(status_code=499)

    for kind in (ApiError, EngineGone, ChoiceFailed, Exception):
        app.add_exception_handler(kind, on_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(RequestValidationError, on_validation_error)
    app.add_exception_handler(Disconnected, on_disconnect)


def _add_status_routes(app: FastAPI, service: Service, rows: Rows) -> None:
    @app.get(
        "/health",
        summary="Is the server alive and making progress?",
        response_class=Response,
        responses=responses_of(503),
    )
    @app.api_route("/ping", methods=["GET", "HEAD"], include_in_schema=False)
    @app.head("/health", include_in_schema=False)
    async def health() -> Response:
        if reason := service.client.fault_of_all(strict=True):
            unhealthy = ApiError(503, f"Unhealthy: {reason}.", code="unhealthy", headers={"Retry-After": "5"})
            return error_response(unhealthy, "/health")
        return Response(status_code=200)

    @app.head("/ready", include_in_schema=False)
    @app.get(
        "/ready",
        summary="Does the server take new requests?",
        response_class=Response,
        responses=responses_of(503),
    )
    async def ready() -> Response:
        if service.draining:
            return error_response(ApiError(503, "The server is shutting down.", code="draining"), "/ready")
        if any(service.client.pauses):
            return error_response(ApiError(503, "The server is paused.", code="paused"), "/ready")
        return await health()

    @app.head("/version", include_in_schema=False)
    @app.get("/version", response_model=protocol.VersionResponse, responses=responses_of())
    async def show_version() -> dict[str, str]:
        return {"version": kvarena.__version__}

    page: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}
    page |= responses_of()

    @app.head("/metrics", include_in_schema=False)
    @app.get("/metrics", summary="Prometheus metrics", response_class=Response, responses=page)
    async def show_metrics() -> Response:
        facts = [
            cache_info(info.num_blocks, info.block_size, info.max_model_len, info.facts)
            for info in service.client.infos
        ]
        data = render(rows, service.model_names[0], facts)
        return Response(data, media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/kv_event_sources", summary="Where each engine publishes its KV events", responses=responses_of())
    async def kv_event_sources() -> dict[str, dict[str, Any]]:
        return {str(rank): info.kv_events for rank, info in enumerate(service.client.infos) if info.kv_events}


def _add_model_routes(app: FastAPI, service: Service) -> None:
    def card(name: str) -> dict[str, Any]:
        return protocol.ModelCard(
            id=name, created=service.created, root=service.model_root, max_model_len=service.info.max_model_len
        ).model_dump()

    @app.get("/v1/models", response_model=protocol.ModelList, responses=responses_of())
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card(name) for name in service.model_names]}

    @app.get("/v1/models/{model_id:path}", response_model=protocol.ModelCard, responses=responses_of(404))
    async def model(model_id: str) -> dict[str, Any]:
        return card(service.check_model(model_id))

    @app.post(
        "/v1/completions",
        response_class=Response,
        responses=answers_of(protocol.CompletionResponse),
        openapi_extra=body_of(protocol.CompletionRequest),
    )
    async def completions(request: Request) -> Response:
        return await service.completions(request)

    @app.post(
        "/v1/chat/completions",
        response_class=Response,
        responses=answers_of(protocol.ChatCompletionResponse),
        openapi_extra=body_of(protocol.ChatCompletionRequest),
    )
    async def chat(request: Request) -> Response:
        return await service.chat(request)

    @app.post(
        "/tokenize",
        response_class=Response,
        responses={200: {"model": protocol.TokenizeResponse}, **_POST},
        openapi_extra=body_of(protocol.TokenizeRequest),
    )
    async def tokenize(request: Request) -> Response:
        req = await service.read(request, protocol.TokenizeRequest)
        service.check_model(req.model)
        check_foreign(req)
        limit = service.info.max_model_len
        if (req.prompt is None) == (req.messages is None):
            raise bad_request("give either prompt or messages", "prompt")
        prompts = service.prompts
        ids = await (prompts.of_text(req) if req.messages is None else service.chat_ids(req))
        body: dict[str, Any] = {"count": len(ids), "max_model_len": limit, "tokens": ids, "token_strs": None}
        if req.return_token_strs:
            body["token_strs"] = [service.tokenizer.detokenizer.vocabulary_string(token) for token in ids]
        return Response(orjson.dumps(body), media_type="application/json")

    @app.post(
        "/detokenize",
        response_class=Response,
        responses={200: {"model": protocol.DetokenizeResponse}, **_POST},
        openapi_extra=body_of(protocol.DetokenizeRequest),
    )
    async def detokenize(request: Request) -> Response:
        req = await service.read(request, protocol.DetokenizeRequest)
        service.check_model(req.model)
        check_foreign(req)
        bad = next((token for token in req.tokens if token >= service.info.vocab_size), None)
        if bad is not None:
            raise bad_request(f"tokens holds {bad}, which is outside the vocabulary", "tokens")
        text = await service.tokenizer.decode(req.tokens, bool(req.skip_special_tokens))
        return Response(orjson.dumps({"prompt": text}), media_type="application/json")


def _add_schemas(app: FastAPI, more: Sequence[type[BaseModel]]) -> None:
    """Put the schemas of hand-read bodies into the OpenAPI document."""
    made = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = made()
            schemas = document.setdefault("components", {}).setdefault("schemas", {})
            bodies: tuple[type[BaseModel], ...] = (
                protocol.CompletionRequest,
                protocol.ChatCompletionRequest,
                protocol.TokenizeRequest,
                protocol.DetokenizeRequest,
                *more,
            )
            for model in bodies:
                schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
                schemas.update(schema.pop("$defs", {}))
                schemas[model.__name__] = schema
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
