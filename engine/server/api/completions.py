"""`/v1/completions`: prompts in, texts out."""

from __future__ import annotations

import sys
from collections import deque
from dataclasses import dataclass
from typing import Any

import orjson
from typing_extensions import override

from kvarena.engine.server.api.answers import Renderer, event
from kvarena.engine.server.api.choice_text import ChoiceText, Delta
from kvarena.engine.server.shared.errors import bad_request
from kvarena.engine.server.text.detokenizer import Detokenizer
from kvarena.engine.server.text.streams import TextStream
from kvarena.engine.server.text.tokenization import TokenizerService


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
        raise bad_request(f"prompt holds token id {bad}; this model's ids are 0 to {vocab_size - 1}", "prompt")
    return ids


class CompletionLogprobs:
    """The legacy parallel lists, which evaluation tools read.

    A token's place in the text may be known only when later tokens are: it waits until then.

    Args:
        detokenizer: names tokens.
        stream: the text that the offsets count in, before its first token.
    """

    def __init__(self, detokenizer: Detokenizer, stream: TextStream) -> None:
        self._detokenizer, self._stream = detokenizer, stream
        self._placed: list[tuple[Any, ...]] = []
        self._waiting: deque[tuple[str, float | None, dict[str, float] | None]] = deque()

    def add(self, token_id: int, entry: Any) -> None:
        """Append one token; `entry` is None for the first token of a prompt."""
        at_start = self._stream.at_start
        name = self._detokenizer.token_text(token_id, at_start)
        if entry is None:
            self._waiting.append((name, None, None))
        else:
            _, logprob, _, top = entry
            values = {token_id: logprob} | dict(top)
            names = self._detokenizer.names_of(values, at_start)
            found = {names[other]: finite(value) for other, value in values.items()}
            self._waiting.append((name, finite(logprob), found))
        self._settle(self._stream.place(token_id))

    def end(self, num_chars: int) -> None:
        """No token follows. Tokens that a stop string cut off begin at the text's end, after `num_chars`."""
        self._settle(self._stream.place_end())
        self._placed = [(*entry, min(place, num_chars)) for *entry, place in self._placed]

    def _settle(self, places: list[int]) -> None:
        self._placed += [(*self._waiting.popleft(), place) for place in places]

    def take(self) -> dict[str, Any] | None:
        """The lists of the tokens with a place, None without any; empties them for the next event."""
        if not self._placed:
            return None
        columns = zip(*self._placed, strict=True)
        self._placed = []
        return dict(zip(("tokens", "token_logprobs", "top_logprobs", "text_offset"), map(list, columns), strict=True))


def finite(value: float) -> float:
    """JSON has no -inf."""
    return max(value, -9999.0)


@dataclass
class ChoicePrompt:
    """What a choice's answer says about its prompt, and how its text goes on.

    Attributes:
        text: for `echo`, as far as nothing that follows can change it; else empty.
        token_ids: the prompt.
        stream: the text behind the prompt. Each choice takes a copy.
        echo_stream: the text from the prompt's start, for the places of `echo`.
    """

    text: str
    token_ids: list[int]
    stream: TextStream
    echo_stream: TextStream | None = None


