"""Which constraint and which tool parser a request asks for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

from kvarena.engine.errors import RequestError
from kvarena.engine.server.api import structured
from kvarena.engine.server.api.protocol import ChatCompletionRequest, NamedToolChoice, SamplingFields
from kvarena.engine.server.engine.grammar_checks import CheckedGrammar, ChecksBusy, GrammarChecks
from kvarena.engine.server.engine.grammars import tokenizer_json
from kvarena.engine.server.front.client import EngineClient
from kvarena.engine.server.shared.errors import bad_request, unavailable
from kvarena.engine.server.text.schemas import named_schema, required_schema, schema_text
from kvarena.engine.server.text.tokenization import TokenizerService, given_tools
from kvarena.engine.server.text.tool_calls import ListParser, NamedParser, ToolParser
from kvarena.engine.server.text.tool_forms import find_form


class ChatOutput(NamedTuple):
    """What a chat asks of its answer.

    Attributes:
        constraint: what tools and formats ask for.
        make_parser: gives a tool parser for a choice, or None when the answer is text only.
        is_named: a function was named.
        kept: special tokens that the parser must see.
    """

    constraint: CheckedGrammar | None
    make_parser: Callable[[], ToolParser | None]
    is_named: bool = False
    kept: frozenset[int] = frozenset()


class Constraints:
    """Reads them, and has them tried out.

    Args:
        client: knows whether the engine can constrain tokens; must be ready.
        tokenizer: its response template or chat template tells the tool calls' form.
        parser_kind: how the model writes tool calls, as in `ServerConfig.tool_call_parser`.

    Raises:
        ModelError: the tokenizer ships a response template that cannot be used.
    """

    def __init__(self, client: EngineClient, tokenizer: TokenizerService, parser_kind: str) -> None:
        self._tokenizer = tokenizer
        self._form = find_form(parser_kind, tokenizer.tokenizer)
        info = client.info
        self._checks: GrammarChecks | None = None
        if info is not None and info.constraints:
            text = tokenizer_json(tokenizer.tokenizer)
            self._checks = GrammarChecks(text, info.vocab_size, list(info.eos_token_ids))

    def close(self) -> None:
        """End what they are tried out in."""
        if self._checks is not None:
            self._checks.close()

    async def of_chat(self, req: ChatCompletionRequest, prompt: list[int]) -> ChatOutput:
        """What tools and formats ask for; `prompt` is the chat's token ids. Raises ApiError."""
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
            parser = functools.partial(ListParser, tools)
        elif tools and choice != "none":
            parser, kept = self._free_calls(req, prompt, parallel)
            return ChatOutput(await self.of(req), parser, kept=kept)
        if forced is None:
            return ChatOutput(await self.of(req), parser)
        if req.response_format is not None and req.response_format.type != "text":
            raise bad_request("response_format cannot be combined with a forced tool_choice", "response_format")
        return ChatOutput(await self._check(forced, "tools", req), parser, isinstance(choice, NamedToolChoice))

    def _free_calls(
        self, req: ChatCompletionRequest, prompt: list[int], parallel: bool
    ) -> tuple[Callable[[], ToolParser | None], frozenset[int]]:
        """A parser of the calls that the model makes of its own accord, and the special tokens that it must see."""
        form, hides = self._form, req.skip_special_tokens is not False
        end = form.prompt_end(prompt, self._tokenizer.detokenizer)
        parser = functools.partial(form.parser, given_tools(req.tools or []), end, parallel=parallel, hides=hides)
        return parser, form.kept

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
