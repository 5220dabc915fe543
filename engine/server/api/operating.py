"""Routes about the server itself, and the path that clouds call: `/tokenizer_info`, `/load`, `/server_info`,
`/invocations`. Those of other kinds of models say that they are none of this server's.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import orjson
from fastapi import FastAPI, Request
from starlette.responses import Response

import kvarena
from kvarena.engine.server.api.protocol import ChatCompletionRequest, CompletionRequest
from kvarena.engine.server.api.service import Service
from kvarena.engine.server.front.http import read_json, validated
from kvarena.engine.server.shared.errors import bad_request
from kvarena.engine.server.shared.metrics import Rows, total

_SECRETS = ("api_keys", "admin_keys", "api_key_file", "ssl_keyfile_password", "ssl_keyfile")
_OTHERS = {
    "embeddings": "Embeddings are", "pooling": "Embeddings are", "score": "Scores are", "rerank": "Scores are",
    "classify": "Classes are", "transcriptions": "Transcriptions are", "translations": "Transcriptions are",
    "speech": "Sound is", "realtime": "Sound is", "generations": "Images are", "edits": "Images are",
}  # fmt: skip


def of_others(path: str) -> str:
    """Why a path of other kinds of models is none here; empty for any other path."""
    what = _OTHERS.get(path.rstrip("/").rpartition("/")[2])
    return f"{what} not made by this server: it generates text." if what else ""


def load_header(rows: Rows, kind: str) -> bytes:
    """The load in the form of ORCA that a request's header asks for; empty for an unknown one."""
    engines = range(len(rows.engines))
    usage = [total(rows.of_engine(engine), "vllm:kv_cache_usage_perc") for engine in engines]
    waiting = sum(total(rows.of_engine(engine), "vllm:num_requests_waiting") for engine in engines)
    named = {"kv_cache_usage_perc": sum(usage) / len(usage), "num_requests_waiting": waiting}
    if kind.upper() == "JSON":
        return b"JSON " + orjson.dumps({"named_metrics": named})
    if kind.upper() != "TEXT":
        return b""
    return b"TEXT " + ", ".join(f"named_metrics.{name}={value}" for name, value in named.items()).encode()


def add_operating_routes(app: FastAPI, service: Service, rows: Rows, errors: dict[int | str, dict[str, Any]]) -> None:
    """Add the routes to an app."""

    @app.get("/load", summary="Requests being served")
    async def load() -> dict[str, int]:
        everyone = [row for front in rows.fronts for row in front]
        return {"server_load": int(total(everyone, "kvarena:open_requests")) - 1}  # but for this one

    @app.get("/server_info", summary="How this server was configured")
    async def server_info() -> dict[str, Any]:
        settings = {key: value for key, value in asdict(service.config).items() if key not in _SECRETS}
        engines = [
            {key: value for key, value in asdict(info).items() if key not in ("defaults", "kv_events")}
            for info in service.client.infos
        ]
        return {
            "version": kvarena.__version__,
            "model": service.model_root,
            "served_model_names": service.model_names,
            "has_api_keys": bool(service.config.api_keys),
            "server": settings,
            "engines": engines,
            "default_sampling": service.info.defaults,
        }

    @app.get("/tokenizer_info", summary="The model's tokenizer")
    async def tokenizer_info() -> dict[str, Any]:
        tokenizer = service.tokenizer.tokenizer
        return {
            "tokenizer_class": type(tokenizer).__name__,
            "vocab_size": len(tokenizer),
            "model_max_length": service.info.max_model_len,
            "chat_template": getattr(tokenizer, "chat_template", None),
            "special_tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
            "added_tokens": {str(token): str(text) for token, text in tokenizer.added_tokens_decoder.items()},
        }

    @app.post(
        "/invocations", summary="A chat or a completion, by what the body holds", response_class=Response,
        responses=errors,
    )  # fmt: skip
    async def invocations(request: Request) -> Response:
        body = await read_json(request, service.config)
        if "messages" in body:
            return await service.chat(request, validated(body, ChatCompletionRequest))
        if "prompt" in body:
            return await service.completions(request, validated(body, CompletionRequest))
        raise bad_request("the body has neither messages, of a chat, nor prompt, of a completion")
