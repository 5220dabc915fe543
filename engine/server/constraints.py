"""Which constraint and which tool parser a request asks for."""

from __future__ import annotations

import functools
from collections.abc import Callable

from engine.errors import RequestError
from engine.server import structured
from engine.server.client import EngineClient
from engine.server.errors import bad_request, unavailable
from engine.server.grammar_checks import CheckedGrammar, ChecksBusy, GrammarChecks
from engine.server.grammars import tokenizer_json
from engine.server.protocol import ChatCompletionRequest, NamedToolChoice, SamplingFields
from engine.server.schemas import named_schema, required_schema, schema_text
from engine.server.tokenization import TokenizerService
from engine.server.tool_calls import ListParser, NamedParser, ToolParser, make_parser


class Constraints:
    """Reads them, and has them tried out.

    Args:
        client: knows whether the engine can constrain tokens; must be ready.
        tokenizer: its chat template tells the tool calls' form.
        parser_kind: how the model writes tool calls, as in `ServerConfig.tool_call_parser`.
    """

    def __init__(self, client: EngineClient, tokenizer: TokenizerService, parser_kind: str) -> None:
        self._tokenizer, self._parser_kind = tokenizer, parser_kind
        info = client.info
        self._checks: GrammarChecks | None = None
        if info is not None and info.constraints:
            text = tokenizer_json(tokenizer.tokenizer)
            self._checks = GrammarChecks(text, info.vocab_size, info.eos_token_ids)

    def close(self) -> None:
        """End what they are tried out in."""
        if self._checks is not None:
            self._checks.close()

    async def of_chat(
        self, req: ChatCompletionRequest
    ) -> tuple[CheckedGrammar | None, Callable[[], ToolParser | None], bool]:
        """The constraint that tools and formats ask for, a parser per choice, and whether a function was named."""
        choice = req.tool_choice
        tools = {tool.function.name: tool.function.parameters for tool in req.tools or ()}
        parallel = req.parallel_tool_calls is not False
        forced: structured.Constraint | None = None
        parser: Callable[[], ToolParser | None] = lambda: None  # noqa: E731
        if isinstance(choice, NamedToolChoice):
            name = choice.function.name
            if name not in tools:
                raise bad_request(f"tool_choice names {name[:100]!r}, which is not in tools", "tool_choice")
            forced = _of_schema(lambda: named_schema(tools[name]))
            parser = functools.partial(NamedParser, name)
        elif choice == "required":
            forced = _of_schema(lambda: required_schema(list(tools.items()), parallel))
            parser = ListParser
        elif tools and choice != "none":
            template = getattr(self._tokenizer.tokenizer, "chat_template", None)
            parser = functools.partial(make_parser, self._parser_kind, template, parallel)
        if forced is None:
            return await self.of(req), parser, False
        if req.response_format is not None and req.response_format.type != "text":
            raise bad_request("response_format cannot be combined with a forced tool_choice", "response_format")
        return await self._check(forced, "tools", req), parser, isinstance(choice, NamedToolChoice)

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


def _of_schema(make: Callable[[], object]) -> structured.Constraint:
    """The constraint of a schema that is made of tools. Raises ApiError."""
    try:
        return ("json", schema_text(make(), "tools"))
    except RequestError as error:
        raise bad_request(str(error), error.param) from error
