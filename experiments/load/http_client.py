"""One streamed `/v1/completions` request to any OpenAI-compatible server, timed chunk by chunk.

Prompts go out as token ids, so nothing is tokenised again. What is not part of OpenAI's API (`ignore_eos`,
`return_token_ids`, `top_k`, ...) is sent to servers that take it; `HttpServer.connect` finds that out.

A chunk is timed where it brings tokens: token ids if the server shows them, else text. So a chunk that only says that
somebody is there, repeats a role or brings the reason of the end is no first token; what a server does not show, such
as a token of which no character is whole yet, is not timed either.
"""

from __future__ import annotations

import time
from codecs import BOM_UTF8
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from orjson import dumps, loads

from kvarena.engine.errors import EngineError
from kvarena.engine.request import SamplingParams
from kvarena.experiments.load.connection import HttpClient

REFUSED = (400, 404, 413, 422, 429, 503)  # the server says no before it computes
MAX_ERROR_CHARS = 300
PROBE_TOKENS = 4
MOST = 2**31 - 1  # what a column of requests.parquet holds
DRAIN = 0.1  # seconds that a server has to close its answer behind [DONE], so that the connection serves again
LONGEST_DONE = 32  # bytes of a line that may be "data: [DONE]"


@dataclass(slots=True)
class Answer:
    """What came back for one request. Times are `time.perf_counter()` seconds.

    Attributes:
        start: when the request was sent.
        chunk_times: when each chunk that brought tokens arrived.
        first_ids: how many token ids the first of these showed.
        shows_ids: whether chunks are told by their token ids (True) or their text; None before the first one.
        token_ids: of the output; None where the server shows none.
        finish_reason: the server's; None when the stream broke off.
        usage: the server's counts, or empty.
        status: HTTP status; 0 without an answer.
        error: why there is no whole answer; empty otherwise.
        end: when the answer was over: its last token and its reason were there, or it failed.
        hang_up_after: the client hangs up when more chunks than that have brought tokens; None: it hears all of it.
        is_cut: whether it did.
    """

    start: float = 0.0
    chunk_times: list[float] = field(default_factory=list)
    first_ids: int = 0
    shows_ids: bool | None = None
    token_ids: list[int] | None = None
    finish_reason: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    status: int = 0
    error: str = ""
    end: float = 0.0
    hang_up_after: int | None = None
    is_cut: bool = False
    _rest: bytes = b""  # of a line; of a refusal, all of it
    _is_done: bool = False

    @property
    def wait(self) -> float | None:
        """Seconds until the first tokens were there; None where none came."""
        return self.chunk_times[0] - self.start if self.chunk_times else None

    @property
    def gaps(self) -> list[float]:
        """Seconds between chunks that brought tokens."""
        return [after - before for before, after in pairwise(self.chunk_times)]

    @property
    def refused(self) -> bool:
        """Whether the server refused the request before it computed anything."""
        return self.status in REFUSED and not self.chunk_times

    @property
    def counted(self) -> int | None:
        """Output tokens as the server counts them; None where it does not say."""
        return self.usage.get("completion_tokens")

    @property
    def num_shown(self) -> int:
        """Output tokens as the stream shows them: token ids, else one a chunk."""
        return len(self.chunk_times) if self.token_ids is None else len(self.token_ids)

    @property
    def num_tokens(self) -> int:
        """Output tokens: as the server counts them, else as it shows them."""
        return self.num_shown if self.counted is None else self.counted

    @property
    def num_first_tokens(self) -> int:
        """Output tokens that came with the first chunk; one where that cannot be told, all where no other came."""
        if len(self.chunk_times) == 1 and not self.shows_ids:
            return self.num_tokens
        return self.first_ids if self.shows_ids else min(1, len(self.chunk_times))

    @property
    def has_merged_chunks(self) -> bool:
        """Whether a chunk brought several tokens, or some came without a chunk of their own."""
        return self.num_tokens > len(self.chunk_times) or self.num_shown > len(self.chunk_times)

    @property
    def last_token_time(self) -> float | None:
        """When the last token was there; the answer's end where tokens came that no chunk showed."""
        if not self.chunk_times:
            return None
        return self.end if self.num_tokens > self.num_shown else self.chunk_times[-1]

    def receive(self, piece: bytes, now: float) -> float | None:
        """Take a piece of the stream; see `Receiver`. What comes behind [DONE] is no part of the answer."""
        if self.status != 200:
            self._rest += piece
            return None
        if self._is_done or self.error:
            return None
        lines = _with_line_feeds(self._rest + piece).split(b"\n")
        self._rest = lines.pop()
        try:
            for line in lines:
                line = line.removeprefix(BOM_UTF8)  # a stream may begin with it
                if line[:5] == b"data:":
                    if len(line) < LONGEST_DONE and line[5:].strip() == b"[DONE]":
                        self._is_done = True
                        return DRAIN
                    self.take(loads(line[5:]), now)
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            self.usage = {}
            self.error = f"an event of the stream is no completion ({type(error).__name__}: {_short(error)})"
            return 0.0
        if self.hang_up_after is None:
            return None
        self.is_cut = len(self.chunk_times) > self.hang_up_after
        return 0.0 if self.is_cut else None

    def take(self, event: dict[str, Any], now: float) -> None:
        """Take one event of the stream in, which arrived at `now`.

        Raises:
            TypeError, ValueError, AttributeError, OverflowError: the event is no completion.
        """
        if event.get("error"):
            self.error = _short(event["error"])
        if event.get("usage"):
            self.usage = _usage(event["usage"])
        for choice in event.get("choices") or ():
            ids, text = choice.get("token_ids"), choice.get("text")
            if text.__class__ is not str and text is not None:
                raise TypeError(f"text is {text!r}")
            if ids:
                self.token_ids = (self.token_ids or []) + [_number(token) for token in ids]
            if self.shows_ids is None and (ids or text):
                self.shows_ids, self.first_ids = bool(ids), len(ids or ())
            if ids if self.shows_ids else text:
                self.chunk_times.append(now)
                self.end = now
            if choice.get("finish_reason"):
                self.finish_reason, self.end = choice["finish_reason"], now

    def finish(self) -> None:
        """The answer has ended: say what it lacks."""
        if self.status != 200:
            self.error = f"status {self.status}: {_short(self._rest.decode(errors='replace'))}"
        elif not (self.error or self.is_cut):
            rest = self._rest
            self.receive(b"\n", time.perf_counter())  # the last line may lack its end
            if not (self.error or (self._is_done and self.finish_reason)):
                said = "" if self.chunk_times or not rest else f": {_short(rest.decode(errors='replace'))}"
                self.error = f"the stream ended without a finish_reason and [DONE]{said}"
        self._rest = b""


