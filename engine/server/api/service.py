"""What a front does with a request: check it, tokenize it, hand it to the engine, and choose how to answer."""

from __future__ import annotations

import asyncio
import functools
import re
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response

from kvarena.engine.request import ImageSpan, SamplingParams
from kvarena.engine.server.api.answers import Answer, EventStream, collect, while_connected
from kvarena.engine.server.api.chat import ChatAnswer
from kvarena.engine.server.api.completions import CompletionAnswer
from kvarena.engine.server.api.constraints import Constraints
from kvarena.engine.server.api.prompts import Prompts, check_chat
from kvarena.engine.server.api.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    SamplingFields,
    StreamOptions,
    TokenizeRequest,
)
from kvarena.engine.server.api.sampling import (
    COMPLETIONS_MAX_TOKENS,
    check_unsupported,
    fit_max_tokens,
    sampling_params,
)
from kvarena.engine.server.api.spoken import Spoken
from kvarena.engine.server.api.thinking import switch_of
from kvarena.engine.server.api.tracing import Tracer
from kvarena.engine.server.api.turn import Reading, Turn
from kvarena.engine.server.engine.grammar_checks import CheckedGrammar
from kvarena.engine.server.forms.thoughts import template_text
from kvarena.engine.server.front.dashboard import PoolFeed
from kvarena.engine.server.front.engines import Engines
from kvarena.engine.server.front.groups import EngineGone, Refused
from kvarena.engine.server.front.http import Body, read_json, validated
from kvarena.engine.server.media.reader import ImageReader
from kvarena.engine.server.shared.config import ServerConfig
from kvarena.engine.server.shared.errors import (
    ApiError,
    bad_request,
    beyond_context,
    ended_by_operator,
    unavailable,
)
from kvarena.engine.server.shared.ipc import ABORTED, KEY_LIMIT, PAUSED, AddFrame, EngineInfo, pack_ids, pack_image
from kvarena.engine.server.shared.metrics import Row
from kvarena.engine.server.text.tokenization import TokenizerService

_REQUESTS_PER_ROUND = 4
_MAX_RETRIES = 3


class MakeTurn(Protocol):
    """Makes the answer to a chat."""

    def __call__(
        self, client: Engines, req: ChatCompletionRequest, model: str, arrival: float, *, reading: Reading
    ) -> Turn:
        """Arguments as of `Turn`."""
        ...


