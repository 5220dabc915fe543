"""What a choice shows: text without stop strings, finish reason, log-probabilities, usage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvarena.engine.server.front.client import EngineClient
from kvarena.engine.server.front.groups import Choice
from kvarena.engine.server.shared.errors import bad_request
from kvarena.engine.server.shared.ipc import BAD_CONSTRAINT
from kvarena.engine.server.text.stops import StopMatcher
from kvarena.engine.server.text.streams import TextStream


class ChoiceFailed(Exception):
    """The engine could not finish a choice."""


@dataclass(frozen=True)
class TextOptions:
    """How a request's tokens become text.

    Attributes:
        stops: stop strings.
        include_stop: keep what ended the text.
        min_tokens: stop strings count only after so many tokens.
        ignore_eos: an end-of-sequence token that ends the text was named by the request.
    """

    stops: tuple[str, ...] = ()
    include_stop: bool = False
    min_tokens: int = 0
    ignore_eos: bool = False


@dataclass(slots=True)
class Delta:
    """What is new of a choice. `logprobs` is aligned with `token_ids` when asked for."""

    text: str
    token_ids: list[int]
    logprobs: list[Any]


@dataclass(slots=True)
class ChoiceText:
    """Follows one choice from its first token to its end."""

    choice: Choice
    client: EngineClient
    options: TextOptions
    stream: TextStream
    matcher: StopMatcher
    num_tokens: int = 0
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    @classmethod
    def start(cls, choice: Choice, client: EngineClient, stream: TextStream, options: TextOptions) -> ChoiceText:
        """Follow `choice` from the beginning. `stream` is its own, and goes on from the prompt."""
        return cls(choice, client, options, stream, StopMatcher(options.stops, options.include_stop))

    def advance(self) -> Delta:
        """Take the choice's new tokens; sets `finish_reason` when it has ended.

        Raises:
            ChoiceFailed: the engine gave it up.
            ApiError: its structured output turned out to be impossible.
        """
        choice = self.choice
        tokens, logprobs = choice.take()
        finish = choice.finish
        shown = tokens
        if finish is not None and finish.stop_token is not None and tokens and not self.options.include_stop:
            shown = tokens[:-1]  # the token that ended it is counted and not shown
        if not self.options.stops:
            text, used = self.stream.add(shown) if shown else "", len(tokens)
        else:
            text, used = self._match(shown, len(tokens))
        if used < len(tokens):
            del tokens[used:], logprobs[used:]
        self.num_tokens += used
        if self.matcher.matched is not None:
            self.finish_reason, self.stop_reason = "stop", self.matcher.matched
            self.client.abort([choice], "stop")
        elif finish is not None:
            text += self._end(finish)
        return Delta(text, tokens, logprobs)

    def _match(self, shown: list[int], num_tokens: int) -> tuple[str, int]:
        """Text of `shown` up to a stop string, and how many tokens were used."""
        text = ""
        for i, token in enumerate(shown):
            piece = self.stream.add((token,))
            if self.num_tokens + i + 1 < self.options.min_tokens:
                text += piece
                continue
            text += self.matcher.add(piece)
            if self.matcher.matched is None and self.matcher.would_match(held := self.stream.pending):
                # Held because another token might change it; none will come.
                text += self.matcher.add(held)
            if self.matcher.matched is not None:
                return text, i + 1
        return text, num_tokens

    def _end(self, finish: Any) -> str:
        if finish.reason == BAD_CONSTRAINT:
            raise bad_request(finish.error, "structured_outputs", "constraint_failed")
        if finish.reason not in ("stop", "length"):
            raise ChoiceFailed(finish.error or "the engine ended this request")
        self.finish_reason = finish.reason
        is_eos = finish.stop_token in self.client.eos_token_ids and not self.options.ignore_eos
        if finish.stop_token is not None and not is_eos:
            self.stop_reason = finish.stop_token
        tail = self.matcher.add(self.stream.flush())
        if self.matcher.matched is not None:
            self.finish_reason, self.stop_reason = "stop", self.matcher.matched
            return tail
        return tail + self.matcher.flush()


def usage_body(num_prompt: int, num_output: int, num_cached: int) -> dict[str, Any]:
    """The `usage` object."""
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output,
        "total_tokens": num_prompt + num_output,
        "prompt_tokens_details": {"cached_tokens": num_cached},
    }
