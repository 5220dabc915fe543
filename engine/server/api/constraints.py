"""Which constraint a request asks for, checked."""

from __future__ import annotations

from collections.abc import Callable

from kvarena.engine.errors import RequestError
from kvarena.engine.server.api import structured
from kvarena.engine.server.api.protocol import ChatCompletionRequest, NamedToolChoice, SamplingFields
from kvarena.engine.server.api.spoken import Spoken
from kvarena.engine.server.engine.grammar_checks import CheckedGrammar, ChecksBusy, GrammarChecks
from kvarena.engine.server.engine.grammars import tokenizer_json
from kvarena.engine.server.front.engines import Engines
from kvarena.engine.server.shared.errors import bad_request, unavailable
from kvarena.engine.server.text.schemas import named_schema, required_schema, schema_text
from kvarena.engine.server.text.tokenization import TokenizerService


class Constraints:
    """Reads them, and has them tried out.

    Args:
        client: knows whether the engines can constrain tokens; must be ready.
        tokenizer: the model's.
        spoken: how the model's answers are read.
    """

    def __init__(self, client: Engines, tokenizer: TokenizerService, spoken: Spoken) -> None:
        self._spoken = spoken
        info = client.info
        self._checks: GrammarChecks | None = None
        if info.constraints:
            text = tokenizer_json(tokenizer.tokenizer)
            self._checks = GrammarChecks(text, info.vocab_size, list(info.eos_token_ids))

    def close(self) -> None:
        """End what they are tried out in."""
        if self._checks is not None:
            self._checks.close()

    async def of_chat(self, req: ChatCompletionRequest, prompt: list[int]) -> CheckedGrammar | None:
        """What a chat's answer is held to, checked: forced calls or a format behind the thought, calls that have
        begun, a thought's length. Raises ApiError.

        Args:
            req: the chat.
            prompt: its token ids.
        """
        whole, param = self._forced(req), "tools"
        if whole is None:
            whole, param = self._asked(req)
        if self._checks is None and whole is None and (req.thinking_token_budget or -1) < 0:
            return None  # calls are read, and not held
        constraint = self._spoken.steered(req, prompt, whole)
        if constraint is None:
            return None
        try:
            return await self._check(constraint, param if whole is not None else "tools", req, whole is not None)
        except RequestError as error:
            if whole is None and self._spoken.lose(constraint, error):
                return await self.of_chat(req, prompt)
            raise bad_request(str(error), param) from error

    def _forced(self, req: ChatCompletionRequest) -> structured.Constraint | None:
        """What a forced call asks for. Raises ApiError."""
        choice = req.tool_choice
        tools = {tool.function.name: tool.function.parameters for tool in req.tools or ()}
        if isinstance(choice, NamedToolChoice):
            name = choice.function.name
            if name not in tools:
                raise bad_request(f"tool_choice names {name[:100]!r}, which is not in tools", "tool_choice")
            forced = _of_schema(lambda: named_schema(tools[name]))
        elif choice == "required":
            forced = _of_schema(lambda: required_schema(list(tools.items()), req.parallel_tool_calls is not False))
        else:
            return None
        return forced  # whatever form is asked for text: none is written

    async def of(self, req: SamplingFields) -> CheckedGrammar | None:
        """The constraint of `response_format` or `structured_outputs`, checked."""
        constraint, param = self._asked(req)
        if constraint is None:
            return None
        try:
            return await self._check(constraint, param, req, True)
        except RequestError as error:
            raise bad_request(str(error), param) from error

    def _asked(self, req: SamplingFields) -> tuple[structured.Constraint | None, str]:
        try:
            one = structured.from_response_format(req.response_format)
            two = structured.from_structured_outputs(req.structured_outputs)
        except RequestError as error:
            raise bad_request(str(error), error.param) from error
        if one is not None and two is not None:
            raise bad_request("response_format and structured_outputs exclude each other", "structured_outputs")
        return one or two, "response_format" if one else "structured_outputs"

    async def _check(
        self, constraint: structured.Constraint, param: str, req: SamplingFields, is_whole: bool
    ) -> CheckedGrammar:
        """Have it tried out. Raises ApiError, and RequestError where it cannot be used."""
        if self._checks is None:
            raise bad_request("structured output is not available with this model", param)
        if req.min_tokens and is_whole:
            # A complete text may only end, and min_tokens would bar its end: no token would be left.
            raise bad_request("min_tokens cannot be combined with structured output", "min_tokens")
        try:
            return await self._checks.check(*constraint)
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
