"""`kvarena.LLM`: texts from a model in this process, by any strategy, with the tokens that the server would give.

    prompts, messages --the server's own checks, templates and defaults--> Request --> engine.step() ... --> texts

What differs from `kvarena serve` is that nothing is sent over a socket: the engine is built by the same function from
the same flags, and prompts and answers pass through the same tokenizer, detokenizer and stop matcher.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from kvarena.engine.core import Engine, StepFailed, StepOutput
from kvarena.engine.errors import ConfigError, EngineError, RequestError
from kvarena.engine.request import FinishReason, ImageSpan, Request, expand
from kvarena.engine.server.api.prompts import Prompts, check_chat
from kvarena.engine.server.api.protocol import ChatCompletionRequest, CompletionRequest, SamplingFields
from kvarena.engine.server.api.sampling import (
    COMPLETIONS_MAX_TOKENS,
    check_unsupported,
    fit_max_tokens,
    sampling_params,
    stop_strings,
)
from kvarena.engine.server.front.groups import Choice, Group
from kvarena.engine.server.media.parts import policy_of
from kvarena.engine.server.media.reader import ImageReader, image_inputs
from kvarena.engine.server.text.tokenization import TokenizerService, generation_defaults
from kvarena.experiments.building.model_files import check_model
from kvarena.experiments.serving.flags import overrides_of, parse_flags
from kvarena.experiments.serving.serve import build_served_engine
from kvarena.experiments.settings.compose import compose_cell
from kvarena.experiments.settings.outside import offer
from kvarena.experiments.settings.strategies import strategy_names, strategy_options
from kvarena.running import check_ours, one_line_errors
from kvarena.settings import Strategy, as_overrides
from kvarena.texts import CompletionOutput, Logprob, RequestOutput, SamplingParams, request_errors

# Flags of `kvarena serve` that are about the engine and its texts, by their names as Python arguments.
OPTIONS = (
    "trust_remote_code", "dtype", "load_format", "device", "gpu_memory_utilization", "max_model_len", "max_num_seqs",
    "max_num_batched_tokens", "block_size", "num_gpu_blocks_override", "kv_cache_memory_gib", "swap_space",
    "kv_offloading_size",
    "enable_prefix_caching", "async_scheduling", "tensor_parallel_size", "pipeline_parallel_size", "quantization",
    "distributed_executor_backend",
    "enforce_eager", "seed", "chat_template", "generation_config", "max_logprobs",
    "allowed_local_media_path", "allowed_media_domains", "limit_mm_per_prompt",
)  # fmt: skip
BOTH_WAYS = ("enable_prefix_caching", "async_scheduling")  # these have a --no- form


class _Asked(Group):
    """A prompt on its way, and its choices.

    Args:
        client: of the LLM.
        req: what is asked.
        prompt: as it was given, where that was text.
        images: of the prompt.
    """

    def __init__(self, client: _Client, req: SamplingFields, prompt: str | None, images: tuple[ImageSpan, ...]) -> None:
        super().__init__(client, 0.0)
        self.req, self.stops, self.prompt = req, stop_strings(req), prompt
        self.images, self.request_id = images, ""


class _Client:
    """What takes the place of the server's client: a choice that a stop string ended leaves the engine."""

    def __init__(self, engine: Engine, eos_token_ids: frozenset[int]) -> None:
        self.eos_token_ids = eos_token_ids
        self.open: dict[Request, Choice] = {}
        self._engine = engine

    def abort(self, choices: list[Choice], reason: str) -> None:  # noqa: ARG002
        """End these choices, for whatever reason."""
        for req, choice in list(self.open.items()):
            if choice in choices:
                del self.open[req]
                self._engine.abort(req.request_id)