def _usage(value: Any) -> dict[str, Any]:
    """What is used of a server's counts. Raises TypeError, ValueError or AttributeError where it is none."""
    details = dict(value.get("prompt_tokens_details") or {})
    counts = {key: value.get(key) for key in ("prompt_tokens", "completion_tokens")}
    counts["cached_tokens"] = details.get("cached_tokens")
    return {key: _number(count) for key, count in counts.items() if count is not None}


def _number(value: Any) -> int:
    number = int(value)
    if not 0 <= number <= MOST:
        raise ValueError(f"{value} is no number of tokens")
    return number


class HttpServer:
    """A connected server.

    Args:
        client: with the server's address and key.
        model: the name that the server knows its model by; None: the server has but one.
        extensions: fields beyond OpenAI's API that it takes.
    """

    def __init__(self, client: HttpClient, model: str | None, extensions: Mapping[str, Any]) -> None:
        self.client, self.model, self.extensions = client, model, dict(extensions)

    @classmethod
    async def connect(
        cls, client: HttpClient, model: str | None, extensions: Mapping[str, Any], prompt: list[int]
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
            raise EngineError(f"target {client.url} cannot answer /v1/completions: {answer.error}")
        return server

    def body(self, prompt: list[int], sampling: SamplingParams) -> bytes:
        """The request's JSON."""
        return dumps(
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

    async def complete(self, prompt: list[int], sampling: SamplingParams, answer: Answer | None = None) -> Answer:
        """Send one request and read its stream to the end. A failure is in the answer, never raised.

        Args:
            prompt: token ids.
            sampling: of the request.
            answer: filled in while it comes, and returned; None makes one.
        """
        answer = Answer() if answer is None else answer
        answer.start = time.perf_counter()
        try:
            await self.client.send("POST", "/v1/completions", self.body(prompt, sampling), answer)
            answer.finish()
        except (OSError, ValueError) as error:
            answer.error = f"{type(error).__name__}: {_short(error)}"
        if answer.error:
            answer.end = time.perf_counter()
        return answer


async def _first_model(client: HttpClient) -> str:
    try:
        reply = await client.request("GET", "/v1/models")
        if reply.status != 200:
            raise ConnectionError(f"status {reply.status}")
        return str(loads(reply.body)["data"][0]["id"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise EngineError(
            f"target {client.url} does not answer /v1/models ({type(error).__name__}: {_short(error)}); start the "
            "server, or name its model with http.model"
        ) from error


def _with_line_feeds(text: bytes) -> bytes:
    """The ends of lines that server-sent events allow, as one; a last CR stays, whose LF may be on its way."""
    if b"\r" not in text:
        return text
    text = text.replace(b"\r\n", b"\n")
    return text[:-1].replace(b"\r", b"\n") + text[-1:]


def _short(error: object) -> str:
    return " ".join(str(error).split())[:MAX_ERROR_CHARS]