class CompletionRenderer(Renderer):
    """Bytes of completions.

    Args:
        head: the constant fields: id, created, model.
        tokenizer: for log-probabilities.
        prompts: by choice index.
        echo: show the prompt before the text.
        logprobs: show log-probabilities.
        prompt_logprobs: show those of the prompt in their own field.
        return_token_ids: show token ids.
        max_tokens_zero: the caller wanted only the echo; the sampled token is dropped.
        streams: events are shown as they come; False: only the whole answer is.
    """

    def __init__(
        self,
        head: dict[str, Any],
        tokenizer: TokenizerService,
        prompts: list[ChoicePrompt],
        *,
        echo: bool,
        logprobs: bool,
        prompt_logprobs: bool,
        return_token_ids: bool,
        max_tokens_zero: bool,
        streams: bool,
    ) -> None:
        self._head = {"object": "text_completion", **head}
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._echo, self._logprobs, self._prompt_logprobs = echo, logprobs, prompt_logprobs
        self._return_token_ids, self._zero, self._streams = return_token_ids, max_tokens_zero, streams
        self._is_plain = not (logprobs or return_token_ids)
        prefix = b"data: " + orjson.dumps(self._head)[:-1] + b',"choices":[{"index":'
        self._prefixes = [prefix + str(i).encode() + b',"text":' for i in range(len(prompts))]
        self._suffix = (
            b',"logprobs":null,"finish_reason":null,"stop_reason":null,"token_ids":null,"prompt_token_ids":null}]}\n\n'
        )
        self._texts: list[list[str]] = [[] for _ in prompts]
        self._ids: list[list[int]] = [[] for _ in prompts]
        self._choice_texts: dict[int, ChoiceText] = {}
        self._begun: set[int] = set()
        streams_of = [prompt.echo_stream or prompt.stream for prompt in prompts] if logprobs else []
        self._lists = [CompletionLogprobs(tokenizer.detokenizer, stream.copy()) for stream in streams_of]

    @override
    def begin(self) -> bytes:
        if not self._echo:
            return b""
        return b"".join(self._event(i, prompt.text, None) for i, prompt in enumerate(self._prompts))

    @override
    def delta(self, text: ChoiceText, delta: Delta) -> bytes:
        index = text.choice.index
        if not self._is_plain:
            return self._rich_delta(index, text, delta)
        self._texts[index].append(delta.text)
        self._choice_texts[index] = text
        if self._streams and text.finish_reason is not None:
            return self._event(index, delta.text, None, ended=text)
        if not (delta.text and self._streams):
            return b""
        return self._prefixes[index] + orjson.dumps(delta.text) + self._suffix

    def _rich_delta(self, index: int, text: ChoiceText, delta: Delta) -> bytes:
        is_first = index not in self._choice_texts
        self._choice_texts[index] = text
        self._texts[index].append(delta.text)
        self._ids[index] += delta.token_ids
        ended = text if text.finish_reason is not None else None
        columns = self._lists[index] if self._logprobs else None
        if columns is not None:
            if is_first and self._echo:
                self._add_prompt(columns, index, text)
            if not self._zero:
                for token, entry in zip(delta.token_ids, delta.logprobs, strict=True):
                    columns.add(token, entry)
            if ended:
                echoed = len(self._prompts[index].text) if self._echo else 0
                columns.end(echoed + sum(map(len, self._texts[index])) if not self._zero else sys.maxsize)
        if not self._streams:
            return b""
        lists = None if columns is None else columns.take()
        if not (delta.text or lists or ended or (self._return_token_ids and delta.token_ids)):
            return b""
        return self._event(index, delta.text, lists, delta.token_ids, ended)

    def _add_prompt(self, columns: CompletionLogprobs, index: int, text: ChoiceText) -> None:
        entries = text.choice.prompt_logprobs
        for position, token in enumerate(self._prompts[index].token_ids):
            columns.add(token, entries.get(position))

    def _event(
        self,
        index: int,
        text: str,
        logprobs: dict[str, Any] | None,
        token_ids: list[int] | None = None,
        ended: ChoiceText | None = None,
    ) -> bytes:
        shows_prompt = self._return_token_ids and index not in self._begun
        self._begun.add(index)
        choice: dict[str, Any] = {
            "index": index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": None if ended is None else ended.finish_reason,
            "stop_reason": None if ended is None else ended.stop_reason,
            "token_ids": token_ids if self._return_token_ids else None,
            "prompt_token_ids": self._prompts[index].token_ids if shows_prompt else None,
        }
        return event(self._head | {"choices": [choice]})

    @override
    def usage(self, usage: dict[str, Any]) -> bytes:
        return event(self._head | {"choices": [], "usage": usage})

    @override
    def whole(self, usage: dict[str, Any]) -> bytes:
        if self._zero:
            usage = usage | {"completion_tokens": 0, "total_tokens": usage["prompt_tokens"]}
        choices = [self._whole_choice(index, prompt) for index, prompt in enumerate(self._prompts)]
        return orjson.dumps(self._head | {"choices": choices, "usage": usage})

    def _whole_choice(self, index: int, prompt: ChoicePrompt) -> dict[str, Any]:
        text = self._choice_texts.get(index)
        # Without an output nothing follows the prompt, so that its own end is known.
        body = (prompt.stream.copy().flush() if self._echo else "") if self._zero else "".join(self._texts[index])
        shows_scores = self._prompt_logprobs and text is not None
        return {
            "index": index,
            "text": prompt.text + body if self._echo else body,
            "logprobs": self._lists[index].take() if self._logprobs else None,
            "finish_reason": "length" if text is None or self._zero else text.finish_reason,
            "stop_reason": None if text is None or self._zero else text.stop_reason,
            "token_ids": ([] if self._zero else self._ids[index]) if self._return_token_ids else None,
            "prompt_token_ids": prompt.token_ids if self._return_token_ids else None,
            "prompt_logprobs": (
                prompt_logprobs_body(self._tokenizer, text, prompt.token_ids) if shows_scores and text else None
            ),
        }


def prompt_logprobs_body(tokenizer: TokenizerService, text: ChoiceText, prompt: list[int]) -> list[Any]:
    """Per prompt token (the first has none): token id -> its log-probability, rank and text."""
    name = tokenizer.detokenizer.token_text
    rows: list[Any] = [None]
    for position in range(1, len(prompt)):
        token, logprob, rank, top = text.choice.prompt_logprobs[position]
        row = {
            str(other): {"logprob": finite(value), "rank": i, "decoded_token": name(other)}
            for i, (other, value) in enumerate(top, start=1)
        }
        row[str(token)] = {"logprob": finite(logprob), "rank": rank, "decoded_token": name(token)}
        rows.append(row)
    return rows
