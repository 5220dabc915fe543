"""Which constraint and which tool parser a request asks for."""

from __future__ import annotations

import functools
from collections.abc import Callable

from kvarena.engine.errors import RequestError
from kvarena.engine.server.api import structured
from kvarena.engine.server.api.protocol import ChatCompletionRequest, NamedToolChoice, SamplingFields
from kvarena.engine.server.api.turn import Reading
from kvarena.engine.server.engine.grammar_checks import CheckedGrammar, ChecksBusy, GrammarChecks
from kvarena.engine.server.engine.grammars import tokenizer_json
from kvarena.engine.server.forms.calls import ListParser, NamedParser, ToolParser
from kvarena.engine.server.forms.finding import find_form
from kvarena.engine.server.front.engines import Engines
from kvarena.engine.server.shared.errors import bad_request, unavailable
from kvarena.engine.server.text.schemas import named_schema, required_schema, schema_text
from kvarena.engine.server.text.tokenization import TokenizerService, given_tools


class Constraints:
    """Reads them, and has them tried out.

    Args:
        client: knows whether the engines can constrain tokens; must be ready.
        tokenizer: its response template or chat template tells the tool calls' form.
        parser_kind: how the model writes tool calls, as in `ServerConfig.tool_call_parser`.

    Raises:
        ModelError: the tokenizer ships a response template that cannot be used.
    """

    def __init__(self, client: Engines, tokenizer: TokenizerService, parser_kind: str) -> None:
        self._tokenizer = tokenizer
        self._form = find_form(parser_kind, tokenizer.tokenizer)
        info = client.info
        self._checks: GrammarChecks | None = None
        if info.constraints:
            text = tokenizer_json(tokenizer.tokenizer)
            self._checks = GrammarChecks(text, info.vocab_size, list(info.eos_token_ids))

    def close(self) -> None:
        """End what they are tried out in."""
        if self._checks is not None:
            self._checks.close()

    async def of_chat(self, req: ChatCompletionRequest) -> CheckedGrammar | None:
        """What a forced call or a format asks for, checked. Raises ApiError."""
        choice = req.tool_choice
        tools = {tool.function.name: tool.function.parameters for tool in req.tools or ()}
        if isinstance(choice, NamedToolChoice):
            name = choice.function.name
            if name not in tools:
                raise bad_request(f"tool_choice names {name[:100]!r}, which is not in tools", "tool_choice")
            forced = _of_schema(lambda: named_schema(tools[name]))
        elif choice == "required":
            forced = _of_schema(lambda: required_schema(list(tools.items()), _is_parallel(req)))
        else:
            return await self.of(req)
        if req.response_format is not None and req.response_format.type != "text":
            raise bad_request("response_format cannot be combined with a forced tool_choice", "response_format")
        return await self._check(forced, "tools", req)

    def reading(self, req: ChatCompletionRequest, prompt: list[int]) -> Reading:
        """How an answer is read; `prompt` is the chat's token ids."""
        detokenizer = self._tokenizer.detokenizer
        return Reading(self._parsers(req, prompt), detokenizer, self._tokenizer.num_tokens)

    def _parsers(self, req: ChatCompletionRequest, prompt: list[int]) -> Callable[[], ToolParser | None]:
        choice = req.tool_choice
        if isinstance(choice, NamedToolChoice):
            return functools.partial(NamedParser, choice.function.name)
        if choice == "required":
            return functools.partial(ListParser, frozenset(tool.function.name for tool in req.tools or ()))
        if not _calls_freely(req):
            return lambda: None
        end = self._form.prompt_end(prompt, self._tokenizer.detokenizer)
        hides = req.skip_special_tokens is not False
        return functools.partial(
            self._form.parser, given_tools(req.tools or []), end, parallel=_is_parallel(req), hides=hides
        )

    def kept(self, req: ChatCompletionRequest) -> frozenset[int]:
        """Special tokens that the parser must see."""
        return self._form.kept if _calls_freely(req) else frozenset()

    async def of(self, req: SamplingFields) -> CheckedGrammar | None:
        """The constraint of `response_format` or `structured_outputs`, checked."""
        try:
            one = structured.from_response_format(req.response_format)
            two = structured.from_structured_outputs(req.structured_outputs)
        except RequestError as error:
            raise bad_request(str(error), error.param) from error
        if one is not None and two is not None:
            raise bad_request("response_format and structured_outputs exclude each other", "structured_outputs")
        constraint = one or two
        if constraint is None:
            return None
        return await self._check(constraint, "response_format" if one else "structured_outputs", req)

    async def _check(self, constraint: structured.Constraint, param: str, req: SamplingFields) -> CheckedGrammar:
        if self._checks is None:
            raise bad_request("structured output is not available with this model", param)
        if req.min_tokens:
            # A complete text may only end, and min_tokens would bar its end: no token would be left.
            raise bad_request("min_tokens cannot be combined with structured output", "min_tokens")
        try:
            return await self._checks.check(*constraint)
        except RequestError as error:
            raise bad_request(str(error), param) from error
        except ChecksBusy as error:
            raise unavailable(
                f"The constraint cannot be compiled now: {error}. Try again.", "constraints_busy"
            ) from error


def _calls_freely(req: ChatCompletionRequest) -> bool:
    """Whether the model may call tools of its own accord."""
    return bool(req.tools) and req.tool_choice in (None, "auto")


def _is_parallel(req: ChatCompletionRequest) -> bool:
    return req.parallel_tool_calls is not False


def _of_schema(make: Callable[[], object]) -> structured.Constraint:
    """The constraint of a schema that is made of tools. Raises ApiError."""
    try:
        return ("json", schema_text(make(), "tools"))
    except RequestError as error:
        raise bad_request(str(error), error.param) from error
