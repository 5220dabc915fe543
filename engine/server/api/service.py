"""What a front does with a request: check it, tokenize it, hand it to the engine, and choose how to answer."""

from __future__ import annotations

import asyncio
import functools
import time
import uuid
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from kvarena.engine.request import SamplingParams
from kvarena.engine.server.api.answers import Disconnected, EventStream, Job, as_api_error, collect, watch_disconnect
from kvarena.engine.server.api.chat import ChatRenderer
from kvarena.engine.server.api.choice_text import ChoiceText, TextOptions
from kvarena.engine.server.api.completions import ChoicePrompt, CompletionRenderer
from kvarena.engine.server.api.constraints import Constraints
from kvarena.engine.server.api.media import check_parts, find_parts, policy_of
from kvarena.engine.server.api.prompts import Prompts, check_chat
from kvarena.engine.server.api.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    SamplingFields,
)
from kvarena.engine.server.api.sampling import (
    COMPLETIONS_MAX_TOKENS,
    check_unsupported,
    fit_max_tokens,
    sampling_params,
    stop_strings,
)
from kvarena.engine.server.api.tracing import Tracer
from kvarena.engine.server.engine.grammar_checks import CheckedGrammar
from kvarena.engine.server.front.client import EngineClient
from kvarena.engine.server.front.dashboard import PoolFeed
from kvarena.engine.server.front.groups import Choice, EngineGone, Group, Refused
from kvarena.engine.server.front.http import Body, read_json, validated
from kvarena.engine.server.shared.config import ServerConfig
from kvarena.engine.server.shared.errors import ApiError, bad_request, beyond_context, unavailable
from kvarena.engine.server.shared.ipc import EngineInfo
from kvarena.engine.server.shared.metrics import Row, health
from kvarena.engine.server.text.tokenization import TokenizerService

_REQUESTS_PER_ROUND = 4
Made = TypeVar("Made")


