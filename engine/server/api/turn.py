"""An assistant's turn, whichever API shows it: its thoughts, its text and its calls of tools, as they come."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

from typing_extensions import override

from kvarena.engine.request import SamplingParams
from kvarena.engine.server.api.answers import Answer
from kvarena.engine.server.api.completions import finite, token_ids_as_names
from kvarena.engine.server.api.protocol import ChatCompletionRequest, NamedToolChoice
from kvarena.engine.server.forms.calls import Arguments, Parsed, Part, Thought, ToolCall, ToolParser, parts_of
from kvarena.engine.server.front.engines import Engines
from kvarena.engine.server.front.groups import Choice
from kvarena.engine.server.text.detokenizer import Detokenizer
from kvarena.engine.server.text.streams import TextStream


class Reading(NamedTuple):
    """How an answer is read.

    Attributes:
        make_parser: gives a parser per choice, or None when the answer is text only.
        detokenizer: names tokens.
        num_tokens: of a text.
        thought_end: the token that ends a thought; None: it is none, or there are no thoughts.
    """

    make_parser: Callable[[], ToolParser | None]
    detokenizer: Detokenizer
    num_tokens: Callable[[str], int]
    thought_end: int | None = None


class Turn(Answer):
    """The answer to a chat. One class for each API writes what it shows.

    Args:
        client, req, model, arrival: as of `Answer`.
        reading: how the answer is read.
    """

    req: ChatCompletionRequest

    def __init__(
        self, client: Engines, req: ChatCompletionRequest, model: str, arrival: float, *, reading: Reading
    ) -> None:
        super().__init__(client, req, model, arrival)
        self._reading, self._detokenizer = reading, reading.detokenizer
        self._logprobs = bool(req.logprobs)
        self._shows_more = self._logprobs or self._return_token_ids or self._counts  # than text
        # A function was named: its finish reason stays `stop`.
        self._forced_call = isinstance(req.tool_choice, NamedToolChoice)
        self._hides = req.include_reasoning is False  # thoughts
        self._runs = False  # an event may be made of its text alone
        self._parsers: list[ToolParser | None] = []
        self._calls: list[list[ToolCall]] = []
        self._thoughts: list[list[str]] = []
        self._thinking: list[int] = []  # tokens until a thought ended
        self._is_thinking: list[bool] = []

    @override
    def add_prompt(self, prompt: list[int], sampling: SamplingParams, stream: TextStream) -> list[Choice]:
        made = super().add_prompt(prompt, sampling, stream)
        self._parsers += [self._reading.make_parser() for _ in made]
        self._calls += [[] for _ in made]
        self._thoughts += [[] for _ in made]
        self._thinking += [0 for _ in made]
        self._is_thinking += [self._reading.thought_end is not None for _ in made]
        self._is_plain = self._is_plain and not (self._logprobs or any(self._parsers))
        self._runs = self._streams and not self._shows_more
        return made

    @override
    def _rich_delta(self, choice: Choice, text: str, token_ids: list[int], logprobs: list[Any]) -> bytes:
        index = choice.index
        parser = self._parsers[index]
        # Most events of a stream go on with what came before, and show nothing beside it.
        if self._runs and choice.finish_reason is None:
            if text:
                kind = str if parser is None else parser.runs_on(text)
                if (kind is str or (kind is Thought and not self._hides)) and (
                    events := self._quick(choice, kind, text)
                ):
                    if self._is_thinking[index]:
                        self._count_thought(index, token_ids)
                    if kind is Thought:
                        self._thoughts[index].append(text)
                    return events
            elif parser is None:
                return b""
        parsed = parts_of(text) if parser is None else self._parse(parser, choice, text, token_ids)
        entries = [self._logprob_entry(entry) for entry in logprobs] if self._logprobs else []
        return self._show(choice, parsed, entries, token_ids)

    def _parse(self, parser: ToolParser, choice: Choice, text: str, token_ids: list[int]) -> Parsed:
        """What new text turned out to be; calls and thoughts are kept."""
        if self._is_thinking[choice.index]:
            self._count_thought(choice.index, token_ids)
        parsed = parser.add(text)
        if choice.finish_reason is not None:
            parsed = parts_of(*parsed, *parser.end())
        for part in parsed:
            if type(part) is not str:
                return self._keep(choice.index, parsed)
        return parsed

    def _count_thought(self, index: int, token_ids: list[int]) -> None:
        end = self._reading.thought_end
        if end in token_ids:
            self._is_thinking[index] = False
            token_ids = token_ids[: token_ids.index(end) + 1]
        self._thinking[index] += len(token_ids)

    def _keep(self, index: int, parsed: Parsed) -> Parsed:
        """Note what was called and thought; what of it is shown."""
        calls, shown = self._calls[index], Parsed()
        for part in parsed:
            if isinstance(part, ToolCall):
                calls.append(part)
            elif type(part) is Arguments:
                calls[-1] = calls[-1]._replace(arguments=calls[-1].arguments + part)
            elif type(part) is Thought:
                self._thoughts[index].append(part)
                if self._hides:
                    continue
            shown.append(part)
        return shown

    def _quick(self, choice: Choice, kind: type[str], text: str) -> bytes:  # noqa: ARG002 - where there is none
        """The event of more text, or of more of a thought, of what is open; nothing where it needs more than that."""
        return b""

    @abstractmethod
    def _show(self, choice: Choice, parsed: Parsed, entries: list[Any], token_ids: list[int]) -> bytes:
        """Events for what a choice gave, or nothing where the answer is not streamed."""

    def num_thought_tokens(self) -> int:
        """Tokens of all choices' thoughts: counted up to what ends them, else those of their text."""
        total = 0
        for index, pieces in enumerate(self._thoughts):
            if pieces:
                by_text = self._reading.thought_end is None
                total += self._reading.num_tokens("".join(pieces)) if by_text else self._thinking[index]
        return total

    @override
    def usage(self) -> dict[str, Any]:
        made = super().usage()
        if any(self._thoughts):
            made["completion_tokens_details"] = {"reasoning_tokens": self.num_thought_tokens()}
        return made

    def _logprob_entry(self, entry: Any) -> dict[str, Any]:
        token, logprob, _, top = entry
        detokenizer = self._detokenizer
        ids = [token, *(other for other, _ in top)]
        names = token_ids_as_names(ids) if self.req.return_tokens_as_token_ids else detokenizer.names_of(ids)

        def named(token: int, logprob: float) -> dict[str, Any]:
            data = detokenizer.token_bytes(token)
            return {"token": names[token], "logprob": finite(logprob), "bytes": list(data)}

        return named(token, logprob) | {"top_logprobs": [named(other, value) for other, value in top]}


class Sequence:
    """The parts of one choice as the items of an answer that shows them one after the other.

    White space between two calls, and behind the last one, is no item of its own.
    """

    def __init__(self) -> None:
        self._blank, self._has_called = "", False

    @property
    def is_waiting(self) -> bool:
        """Whether white space may come that is none of the text."""
        return self._has_called

    def of(self, parsed: Parsed) -> list[Part]:
        """The parts that are shown now."""
        made: list[Part] = []
        for part in parsed:
            if isinstance(part, ToolCall):
                self._blank, self._has_called = "", True
            elif type(part) is str and self._has_called:
                part = self._blank + part
                if not part.strip():
                    self._blank = part
                    continue
                self._blank, self._has_called = "", False
            made.append(part)
        return made


def is_json(text: str) -> bool:
    """Whether a text is JSON, such as the arguments of a call that nothing cut."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