class LLM:
    """A model with an engine of its own in this process. One call at a time: others wait.

    Args:
        model: a local model directory; None: the demo model.
        allocator: a registered name, or a class of your own; None: `paged_prefix`, as the server.
        scheduler: the same; None: `chunked`.
        overrides: any settings, as on run.py's command line.
        options: the engine's flags of `kvarena serve`, by the names that vLLM's `LLM` has for them
            (`max_model_len=4096`, `dtype="bfloat16"`, `gpu_memory_utilization=0.8`, `trust_remote_code=True`, ...); any
            other is a setting, as of `kvarena.run` (`engine={"overlap": False}`).

    Raises:
        KvarenaError: a bad option or model, in one line.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        allocator: Strategy | None = None,
        scheduler: Strategy | None = None,
        overrides: Sequence[str] = (),
        **options: Any,
    ) -> None:
        with one_line_errors():
            flags = [] if model is None else [str(model)]
            for group, strategy in (("allocator", allocator), ("scheduler", scheduler)):
                if strategy is not None:
                    flags += [f"--{group}", strategy if isinstance(strategy, str) else offer(group, strategy)]
            settings = {key: value for key, value in options.items() if key not in OPTIONS}
            flags += _flags({key: value for key, value in options.items() if key in OPTIONS})
            made = [*overrides_of(parse_flags(flags)), *_for_throughput(scheduler), *as_overrides(settings), *overrides]
            check_ours(made)
            config, choices = compose_cell(made)
            if config.server is None:
                raise ConfigError("mode=run is the command line's; leave mode out")
            if config.router is not None:
                raise ConfigError(
                    f"kvarena.LLM is one engine: leave router.num_replicas={config.router.need('num_replicas')} out"
                )
            self._config = config.server
            directory = check_model(config, tokenizer=True)
            if directory is None:
                raise ConfigError("kvarena.LLM needs a tokenizer: give a model directory")
            strategy_names = {group: choices[group] for group in ("allocator", "scheduler")}
            self._tokenizer = TokenizerService(
                str(directory), config.model.trust_remote_code, self._config.chat_template
            )
            images = image_inputs(str(directory), self._tokenizer.tokenizer)
            defaults = generation_defaults(str(directory)) if self._config.generation_config else {}
            served = build_served_engine(config, strategy_names)
        self._engine, self._limits = served.engine, replace(served.info, defaults=defaults)
        self._client = _Client(served.engine, frozenset(served.info.eos_token_ids))
        self._images = ImageReader(policy_of(self._config), images)
        self._prompts = Prompts(self._tokenizer, served.info.max_model_len, self._images.tokens)
        self._lock = threading.Lock()
        # Tokenizing is written for an event loop, and a notebook's own is busy: ours runs on a thread.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kvarena-llm")
        self._num_requests = 0

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, of transformers."""
        return self._tokenizer.tokenizer

    def generate(
        self,
        prompts: str | Mapping[str, Any] | Sequence[int] | Sequence[str | Mapping[str, Any] | Sequence[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Continue prompts, all in one batch as the scheduler sees fit; one output for each, in order.

        Args:
            prompts: a text or token ids, or a list of these; also vLLM's `{"prompt": ...}` and `{"prompt_token_ids":
                ...}`.
            sampling_params: for all, or one for each.

        Raises:
            RequestError: a prompt or a parameter that cannot be honoured; nothing has run then.
        """
        given = [_plain(prompt) for prompt in _listed(prompts)]
        params = _for_each(sampling_params, len(given))
        return self._answer([self._ask(prompt, one) for prompt, one in zip(given, params, strict=True)])

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer a conversation, or several in one batch; one output for each, in order.

        Args:
            messages: a list of `{"role": ..., "content": ...}`, or a list of such lists; a content may be a list of
                parts, text and images, as in OpenAI's API.
            sampling_params: for all, or one for each.
            add_generation_prompt: end the prompt with the start of an answer; None: unless the last message goes on.
            continue_final_message: the answer goes on with the last message.
            chat_template_kwargs: more for the model's chat template.

        Raises:
            RequestError: messages or a parameter that cannot be honoured; nothing has run then.
        """
        conversations = [messages] if messages and isinstance(messages[0], Mapping) else messages
        more = {
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "chat_template_kwargs": None if chat_template_kwargs is None else dict(chat_template_kwargs),
        }
        params = _for_each(sampling_params, len(conversations))
        return self._answer(
            [self._ask_chat(list(cast(Any, one)), more, of) for one, of in zip(conversations, params, strict=True)]
        )

    # ---- before the engine: as the server's front does it (engine/server/api/service.py)

    async def _ask(self, prompt: str | list[int], params: SamplingParams) -> _Asked:
        req = params.body(CompletionRequest, prompt=prompt)
        check_unsupported(req, self._config, self._limits.priorities)
        [ids] = await self._prompts.of_completion(req, self._limits.vocab_size, 1)
        default = self._limits.default_length(COMPLETIONS_MAX_TOKENS)
        max_tokens = fit_max_tokens(params.max_tokens, default, len(ids), self._limits, "prompt")
        return await self._asked(req, params, ids, max_tokens, prompt if isinstance(prompt, str) else None)

    async def _ask_chat(self, messages: list[Any], more: dict[str, Any], params: SamplingParams) -> _Asked:
        req = params.body(ChatCompletionRequest, messages=messages, **more)
        check_unsupported(req, self._config, self._limits.priorities)
        check_chat(req)
        opened = await self._images.open(req.messages)
        ids, places = await self._prompts.of_chat(req, self._images.num_tokens(opened))
        default = self._limits.default_length(None)
        max_tokens = fit_max_tokens(params.max_tokens, default, len(ids), self._limits, "messages")
        images = await self._images.spans(opened, places)
        return await self._asked(req, params, ids, max_tokens, None, images)

    async def _asked(
        self,
        req: SamplingFields,
        params: SamplingParams,
        ids: list[int],
        max_tokens: int,
        prompt: str | None,
        images: tuple[ImageSpan, ...] = (),
    ) -> _Asked:
        if req.prompt_logprobs is not None and not self._limits.prompt_logprobs:
            raise RequestError("log-probabilities of the prompt are not available with this runner", "prompt_logprobs")
        asked = _Asked(self._client, req, prompt, images)
        sampling = sampling_params(req, self._config, self._limits, max_tokens=max_tokens, logprobs=params.logprobs)
        _, stream = await self._prompts.begin(ids, req)
        asked.add(ids, sampling, stream, asked.stops, bool(req.include_stop_str_in_output))
        return asked

    def _answer(self, questions: list[Coroutine[Any, Any, _Asked]]) -> list[RequestOutput]:
        async def all_asked() -> list[_Asked]:
            return [await question for question in questions]

        with self._lock, request_errors():
            try:
                asked = self._thread.submit(asyncio.run, all_asked()).result()
            finally:
                for question in questions:
                    question.close()
            try:
                for one in asked:
                    self._add(one)
                self._run()
            finally:  # interrupted, or failed: nobody waits for the rest
                self._client.abort([choice for one in asked for choice in one.choices], "abort")
            return [self._output(one) for one in asked]

    # ---- the engine: as the server's loop drives it (engine/server/engine)

    def _add(self, asked: _Asked) -> None:
        asked.request_id = str(self._num_requests)
        self._num_requests += 1
        first = asked.choices[0]
        req = Request(
            request_id=asked.request_id,
            prompt_token_ids=first.prompt,
            sampling=first.sampling,
            arrival_time=self._engine.clock.now(),
            # Log-probabilities of a prompt need all of it computed: nobody shares such a request's salt.
            cache_salt=asked.request_id if first.sampling.prompt_logprobs is not None else "",
            eos_token_ids=self._client.eos_token_ids,
            images=asked.images,
        )
        requests = expand(req)
        # Of beams there may be more than texts that are asked for.
        self._client.open |= dict(zip(requests, asked.choices, strict=False))
        for one in requests:
            self._engine.add(one)

    def _run(self) -> None:
        """Step until every choice has its text. Raises EngineError when that cannot be."""
        engine = self._engine
        while self._client.open:
            try:
                output = engine.step()
            except StepFailed as failure:
                for req in engine.scheduler.fail(failure.plan):
                    engine.runner.release([req.request_id])
                    self._client.open.pop(req, None)
                raise
            if output is not None:
                self._take(output)
            elif engine.has_work and not engine.in_flight:
                wake = engine.wake_time(engine.clock.now())
                if wake is None:
                    raise EngineError("the scheduler has requests and plans nothing: no progress is possible")
                engine.clock.sleep_until(wake)

    def _take(self, output: StepOutput) -> None:
        """Give a step's tokens to their choices."""
        plan, result, open_ = output.plan, output.result, self._client.open
        touched: list[Choice] = []
        for i, ((req, start, _), token) in enumerate(zip(plan.scheduled, result.token_ids, strict=True)):
            if (choice := open_.get(req)) is None:
                continue
            choice.num_cached_tokens = req.num_cached_tokens
            if result.prompt_logprobs is not None and (entries := result.prompt_logprobs[i]) is not None:
                choice.prompt_logprobs.update(enumerate(entries, start=start + 1))
            if token is None or req.search is not None:
                continue
            choice.tokens.append(token)
            if result.logprobs is not None and (entry := result.logprobs[i]) is not None:
                choice.logprobs.append(entry)
            touched.append(choice)
        for req in (*plan.rejected, *output.finished):
            if (choice := open_.pop(req, None)) is not None:
                if req.search is not None and req.search.is_over:
                    winner = req.search.winners[req.beam]
                    choice.tokens, choice.logprobs = list(winner.tokens), list(winner.entries)
                choice.ended, choice.error = (req.finish_reason or FinishReason.ERROR).value, req.error
                choice.stop_token = req.output_token_ids[-1] if req.finish_reason is FinishReason.STOP else None
                if choice not in touched:
                    touched.append(choice)
        for choice in touched:
            text, token_ids, logprobs = choice.advance()
            choice.pieces.append(text)
            choice.token_ids += token_ids
            choice.entries += logprobs

    # ---- behind the engine

    def _output(self, asked: _Asked) -> RequestOutput:
        outputs = []
        first = asked.choices[0]
        for choice in asked.choices:
            assert choice.finish_reason is not None
            logprobs = None
            if choice.sampling.logprobs is not None:
                logprobs = [self._logprobs(entry) for entry in choice.entries]
            outputs.append(
                CompletionOutput(
                    choice.index, "".join(choice.pieces), choice.token_ids, choice.finish_reason, choice.stop_reason,
                    logprobs,
                )
            )  # fmt: skip
        scores: list[dict[int, Logprob] | None] | None = None
        if first.sampling.prompt_logprobs is not None:
            scores = [None, *(self._logprobs(first.prompt_logprobs[at]) for at in range(1, len(first.prompt)))]
        return RequestOutput(asked.request_id, asked.prompt, first.prompt, outputs, first.num_cached_tokens, scores)

    def _logprobs(self, entry: Any) -> dict[int, Logprob]:
        token, logprob, rank, top = entry
        name = self._tokenizer.detokenizer.token_text
        made = {other: Logprob(value, at, name(other)) for at, (other, value) in enumerate(top, start=1)}
        return made | {token: Logprob(logprob, rank, name(token))}


def _flags(options: Mapping[str, Any]) -> list[str]:
    """The command-line flags that options stand for; None leaves one out."""
    made = []
    for key, value in options.items():
        flag = key.replace("_", "-")
        if value is True:
            made.append(f"--{flag}")
        elif value is False:
            made += [f"--no-{flag}"] if key in BOTH_WAYS else []
        elif isinstance(value, Mapping):
            made.append(f"--{flag}={json.dumps(dict(value))}")
        elif isinstance(value, list | tuple):
            made += [f"--{flag}", *map(str, value)] if value else []
        elif value is not None:
            made.append(f"--{flag}={value}")
    return made


def _listed(prompts: Any) -> list[Any]:
    """A list of prompts; one alone is a list of itself."""
    if isinstance(prompts, str | Mapping) or (len(prompts) and isinstance(prompts[0], int)):
        return [prompts]
    return list(prompts)


def _plain(prompt: Any) -> str | list[int]:
    """A prompt's text or token ids."""
    if isinstance(prompt, Mapping):
        others = sorted(set(prompt) - {"prompt", "prompt_token_ids"})
        if others:
            raise RequestError(
                f"a prompt holds prompt or prompt_token_ids, and not {others[0]!r}; images go into chat()'s messages",
                "prompt",
            )
        prompt = prompt.get("prompt_token_ids") or prompt.get("prompt")
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, Sequence):
        raise RequestError("a prompt must be text, token ids, or a mapping with prompt or prompt_token_ids", "prompt")
    return list(prompt)


def _for_each(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise RequestError(f"{len(params)} sampling_params for {count} prompts; give one, or one for each")
    return list(params)


def _for_throughput(scheduler: Strategy | None) -> list[str]:
    """Nobody waits for the next token here as clients of a server do: steps are as full as the budget allows."""
    name = "chunked" if scheduler is None else scheduler
    if not isinstance(name, str) or name not in strategy_names("scheduler"):
        return []
    return ["scheduler.chunks=budget"] if "chunks" in strategy_options("scheduler", name) else []