class Service:
    """One front's state and the two kinds of completion.

    Args:
        config: the operator's settings.
        client: the engine.
        tokenizer: the model's.
        row: this front's metrics.
        engine_row: the engine's metrics and heart-beat.
        model_names: names that requests may use.
        model_root: the model directory.
        defaults: sampling parameters of the model's generation_config.json.
        feed: the dashboard's data.
        tracer: records a span per request, or None.
    """

    def __init__(
        self,
        config: ServerConfig,
        client: EngineClient,
        tokenizer: TokenizerService,
        row: Row,
        engine_row: Row,
        model_names: tuple[str, ...],
        model_root: str,
        defaults: dict[str, float],
        feed: PoolFeed,
        tracer: Tracer | None = None,
    ) -> None:
        self.feed, self.tracer = feed, tracer
        self.config, self.client, self.tokenizer = config, client, tokenizer
        self.row, self.engine_row = row, engine_row
        self.model_names, self.model_root, self._defaults = model_names, model_root, defaults
        self._media = policy_of(config)
        self._constraints = Constraints(client, tokenizer, config.tool_call_parser)
        self.created = int(time.time())
        self.draining = False
        self._turns = asyncio.Semaphore(_REQUESTS_PER_ROUND)

    @functools.cached_property
    def info(self) -> EngineInfo:
        """What the engine told of itself, with the model's defaults."""
        assert self.client.info is not None
        return replace(self.client.info, defaults=self._defaults)

    def close(self) -> None:
        """End the processes beside the front."""
        self._constraints.close()

    def check_open(self) -> None:
        """503 when no request can be taken."""
        if self.draining:
            self.row.inc("vllm:admission_rejections", "draining")
            raise unavailable("The server is shutting down.", "draining", retry_after=5)
        state = health(self.engine_row, self.config.heartbeat_timeout, self.config.stall_timeout)
        if self.client.gone or not state.alive:
            self.row.inc("vllm:admission_rejections", "engine_dead")
            raise unavailable(f"The engine is gone: {self.client.gone or state.reason}.", "engine_dead", retry_after=5)

    @functools.cached_property
    def prompts(self) -> Prompts:
        """Makes token ids of requests."""
        return Prompts(self.tokenizer, self.info.max_model_len)

    async def read(self, request: Request, kind: type[Body]) -> Body:
        """The body as `kind`. Raises ApiError."""
        body = await read_json(request, self.config)
        await self._turn()
        return validated(body, kind)

    async def _turn(self) -> None:
        """Let few requests per round of the event loop begin: in a crowd, `/health` and open streams go on."""
        async with self._turns:
            await asyncio.sleep(0)

    def check_model(self, name: str | None) -> str:
        """The served name that a request means. Raises a 404 for any other."""
        if name is None or name == "":
            return self.model_names[0]
        if name not in self.model_names:
            raise ApiError(
                404,
                f"The model `{name[:100]}` does not exist. Served here: {', '.join(self.model_names)}.",
                "model",
                "model_not_found",
            )
        return name

    async def completions(self, request: Request) -> Response:
        """`/v1/completions`."""
        arrival = time.monotonic()
        req = await self.read(request, CompletionRequest)
        model = self.check_model(req.model)
        self.check_open()
        check_unsupported(req, self.config, self.info.priorities)
        if req.suffix:
            raise bad_request("suffix is not supported", "suffix")
        if req.echo and req.stream and req.logprobs is not None:
            raise bad_request("echo with logprobs is not available with stream=true", "echo")
        if req.max_tokens == 0 and not (req.echo and not req.stream):
            raise bad_request("max_tokens must be at least 1 (0 is allowed with echo, without stream)", "max_tokens")
        if req.echo and req.logprobs is not None:
            req.prompt_logprobs = max(req.logprobs, req.prompt_logprobs or 0)
        prompts = await self.prompts.of_completion(req, self.info.vocab_size, self.config.max_prompts)
        default = self.info.default_length(COMPLETIONS_MAX_TOKENS)
        lengths = [fit_max_tokens(req.max_tokens, default, len(ids), self.info, "prompt") for ids in prompts]
        shown = [one for ids in prompts for one in [await self.prompts.shown(ids, req)] * (req.n or 1)]
        renderer = CompletionRenderer(
            self._head("cmpl", model),
            self.tokenizer,
            shown,
            echo=bool(req.echo),
            logprobs=req.logprobs is not None,
            prompt_logprobs=req.prompt_logprobs is not None and not (req.echo and req.logprobs is not None),
            return_token_ids=bool(req.return_token_ids),
            max_tokens_zero=req.max_tokens == 0,
            streams=bool(req.stream),
        )
        constraint = await self._constrained(request, self._constraints.of(req))
        job = await self._submit(request, req, shown, prompts, lengths, req.logprobs, constraint, arrival, renderer)
        return await self._answer(request, job, bool(req.stream))

    async def chat(self, request: Request) -> Response:
        """`/v1/chat/completions`."""
        arrival = time.monotonic()
        req = await self.read(request, ChatCompletionRequest)
        model = self.check_model(req.model)
        self.check_open()
        check_unsupported(req, self.config, self.info.priorities)
        check_chat(req)
        await self._refuse_images(req)
        prompt = await self.prompts.of_chat(req)
        requested = req.max_completion_tokens if req.max_completion_tokens is not None else req.max_tokens
        max_tokens = fit_max_tokens(requested, self.info.default_length(None), len(prompt), self.info, "messages")
        output = await self._constrained(request, self._constraints.of_chat(req, prompt))
        logprobs = (req.top_logprobs or 0) if req.logprobs else None
        shown = [await self.prompts.shown(prompt, req, output.kept)] * (req.n or 1)
        renderer = ChatRenderer(
            self._head("chatcmpl", model),
            self.tokenizer,
            shown,
            make_parser=output.make_parser,
            forced_call=output.is_named,
            logprobs=logprobs is not None,
            prompt_logprobs=req.prompt_logprobs is not None,
            return_token_ids=bool(req.return_token_ids),
            streams=bool(req.stream),
        )
        job = await self._submit(
            request, req, shown, [prompt], [max_tokens], logprobs, output.constraint, arrival, renderer
        )
        return await self._answer(request, job, bool(req.stream))

    async def _constrained(self, request: Request, work: Coroutine[Any, Any, Made]) -> Made:
        """What `work` gives; a client that leaves meanwhile ends it. Raises ApiError, Disconnected."""
        group = Group(0.0)
        task = asyncio.ensure_future(work)
        watcher = asyncio.create_task(watch_disconnect(request.receive, group))
        watcher.add_done_callback(lambda _: task.cancel() if group.error is not None else None)
        try:
            return await task
        except asyncio.CancelledError:
            if isinstance(group.error, Disconnected):
                raise group.error from None
            raise
        finally:
            watcher.cancel()

    async def _refuse_images(self, req: ChatCompletionRequest) -> None:
        parts = find_parts(req.messages, self._media)
        if parts:
            await asyncio.to_thread(check_parts, parts, self._media)
            raise bad_request(f"{parts[0].place} holds an image; this model reads text only", "messages")

    def _head(self, prefix: str, model: str) -> dict[str, Any]:
        return {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    async def _submit(
        self,
        request: Request,
        req: SamplingFields,
        shown: list[ChoicePrompt],
        prompts: list[list[int]],
        max_tokens: list[int],
        logprobs: int | None,
        constraint: CheckedGrammar | None,
        arrival: float,
        renderer: CompletionRenderer | ChatRenderer,
    ) -> Job:
        """Hand the prompts to the engine and wait until all are queued."""
        if req.prompt_logprobs is not None and not self.info.prompt_logprobs:
            raise bad_request("log-probabilities of the prompt are not available with this runner", "prompt_logprobs")
        group = Group(arrival)
        stops = tuple(stop_strings(req))
        samplings = [
            sampling_params(req, self.config, self.info, max_tokens=most, logprobs=logprobs) for most in max_tokens
        ]
        # What the queue can never hold is the request's fault: a 503 would be tried again for ever.
        most = min(self.config.max_prompts, self.config.max_num_queued_requests)
        if len(prompts) * (req.n or 1) > most:
            raise bad_request(f"more than {most} choices in one request", "n")
        choices = await self._admit(request, req, group, prompts, samplings, constraint)
        self.row.observe("vllm:request_params_n", req.n or 1)
        for num_tokens in max_tokens:
            self.row.observe("vllm:request_params_max_tokens", num_tokens)
        options = TextOptions(
            stops=stops,
            include_stop=bool(req.include_stop_str_in_output),
            min_tokens=req.min_tokens or 0,
            ignore_eos=bool(req.ignore_eos),
        )
        texts = [
            ChoiceText.start(choice, self.client, prompt.stream.copy(), options)
            for choice, prompt in zip(choices, shown, strict=True)
        ]
        include_usage = req.stream_options is not None and bool(req.stream_options.include_usage)
        job = Job(group, texts, renderer, self.client, sum(map(len, prompts)), include_usage)
        if self.tracer is not None:
            job.on_end = functools.partial(
                self.tracer.record, job, request.scope["kvarena"].request_id, request.headers
            )
        return job

    async def _admit(
        self,
        request: Request,
        req: SamplingFields,
        group: Group,
        prompts: list[list[int]],
        samplings: list[SamplingParams],
        constraint: CheckedGrammar | None,
    ) -> list[Choice]:
        """Wait until the engine has queued all prompts; a disconnect ends them. Raises ApiError, Disconnected."""
        choices: list[Choice] = []
        if constraint is not None:
            self.client.constrain(constraint)
        state = request.scope["kvarena"]
        submit = asyncio.gather(
            *(
                self.client.submit(
                    group,
                    prompt,
                    request_id=f"req-{uuid.uuid4().hex}",
                    sampling=sampling,
                    priority=req.priority or 0,
                    client_id=req.user or "",
                    cache_salt=req.cache_salt or "",
                    constraint=None if constraint is None else constraint.key,
                    shown_id=state.request_id,
                    key=state.key,
                )
                for prompt, sampling in zip(prompts, samplings, strict=True)
            )
        )
        watcher = asyncio.create_task(watch_disconnect(request.receive, group))
        watcher.add_done_callback(lambda _: submit.cancel() if group.error is not None else None)
        try:
            for made in await submit:
                choices += made
        except Refused as refused:
            self.client.abort(group.choices, "abort")
            raise self._refusal(refused) from None
        except EngineGone as error:
            raise as_api_error(error) from None
        except asyncio.CancelledError:
            self.client.abort(group.choices, "abort")
            if isinstance(group.error, Disconnected):
                raise group.error from None
            raise
        finally:
            watcher.cancel()
        return choices

    def _refusal(self, refused: Refused) -> ApiError:
        if refused.reason == "queue_full":
            self.row.inc("vllm:admission_rejections", "queue_full")
            return unavailable(f"The server is overloaded: {refused}. Try again later.", "queue_full")
        if refused.reason in ("max_model_len", "max_request_tokens"):
            self.row.inc("vllm:admission_rejections", refused.reason)
            return beyond_context(str(refused), "prompt")
        if refused.reason == "constraint_lost":
            return unavailable(str(refused), "constraints_busy")
        return bad_request(str(refused))

    async def _answer(self, request: Request, job: Job, stream: bool) -> Response:
        if not stream:
            try:
                return await collect(job, request.receive)
            except Disconnected:
                return Response(status_code=499)
        return EventStream(job, {"x-request-id": request.scope["kvarena"].request_id})
