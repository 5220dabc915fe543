"""`/v1/completions`: prompts in, texts out."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterable
from typing import Any

import orjson
from typing_extensions import override

from kvarena.engine.request import SamplingParams
from kvarena.engine.server.api.answers import Answer, event
from kvarena.engine.server.api.protocol import CompletionRequest
from kvarena.engine.server.front.engines import Engines
from kvarena.engine.server.front.groups import Choice
from kvarena.engine.server.shared.errors import bad_request
from kvarena.engine.server.text.detokenizer import Detokenizer
from kvarena.engine.server.text.streams import TextStream


def read_prompts(prompt: Any, max_prompts: int, vocab_size: int) -> list[str | list[int]]:
    """The prompts of a request: a string, token ids, or a list of either.

    Raises:
        ApiError: any other shape, an empty prompt, too many prompts, or a token id outside the vocabulary.
    """
    if isinstance(prompt, str):
        return [_nonempty(prompt)]
    if not isinstance(prompt, list) or not prompt:
        raise bad_request("prompt must be a string, a list of strings, token ids, or a list of token ids", "prompt")
    if type(prompt[0]) is int:
        return [_checked_ids(prompt, vocab_size)]
    if len(prompt) > max_prompts:
        raise bad_request(f"prompt holds {len(prompt)} prompts; at most {max_prompts} are allowed", "prompt")
    if all(isinstance(one, str) for one in prompt):
        return [_nonempty(one) for one in prompt]
    if all(isinstance(one, list) for one in prompt):
        return [_checked_ids(one, vocab_size) for one in prompt]
    raise bad_request("prompt mixes types: give strings only, or token ids only", "prompt")


def _nonempty(text: str) -> str:
    if not text:
        raise bad_request("prompt must not be empty", "prompt")
    return text


def _checked_ids(ids: list[Any], vocab_size: int) -> list[int]:
    if not ids or not all(type(token) is int for token in ids):
        raise bad_request("prompt must be a non-empty list of integers when it is given as token ids", "prompt")
    if min(ids) < 0 or max(ids) >= vocab_size:
        bad = next(token for token in ids if not 0 <= token < vocab_size)
        raise bad_request(
            f"prompt holds token id {bad}, which is out of vocabulary: ids are 0 to {vocab_size - 1}", "prompt"
        )
    return ids


class CompletionLogprobs:
    """The legacy parallel lists, which evaluation tools read.

    A token's place in the text may be known only when later tokens are: it waits until then.

    Args:
        detokenizer: names tokens.
        stream: the text that the offsets count in, before its first token.
        by_ids: tokens are named by their ids.
    """

    def __init__(self, detokenizer: Detokenizer, stream: TextStream, by_ids: bool = False) -> None:
        self._detokenizer, self._stream, self._by_ids = detokenizer, stream, by_ids
        self._placed: list[tuple[Any, ...]] = []
        self._waiting: deque[tuple[str, float | None, dict[str, float] | None]] = deque()

    def add(self, token_id: int, entry: Any) -> None:
        """Append one token; `entry` is None for the first token of a prompt."""
        at_start = self._stream.at_start
        name = f"token_id:{token_id}" if self._by_ids else self._detokenizer.token_text(token_id, at_start)
        if entry is None:
            self._waiting.append((name, None, None))
        else:
            _, logprob, _, top = entry
            values = {token_id: logprob} | dict(top)
            names = token_ids_as_names(values) if self._by_ids else self._detokenizer.names_of(values, at_start)
            found = {names[other]: finite(value) for other, value in values.items()}
            self._waiting.append((name, finite(logprob), found))
        self._settle(self._stream.place(token_id))

    def end(self, num_chars: int) -> None:
        """No token follows. Tokens that a stop string cut off begin at the text's end, after `num_chars`."""
        self._settle(self._stream.place_end())
        self._placed = [(*entry, min(place, num_chars)) for *entry, place in self._placed]

    def _settle(self, places: list[int]) -> None:
        self._placed += [(*self._waiting.popleft(), place) for place in places]

    def take(self, num_chars: int = sys.maxsize) -> dict[str, Any] | None:
        """The lists of the tokens with a place, None without any; empties them for the next event.

        Tokens that begin behind the first `num_chars` characters stay: what is not shown yet, a stop string may cut.
        """
        count = sum(place <= num_chars for *_, place in self._placed)
        if not count:
            return None
        columns = zip(*self._placed[:count], strict=True)
        del self._placed[:count]
        return dict(zip(("tokens", "token_logprobs", "top_logprobs", "text_offset"), map(list, columns), strict=True))


def token_ids_as_names(token_ids: Iterable[int]) -> dict[int, str]:
    """Names that tell tokens apart whatever their texts."""
    return {token: f"token_id:{token}" for token in token_ids}


def finite(value: float) -> float:
    """JSON has no -inf."""
    return max(value, -9999.0)


