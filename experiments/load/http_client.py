"""One streamed `/v1/completions` request to any OpenAI-compatible server, timed chunk by chunk.

Prompts go out as token ids, so nothing is tokenised again. What is not part of OpenAI's API (`ignore_eos`,
`return_token_ids`, `top_k`, ...) is sent to servers that take it; `HttpServer.connect` finds that out.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx
import orjson

from engine.errors import EngineError
from engine.request import SamplingParams

REFUSED = (400, 404, 413, 422, 429, 503)  # the server says no before it computes
MAX_ERROR_CHARS = 300
PROBE_TOKENS = 4


@dataclass(slots=True)
class Answer:
    """What came back for one request. Times are `time.perf_counter()` seconds.

    Attributes:
        chunk_times: when each chunk with output arrived.
        token_ids: of the output; None where the server shows none.
        finish_reason: the server's; None when the stream broke off.
        usage: the server's counts, or empty.
        status: HTTP status; 0 without an answer.
        error: why there is no whole answer; empty otherwise.
        end: when the answer was over.
    """

    chunk_times: list[float] = field(default_factory=list)
    token_ids: list[int] | None = None
    finish_reason: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    status: int = 0
    error: str = ""
    end: float = 0.0

    @property
    def refused(self) -> bool:
        """Whether the server refused the request before it computed anything."""
        return self.status in REFUSED and not self.chunk_times

    @property
    def num_tokens(self) -> int:
        """Output tokens: as the server counts them, or as it shows them, or its chunks."""
        counted = self.usage.get("completion_tokens")
        if counted is not None:
            return int(counted)
        return len(self.chunk_times if self.token_ids is None else self.token_ids)

    def take(self, event: dict[str, Any], now: float) -> None:
        """Take one event of the stream in, which arrived at `now`.

        Raises:
            TypeError, ValueError, AttributeError: the event is no completion.
        """
        if event.get("error"):
            self.error = _short(event["error"])
        if event.get("usage"):
            self.usage = dict(event["usage"])
            int(self.usage.get("completion_tokens") or 0)
            dict(self.usage.get("prompt_tokens_details") or {})
        for choice in event.get("choices") or ():
            ids = choice.get("token_ids")
            if ids:
                self.token_ids = (self.token_ids or []) + [int(token) for token in ids]
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
            # A last chunk may bring the reason alone; one without a reason is a token, even if its text is not whole.
            if choice.get("text") or ids or not choice.get("finish_reason"):
                self.chunk_times.append(now)


class HttpServer:
    """A connected server.

    Args:
        client: with the server's address and key; no limit on its connections.
        model: the name that the server knows its model by.
        extensions: fields beyond OpenAI's API that it takes.
    """

    def __init__(self, client: httpx.AsyncClient, model: str, extensions: Mapping[str, Any]) -> None:
        self.client, self.model, self.extensions = client, model, dict(extensions)

    @classmethod
    async def connect(
        cls, client: httpx.AsyncClient, model: str | None, extensions: Mapping[str, Any], prompt: list[int]
    ) -> HttpServer:
        """Find the model's name, and whether the server takes `extensions`, with one short request.

        Raises:
            EngineError: there is no such server, or it cannot answer the request.
        """
        if model is None:
            model = await _first_model(client)
        sampling = SamplingParams(max_tokens=PROBE_TOKENS)
        server = cls(client, model, extensions)
        answer = await server.complete(prompt, sampling)
        if answer.status in (400, 422) and extensions:
            server = cls(client, model, {})
            answer = await server.complete(prompt, sampling)
        if answer.error:
            raise EngineError(f"target {client.base_url} cannot answer /v1/completions: {answer.error}")
        return server

    def body(self, prompt: list[int], sampling: SamplingParams) -> bytes:
        """The request's JSON."""
        return orjson.dumps(
            {
                "model": self.model,
                "prompt": prompt,
                "max_tokens": sampling.max_tokens,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            | self.extensions
        )

    async def complete(self, prompt: list[int], sampling: SamplingParams) -> Answer:
        """Send one request and read its stream to the end. A failure is in the answer, never raised."""
        answer = Answer()
        try:
            body = self.body(prompt, sampling)
            async with self.client.stream("POST", "/v1/completions", content=body) as response:
                answer.status = response.status_code
                if response.status_code == 200:
                    await _read(response, answer)
                else:
                    answer.error = f"status {response.status_code}: {_short((await response.aread()).decode())}"
        # StreamError, InvalidURL (of a redirect) and OSError are no HTTPErrors, and would end the other requests too.
        except (httpx.HTTPError, httpx.StreamError, httpx.InvalidURL, OSError, ValueError) as error:
            answer.error = f"{type(error).__name__}: {_short(error)}"
        answer.end = time.perf_counter()
        return answer


async def _read(response: httpx.Response, answer: Answer) -> None:
    done = False
    async for data in _events(response):
        now = time.perf_counter()
        if data == b"[DONE]":
            done = True
        else:
            try:
                answer.take(orjson.loads(data), now)
            except (TypeError, ValueError, AttributeError) as error:
                answer.usage = {}
                answer.error = f"an event of the stream is no completion ({type(error).__name__}: {_short(error)})"
                return
    if not answer.error and not (done and answer.finish_reason):
        answer.error = "the stream ended without a finish_reason and [DONE]"


async def _events(response: httpx.Response) -> AsyncIterator[bytes]:
    """The payloads of the `data:` lines of a stream of server-sent events."""
    rest = b""
    async for piece in response.aiter_bytes():
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()


async def _first_model(client: httpx.AsyncClient) -> str:
    try:
        response = await client.get("/v1/models")
        response.raise_for_status()
        return str(response.json()["data"][0]["id"])
    except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
        raise EngineError(
            f"target {client.base_url} does not answer /v1/models ({type(error).__name__}: {_short(error)}); start the "
            "server, or name its model with http.model"
        ) from error


def _short(error: object) -> str:
    return " ".join(str(error).split())[:MAX_ERROR_CHARS]