class Service:
    """One front's state and the two kinds of completion.

    Args:
        config: the operator's settings.
        client: the engines.
        tokenizer: the model's.
        row: this front's metrics.
        model_names: names that requests may use.
        model_root: the model directory.
        defaults: sampling parameters of the model's generation_config.json.
        feed: the dashboard's data.
        images: takes images in.
        tracer: records a span per request, or None.
    """

    def __init__(
        self,
        config: ServerConfig,
        client: Engines,
        tokenizer: TokenizerService,
        row: Row,
        model_names: tuple[str, ...],
        model_root: str,
        defaults: dict[str, float],
        feed: PoolFeed,
        images: ImageReader,
        tracer: Tracer | None = None,
    ) -> None:
        self.feed, self.tracer = feed, tracer
        self.config, self.client, self.tokenizer = config, client, tokenizer
        self.row = row
        self.model_names, self.model_root, self._defaults = model_names, model_root, defaults
        self._images = images
        self._spoken = Spoken(tokenizer, config)
        self._constraints = Constraints(client, tokenizer, self._spoken)
        self.created = int(time.time())
        self.draining = False
        self._turns = asyncio.Semaphore(_REQUESTS_PER_ROUND)

    @functools.cached_property
    def info(self) -> EngineInfo:
        """What the engines told of themselves, with the model's defaults."""
        return replace(self.client.info, defaults=self._defaults)

    def close(self) -> None:
        """End the processes beside the front."""
        self._constraints.close()
        self._images.close()

    def check_open(self) -> None:
        """503 when no request can be taken."""
        if self.draining:
            self.row.inc("vllm:admission_rejections", "draining")
            raise unavailable("The server is shutting down.", "draining", retry_after=5)
        if (pauses := self.client.pauses) and min(pauses) == 2:
            raise self._paused()
        if fault := self.client.fault_of_all():
            self.row.inc("vllm:admission_rejections", "engine_dead")
            raise unavailable(f"The engine is gone: {fault}.", "engine_dead", retry_after=5)

    @functools.cached_property
    def prompts(self) -> Prompts:
        """Makes token ids of requests."""
        return Prompts(self.tokenizer, self.info.max_model_len, self._images.tokens)

    @functools.cached_property
    def can_think(self) -> bool:
        """Whether the model can be told to think, or not to."""
        return switch_of(template_text(self.tokenizer.tokenizer)) is not None

    async def read(self, request: Request, kind: type[Body]) -> Body:
        """The body as `kind`. Raises ApiError."""
        body = await read_json(request, self.config)
        async with self._turns:  # few requests per round begin: in a crowd, `/health` and open streams go on
            await asyncio.sleep(0)
        return validated(body, kind)

    def admit(self, req: SamplingFields) -> str:
        """The served name that a request means. Raises ApiError when it cannot be taken."""
        model = self.check_model(req.model)
        self.check_open()
        if self.config.force_include_usage and req.stream:
            options = req.stream_options or StreamOptions()
            req.stream_options = options.model_copy(update={"include_usage": True, "continuous_usage_stats": True})
        check_unsupported(req, self.config, self.info.priorities)
        return model

    def check_model(self, name: str | None) -> str:
        """The served name that a request means. Raises a 404 for any other."""
        if name is None or name == "":
            return self.model_names[0]
        if name not in self.model_names and name not in self.config.model_aliases:
            raise ApiError(
                404,
                f"The model `{name[:100]}` does not exist. Served here: {', '.join(self.model_names)}.",
                "model",
                "model_not_found",
            )
        return name

    async def completions(self, request: Request, req: CompletionRequest | None = None) -> Response:
        """`/v1/completions`; `req` where its body was read before."""
        arrival = time.monotonic()
        req = await self.read(request, CompletionRequest) if req is None else req
        model = self.admit(req)
        work = functools.partial(self._complete, request, req, model, arrival)
        return await while_connected(request.receive, self._retried(work, bool(req.stream)))

    async def chat(self, request: Request, req: ChatCompletionRequest | None = None) -> Response:
        """`/v1/chat/completions`; `req` where its body was read before."""
        arrival = time.monotonic()
        req = await self.read(request, ChatCompletionRequest) if req is None else req
        return await while_connected(request.receive, self.converse(request, req, ChatAnswer, arrival))

    async def converse(
        self, request: Request, req: ChatCompletionRequest, make: MakeTurn, arrival: float, *, clamps: bool = False
    ) -> Response:
        """Answer a chat, as `make` shows it. Every API that has turns comes through here.

        Args:
            request: the HTTP request.
            req: what is asked.
            make: makes the answer; again for each attempt.
            arrival: when the request came, on the monotonic clock.
            clamps: more output tokens than there is room for are fewer, and no error.

        Raises:
            ApiError: it cannot be answered.
        """
        model = self.admit(req)
        work = functools.partial(self._chat, request, req, model, arrival, make, clamps)
        return await self._retried(work, bool(req.stream))

    async def _retried(self, work: Callable[[], Coroutine[Any, Any, Response]], streams: bool) -> Response:
        """The answer; one of which nothing was sent is made again when its engine is lost and there is another."""
        for _ in range(0 if streams else _MAX_RETRIES):
            try:
                return await work()
            except EngineGone:
                if self.client.fault_of_all():
                    raise
        return await work()

    async def _complete(self, request: Request, req: CompletionRequest, model: str, arrival: float) -> Response:
        if req.suffix:
            raise bad_request("suffix is not supported", "suffix")
        if req.echo and req.stream and req.logprobs is not None:
            raise bad_request("echo with logprobs is not available with stream=true", "echo")
        if req.max_tokens == 0 and not (req.echo and not req.stream):
            raise bad_request("max_tokens must be at least 1 (0 is allowed with echo, without stream)", "max_tokens")
        self._name_tokens(req)
        shown = req.prompt_logprobs
        if req.echo and req.logprobs is not None:
            both = (req.logprobs, req.prompt_logprobs or 0)
            req.prompt_logprobs = -1 if -1 in both else max(both)
        prompts = await self.prompts.of_completion(req, self.info.vocab_size, self.config.max_prompts)
        default = self.info.default_length(COMPLETIONS_MAX_TOKENS)
        lengths = [fit_max_tokens(req.max_tokens, default, len(ids), self.info, "prompt") for ids in prompts]
        constraint = await self._constraints.of(req)
        self._check_scores(req)
        answer = CompletionAnswer(
            self.client, req, model, arrival, detokenizer=self.tokenizer.detokenizer, shown_prompt_logprobs=shown
        )
        self._check_lists(req, constraint)
        samplings = self._samplings(req, lengths, req.logprobs, await self.prompts.barred(req))
        for ids, sampling in zip(prompts, samplings, strict=True):
            echoed, stream = await self.prompts.begin(ids, req)
            answer.add_prompt(ids, sampling, stream, echoed)
        return await self._answer(request, answer, constraint)

    async def _chat(
        self, request: Request, req: ChatCompletionRequest, model: str, arrival: float, make: MakeTurn, clamps: bool
    ) -> Response:
        check_chat(req)
        self._name_tokens(req)
        images = await self._images.open(req.messages)
        prompt, places = await self.prompts.of_chat(req, self._images.num_tokens(images))
        requested = req.max_completion_tokens if req.max_completion_tokens is not None else req.max_tokens
        if clamps and requested is not None:
            room = min(self.info.max_model_len, self.info.max_request_tokens) - len(prompt)
            requested = max(1, min(requested, room))
        max_tokens = fit_max_tokens(requested, self.info.default_length(None), len(prompt), self.info, "messages")
        spans = await self._images.spans(images, places)
        constraint = await self._constraints.of_chat(req, prompt)
        self._check_scores(req)
        reading, kept = self._spoken.reading(req, prompt), self._spoken.kept(req)
        answer = make(self.client, req, model, arrival, reading=reading)
        self._check_lists(req, constraint)
        logprobs = (req.top_logprobs or 0) if req.logprobs else None
        [sampling] = self._samplings(req, [max_tokens], logprobs, await self.prompts.barred(req))
        _, stream = await self.prompts.begin(prompt, req, kept)
        answer.add_prompt(prompt, sampling, stream)
        return await self._answer(request, answer, constraint, spans)

    async def chat_ids(self, req: TokenizeRequest | ChatCompletionRequest) -> list[int]:
        """Token ids of a chat that is only counted, its images by their headers. Raises ApiError."""
        images = await self._images.open(req.messages or [])
        return (await self.prompts.of_chat(req, self._images.num_tokens(images))).token_ids

    def _name_tokens(self, req: SamplingFields) -> None:
        if req.return_tokens_as_token_ids is None:
            req.return_tokens_as_token_ids = self.config.return_tokens_as_token_ids

    def _check_scores(self, req: SamplingFields) -> None:
        if req.prompt_logprobs is not None and not self.info.prompt_logprobs:
            raise bad_request("log-probabilities of the prompt are not available with this runner", "prompt_logprobs")

    def _check_lists(self, req: SamplingFields, constraint: CheckedGrammar | None) -> None:
        """400 where lists of tokens cannot be held to."""
        if req.use_beam_search and constraint is not None:
            text = "use_beam_search does not go with structured output, held calls or a thought's budget"
            raise bad_request(text, "use_beam_search")
        for name in ("allowed_token_ids", "bad_words"):
            if not getattr(req, name):
                continue
            if not self.info.constraints:
                raise bad_request(f"{name} is not available with this runner", name)
            if constraint is not None:
                raise bad_request(f"{name} does not go with structured output, held calls or a thought's budget", name)

    def _samplings(
        self, req: SamplingFields, lengths: list[int], logprobs: int | None, barred: tuple[tuple[int, ...], ...] = ()
    ) -> list[SamplingParams]:
        """How each prompt's tokens are picked, checked once for all that may have as many. Raises ApiError."""
        made = {
            most: sampling_params(req, self.config, self.info, max_tokens=most, logprobs=logprobs, barred=barred)
            for most in dict.fromkeys(lengths)
        }
        # What the queue can never hold is the request's fault: a 503 would be tried again for ever.
        most = min(self.config.max_prompts, self.config.max_num_queued_requests)
        if sum(made[length].num_sequences for length in lengths) > most:
            raise bad_request(f"more than {most} choices in one request", "n")
        return [made[most] for most in lengths]

    async def _answer(
        self,
        request: Request,
        answer: Answer,
        constraint: CheckedGrammar | None,
        images: tuple[ImageSpan, ...] = (),
    ) -> Response:
        """Hand the prompts to the engine, wait until all are queued, and answer. Raises ApiError."""
        state, req = request.state, answer.req
        priority = self._priority(req, state.key)
        answer.shows_metrics = self.config.per_request_metrics
        if constraint is not None:
            self.client.constrain(constraint)
        try:
            admissions = []
            for number, choices in enumerate(answer.prompts):
                frame = AddFrame(
                    handle=0,
                    request_id=f"{answer.id}:{number}",
                    prompt=pack_ids(choices[0].prompt),
                    sampling=choices[0].sampling,
                    arrival=answer.arrival,
                    priority=priority,
                    client_id=f"key {state.key}" if self.config.clients_by == "key" else req.user or "",
                    cache_salt=req.cache_salt or "",
                    constraint=None if constraint is None else constraint.key,
                    shown_id=state.request_id,
                    key=state.key,
                    images=[pack_image(image) for image in images],
                )
                admissions.append(self.client.submit(frame, choices))
            await asyncio.gather(*admissions)
        except Refused as refused:
            self.client.abort(answer.choices, "abort")
            raise self._refusal(refused) from None
        except asyncio.CancelledError:
            self.client.abort(answer.choices, "abort")
            raise
        self.row.observe("vllm:request_params_n", req.n or 1)
        for choices in answer.prompts:
            most = 0 if req.max_tokens == 0 else choices[0].sampling.max_tokens
            self.row.observe("vllm:request_params_max_tokens", most)
        if self.tracer is not None:
            self.tracer.watch(answer)
            answer.on_end = functools.partial(self.tracer.record, answer, state.request_id, request.headers)
        if req.stream:
            return EventStream(answer, state.request_id)
        return await collect(answer)

    def _priority(self, req: SamplingFields, key: int) -> int:
        """A request's priority, as its key may have it; without one as close to 0 as that is. Raises ApiError."""
        bounds = self.config.least_priority_by_key
        if not 0 <= key < len(bounds):
            return req.priority or 0
        if req.priority is not None and req.priority < bounds[key]:
            raise ApiError(
                403, f"This key may ask for priorities from {bounds[key]} on.", "priority", "priority_not_allowed"
            )
        return max(0, bounds[key]) if req.priority is None else req.priority

    def _paused(self) -> ApiError:
        self.row.inc("vllm:admission_rejections", PAUSED)
        return unavailable("The server is paused.", PAUSED, retry_after=5)

    def _refusal(self, refused: Refused) -> ApiError:
        if refused.reason == PAUSED:
            return self._paused()
        if refused.reason == ABORTED:
            return ended_by_operator()
        if refused.reason in ("queue_full", "images_full"):
            self.row.inc("vllm:admission_rejections", "queue_full")
            return unavailable(f"The server is overloaded: {refused}. Try again later.", "queue_full")
        if refused.reason == KEY_LIMIT:
            self.row.inc("vllm:admission_rejections", KEY_LIMIT)
            found = re.search(r"in (\d+) s$", str(refused))
            wait = {"Retry-After": found[1] if found else "1"}
            return ApiError(429, f"Too many requests: {refused}.", code="rate_limit_exceeded", headers=wait)
        if refused.reason in ("max_model_len", "max_request_tokens"):
            self.row.inc("vllm:admission_rejections", refused.reason)
            return beyond_context(str(refused), "prompt")
        if refused.reason == "constraint_lost":
            return unavailable(str(refused), "constraints_busy")
        return bad_request(str(refused))