class CompletionAnswer(Answer):
    """A completion.

    Args:
        client, req, model, arrival: as of `Answer`.
        detokenizer: names tokens.
        shown_prompt_logprobs: how many of the prompt's log-probabilities are shown on their own, or None; those that
            an echo asks for are made too, and stand among the others.
    """

    prefix, event_kind = "cmpl", "text_completion"
    before_text = b'"text":'
    after_text = (
        b',"logprobs":null,"finish_reason":null,"stop_reason":null,"token_ids":null,"prompt_token_ids":null}]}\n\n'
    )

    def __init__(
        self, client: Engines, req: CompletionRequest, model: str, arrival: float, *, detokenizer: Detokenizer,
        shown_prompt_logprobs: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(client, req, model, arrival)
        self._detokenizer = detokenizer
        self._echo, self._logprobs, self._zero = bool(req.echo), req.logprobs is not None, req.max_tokens == 0
        self._skips = req.skip_special_tokens is not False
        self._prompt_logprobs, self._num_logprobs = shown_prompt_logprobs, req.logprobs
        self._is_plain = self._is_plain and not self._logprobs
        self._echoed: list[str] = []
        self._shown: list[int] = []  # characters of each choice's text so far
        self._begun: set[int] = set()
        self._lists: list[CompletionLogprobs] = []

    @override
    def add_prompt(
        self, prompt: list[int], sampling: SamplingParams, stream: TextStream, echoed: str = ""
    ) -> list[Choice]:
        """Also: `echoed`, the prompt's text as far as nothing that follows can change it."""
        made = super().add_prompt(prompt, sampling, stream)
        if self._zero:  # only the echo is wanted and the sampled token dropped: the prompt's own end is known
            echoed += stream.copy().flush()
        self._echoed += [echoed] * len(made)
        self._shown += [len(echoed)] * len(made)
        if self._logprobs:
            places = self._detokenizer.stream(self._skips) if self._echo else stream
            by_ids = bool(self.req.return_tokens_as_token_ids)
            self._lists += [CompletionLogprobs(self._detokenizer, places.copy(), by_ids) for _ in made]
        return made

    @override
    def begin(self) -> bytes:
        if not self._echo:
            return b""
        return b"".join(self._event(choice, self._echoed[choice.index], None) for choice in self.choices)

    @override
    def _last_event(self, choice: Choice, text: str) -> bytes:
        return self._event(choice, text, None)

    @override
    def _rich_delta(self, choice: Choice, text: str, token_ids: list[int], logprobs: list[Any]) -> bytes:
        index, is_end = choice.index, choice.finish_reason is not None
        choice.pieces.append(text)
        columns = self._lists[index] if self._logprobs else None
        if columns is not None:
            if index not in self._begun and self._echo:
                for position, token in enumerate(choice.prompt):
                    columns.add(token, _fewer(choice.prompt_logprobs.get(position), self._num_logprobs))
            if not self._zero:
                for token, entry in zip(token_ids, logprobs, strict=True):
                    columns.add(token, entry)
            self._shown[index] += len(text)
            if is_end:
                columns.end(sys.maxsize if self._zero else self._shown[index])
        if not self._streams:
            choice.token_ids += token_ids
            self._begun.add(index)
            return b""
        lists = None if columns is None else columns.take(sys.maxsize if is_end else self._shown[index])
        if not (text or lists or is_end or (self._return_token_ids and token_ids)):
            return b""
        return self._event(choice, text, lists, token_ids)

    def _event(
        self, of: Choice, text: str, logprobs: dict[str, Any] | None, token_ids: list[int] | None = None
    ) -> bytes:
        shows_prompt = self._return_token_ids and of.index not in self._begun
        self._begun.add(of.index)
        choice: dict[str, Any] = {
            "index": of.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": of.finish_reason,
            "stop_reason": of.stop_reason,
            "token_ids": token_ids if self._return_token_ids else None,
            "prompt_token_ids": of.prompt if shows_prompt else None,
        }
        return event(self._head | {"choices": [choice]})

    @override
    def whole(self) -> bytes:
        usage = self.usage()
        if self._zero:
            usage |= {"completion_tokens": 0, "total_tokens": usage["prompt_tokens"]}
        choices = [self._whole_choice(one) for one in self.choices]
        return orjson.dumps(self._head | {"choices": choices, "usage": usage} | self.metrics())

    def _whole_choice(self, choice: Choice) -> dict[str, Any]:
        ids = [] if self._zero else choice.token_ids
        return {
            "index": choice.index,
            "text": self._echoed[choice.index] + ("" if self._zero else "".join(choice.pieces)),
            "logprobs": self._lists[choice.index].take() if self._logprobs else None,
            "finish_reason": "length" if self._zero else choice.finish_reason,
            "stop_reason": None if self._zero else choice.stop_reason,
            "token_ids": ids if self._return_token_ids else None,
            "prompt_token_ids": choice.prompt if self._return_token_ids else None,
            "prompt_logprobs": prompt_logprobs_body(self._detokenizer, choice, self._prompt_logprobs),
        }


def _fewer(entry: Any, most: int | None) -> Any:
    """A prompt token's scores with at most so many of the likeliest; -1: all."""
    if entry is None or most is None or most < 0:
        return entry
    token, logprob, rank, top = entry
    return token, logprob, rank, top[:most]


def prompt_logprobs_body(detokenizer: Detokenizer, choice: Choice, most: int | None) -> list[Any] | None:
    """Per prompt token (the first has none): token id -> its log-probability, rank and text.

    Args:
        detokenizer: names tokens.
        choice: one of the prompt.
        most: of the likeliest, -1 for all; None: nothing is shown.
    """
    if most is None:
        return None
    name = detokenizer.token_text
    rows: list[Any] = [None]
    for position in range(1, len(choice.prompt)):
        token, logprob, rank, top = _fewer(choice.prompt_logprobs[position], most)
        row = {
            str(other): {"logprob": finite(value), "rank": i, "decoded_token": name(other)}
            for i, (other, value) in enumerate(top, start=1)
        }
        row[str(token)] = {"logprob": finite(logprob), "rank": rank, "decoded_token": name(token)}
        rows.append(row)
    return rows
