"""What `kvarena.LLM` is asked and what it answers: sampling parameters, texts, and the errors of a refused request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from kvarena.engine.errors import EngineError, RequestError
from kvarena.engine.server.api.protocol import ChatCompletionRequest, CompletionRequest, SamplingFields
from kvarena.engine.server.front.groups import ChoiceFailed
from kvarena.engine.server.front.http import validated
from kvarena.engine.server.shared.errors import ApiError

Body = TypeVar("Body", bound=SamplingFields)


class request_errors:
    """A refused request leaves as a RequestError: here there is no HTTP to answer with."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, ApiError):
            raise RequestError(error.message, error.param) from None
        if isinstance(error, ChoiceFailed):
            raise EngineError(str(error)) from None


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are picked and when a text ends; None is what the server takes for a request that says nothing.

    That is the model's generation_config.json, else temperature 1, all tokens, and as length 16 tokens of a prompt or
    the rest of the context of a chat.

    Attributes:
        n: texts for each prompt.
        temperature: 0 is greedy.
        top_p, top_k, min_p: which of the likely tokens are drawn from.
        seed: of the request's own random stream.
        max_tokens, min_tokens: of the output.
        stop: a string, or several, that end the text and are no part of it.
        stop_token_ids: tokens that do.
        include_stop_str_in_output: keep what ended the text.
        ignore_eos: go on behind the model's end-of-sequence token.
        skip_special_tokens: leave special tokens out of the text.
        presence_penalty, frequency_penalty, repetition_penalty, logit_bias: change the tokens' logits.
        logprobs, prompt_logprobs: how many of the most likely tokens come with each token, beside itself.
        use_beam_search: search beams in place of drawing tokens: temperature and what it drops say nothing then.
        best_of: how many beams; None: n.
        length_penalty, early_stopping: of a beam search, as in transformers' `generate`.
        truncate_prompt_tokens: keep the last so many tokens of a prompt; -1: those that fit.

    Raises:
        RequestError: a value out of range; the message names it.
    """

    n: int = 1
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Mapping[int, float] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    use_beam_search: bool | None = None
    best_of: int | None = None
    length_penalty: float | None = None
    early_stopping: bool | str | None = None
    truncate_prompt_tokens: int | None = None

    def __post_init__(self) -> None:
        with request_errors():
            self.body(CompletionRequest, prompt="x")
            if self.max_tokens == 0:
                raise RequestError("max_tokens=0 must be at least 1", param="max_tokens")

    def body(self, kind: type[Body], **more: Any) -> Body:
        """A request of the server's with these parameters. Raises ApiError."""
        values = {key: value for key, value in asdict(self).items() if value is not None}
        if self.logit_bias is not None:
            values["logit_bias"] = {str(token): bias for token, bias in self.logit_bias.items()}
        for key in ("stop", "stop_token_ids"):
            if isinstance(values.get(key), tuple):
                values[key] = list(values[key])
        if kind is ChatCompletionRequest and self.logprobs is not None:
            values |= {"logprobs": True, "top_logprobs": self.logprobs}
        return validated(values | more, kind)


@dataclass(frozen=True)
class Logprob:
    """A token's log-probability, its rank (1: the most likely; None where it was not asked for) and its text."""

    logprob: float
    rank: int | None
    decoded_token: str


@dataclass(frozen=True)
class CompletionOutput:
    """One text.

    Attributes:
        index: from 0 to n - 1.
        text: without what ended it.
        token_ids: all tokens, the one that ended it included.
        finish_reason: `stop` or `length`.
        stop_reason: the stop string or token that ended it; None at the end of sequence or of the length.
        logprobs: for each token, by token id, itself and the most likely ones; None where not asked for.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str
    stop_reason: int | str | None
    logprobs: list[dict[int, Logprob]] | None = None

    @property
    def cumulative_logprob(self) -> float | None:
        """Sum of the tokens' own log-probabilities."""
        if self.logprobs is None:
            return None
        return sum(of[token].logprob for token, of in zip(self.token_ids, self.logprobs, strict=True))


@dataclass(frozen=True)
class RequestOutput:
    """What became of one prompt.

    Attributes:
        request_id: unique in this LLM.
        prompt: as it was given; None of token ids and of a chat.
        prompt_token_ids: what the model read.
        outputs: n texts.
        num_cached_tokens: prompt tokens served from the prefix cache.
        prompt_logprobs: for each prompt token but the first (None), by token id; None where not asked for.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    num_cached_tokens: int = 0
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    finished: bool = True
