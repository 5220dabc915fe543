"""From a request's parameters to the engine's: defaults, limits, and a 400 for what cannot be honoured."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from kvarena.engine.errors import RequestError
from kvarena.engine.request import SamplingParams
from kvarena.engine.server.api.foreign import check_foreign
from kvarena.engine.server.api.protocol import SamplingFields
from kvarena.engine.server.shared.config import ServerConfig
from kvarena.engine.server.shared.errors import bad_request, beyond_context, context_overflow
from kvarena.engine.server.shared.ipc import EngineInfo

MAX_STOP_STRINGS = 64
MAX_STOP_CHARS = 1024
MAX_STOP_TOKENS = 1024
_MAX_NAMED = 5  # keys of a logit_bias, in one error
COMPLETIONS_MAX_TOKENS = 16
# What both sides know under one name: a parameter that is handed on as it is needs no line here.
_ALIKE = tuple(one.name for one in fields(SamplingParams) if one.name in SamplingFields.model_fields)
# Below this a temperature is greedy: logits divided by it overflow float16.
_MIN_TEMPERATURE = 0.01


def stop_strings(req: SamplingFields) -> list[str]:
    """The request's stop strings, checked."""
    stops = [req.stop] if isinstance(req.stop, str) else list(req.stop or ())
    if len(stops) > MAX_STOP_STRINGS:
        raise bad_request(f"stop holds {len(stops)} strings; at most {MAX_STOP_STRINGS} are allowed", "stop")
    if any(not stop for stop in stops):
        raise bad_request("stop holds an empty string; leave it out", "stop")
    if any(len(stop) > MAX_STOP_CHARS for stop in stops):
        raise bad_request(f"a stop string may have at most {MAX_STOP_CHARS} characters", "stop")
    return stops


def check_unsupported(req: SamplingFields, config: ServerConfig, has_priorities: bool) -> None:
    """400 for parameters that this server does not honour, and for too many choices.

    Args:
        req: the request.
        config: the operator's limits.
        has_priorities: the scheduler looks at them.
    """
    check_foreign(req)
    if req.priority and not has_priorities:
        raise bad_request(
            "priority is not looked at by this server's scheduler (--scheduler priority does)", "priority"
        )
    for name in ("n", "best_of"):
        if (getattr(req, name) or 1) > config.max_n:
            raise bad_request(f"{name}={getattr(req, name)} is above this server's limit of {config.max_n}", name)
    _check_search(req)
    if req.stream_options is not None and not req.stream:
        raise bad_request("stream_options is only allowed with stream=true", "stream_options")
    if req.spaces_between_special_tokens is False:
        raise bad_request("spaces_between_special_tokens=false is not supported", "spaces_between_special_tokens")


def _check_search(req: SamplingFields) -> None:
    """400 for what a beam search cannot honour, and for what is nothing without one."""
    if not req.use_beam_search:
        if req.best_of is not None and req.best_of != (req.n or 1):
            raise bad_request("best_of is not supported without use_beam_search; use n", "best_of")
        for name, harmless in (("length_penalty", 1), ("early_stopping", False)):
            if getattr(req, name) not in (None, harmless):
                raise bad_request(f"{name} is not supported without use_beam_search", name)
        return
    if req.stream:
        raise bad_request("stream=true does not go with use_beam_search: the best texts are known at the end", "stream")
    if (req.best_of or req.n or 1) < (req.n or 1):
        raise bad_request(f"best_of={req.best_of}, the number of beams, is below n={req.n}", "best_of")
    for name in ("stop", "allowed_token_ids", "bad_words", "logprob_token_ids"):
        if getattr(req, name) not in (None, [], ""):
            raise bad_request(f"{name} does not go with use_beam_search", name)


def logit_bias(req: SamplingFields, vocab_size: int) -> dict[int, float]:
    """The request's logit_bias with integer keys inside the vocabulary and values in [-100, 100]."""
    given = req.logit_bias or {}
    bad = [key for key in given if not (key.isascii() and key.isdigit() and len(key) < 12 and int(key) < vocab_size)]
    if bad:
        named = ", ".join(repr(key[:50]) for key in bad[:_MAX_NAMED])
        raise bad_request(f"logit_bias key {named} is not a token id, from 0 and below {vocab_size}", "logit_bias")
    made = {}
    for key, value in given.items():
        if not -100 <= value <= 100:
            raise bad_request(f"logit_bias value {value} is not between -100 and 100", "logit_bias")
        made[int(key)] = value
    return made


def fit_max_tokens(requested: int | None, default: int | None, num_prompt: int, limits: EngineInfo, what: str) -> int:
    """Output tokens that a prompt may get.

    Args:
        requested: what the caller asked for, or None.
        default: what is given without a request, or None for the rest of the context.
        num_prompt: tokens of the prompt.
        limits: the engine's.
        what: `prompt` or `messages`, for the error.

    Raises:
        ApiError: prompt + output is beyond the context, or beyond what the KV pool can ever hold.
    """
    limit = limits.max_model_len
    if num_prompt >= limit:
        raise context_overflow(limit, num_prompt, None, what)
    if requested is not None and num_prompt + requested > limit:
        raise context_overflow(limit, num_prompt, requested, what)
    room = min(limit, limits.max_request_tokens) - num_prompt
    if room < (requested if requested is not None else 1):
        need = num_prompt + (requested or 1)
        raise beyond_context(
            f"This request needs KV memory for {need} tokens, but the server's whole KV pool holds "
            f"{limits.max_request_tokens}. Please reduce the length of the {what} or completion.",
            what,
        )
    if requested is not None:
        return requested
    return room if default is None else min(default, room)


def _num_logprobs(name: str, asked: int | None, config: ServerConfig, limits: EngineInfo) -> int | None:
    """Alternatives per token; -1 asks for the whole vocabulary. Raises a 400 above the operator's limit."""
    most = limits.vocab_size if config.max_logprobs == -1 else min(config.max_logprobs, limits.vocab_size)
    number = limits.vocab_size if asked == -1 else asked
    if number is not None and number > most:
        all_of_it = f": -1 is all {number} tokens, which --max-logprobs -1 allows" if asked == -1 else ""
        raise bad_request(f"{name}={asked} is above this server's limit of {most}{all_of_it}", name)
    return number


def sampling_params(
    req: SamplingFields,
    config: ServerConfig,
    limits: EngineInfo,
    *,
    max_tokens: int,
    logprobs: int | None,
    barred: tuple[tuple[int, ...], ...] = (),
) -> SamplingParams:
    """How a request's tokens are picked.

    Args:
        req: the request.
        config: the operator's limits.
        limits: the engine's.
        max_tokens: output tokens, from `fit_max_tokens`; 0 (echo only) samples one that is dropped.
        logprobs: alternatives per token, -1 for the whole vocabulary, or None.
        barred: token ids of `bad_words`.

    Raises:
        ApiError: a parameter out of range.
    """
    logprobs = _num_logprobs("logprobs", logprobs, config, limits)
    prompt_logprobs = _num_logprobs("prompt_logprobs", req.prompt_logprobs, config, limits)
    if prompt_logprobs is not None and req.stream:
        raise bad_request("prompt_logprobs is not available with stream=true", "prompt_logprobs")
    allowed = req.allowed_token_ids
    if allowed and max(allowed) >= limits.vocab_size:
        raise bad_request(f"allowed_token_ids must be ids from 0 to {limits.vocab_size - 1}", "allowed_token_ids")
    named = req.logprob_token_ids or []
    if named and logprobs is None:
        raise bad_request("logprob_token_ids needs logprobs to be set", "logprob_token_ids")
    if named and max(named) >= limits.vocab_size:
        raise bad_request(
            f"logprob_token_ids holds {max(named)}, which is out of vocabulary: ids are 0 to {limits.vocab_size - 1}",
            "logprob_token_ids",
        )
    if named and not max_tokens:
        raise bad_request(
            "logprob_token_ids is not for echo with max_tokens=0: no output tokens are generated", "logprob_token_ids"
        )
    stop_tokens = req.stop_token_ids or []
    if len(stop_tokens) > MAX_STOP_TOKENS or any(token >= limits.vocab_size for token in stop_tokens):
        raise bad_request(
            f"stop_token_ids must be at most {MAX_STOP_TOKENS} ids from 0 to {limits.vocab_size - 1}", "stop_token_ids"
        )
    if (req.min_tokens or 0) > max_tokens:
        raise bad_request(f"min_tokens={req.min_tokens} is above max_tokens={max_tokens}", "min_tokens")
    bias = logit_bias(req, limits.vocab_size)
    values: dict[str, Any] = {"temperature": 1.0}
    for name in _ALIKE:
        asked = getattr(req, name)
        asked = limits.defaults.get(name) if asked is None else asked
        if asked is not None:
            values[name] = asked
    # What has another form on the engine's side.
    values |= {
        "temperature": 0.0 if values["temperature"] < _MIN_TEMPERATURE else values["temperature"],
        "top_k": max(0, int(values.get("top_k", 0))),
        # -1 asks for another text each time, as in vLLM.
        "seed": None if req.seed is None or req.seed == -1 else req.seed % 2**63,
        "beams": (req.best_of or req.n or 1) if req.use_beam_search else 0,
        "max_tokens": max(1, max_tokens),
        "stop_token_ids": tuple(stop_tokens),
        "logit_bias": bias,
        "logprobs": logprobs,
        "logprob_token_ids": tuple(dict.fromkeys(named)),
        "prompt_logprobs": prompt_logprobs,
        "allowed_token_ids": tuple(sorted(set(allowed or ()))),
        "barred": barred,
    }
    if values["beams"]:
        least = values["beams"] + len({*limits.eos_token_ids, *stop_tokens})
        if least > limits.vocab_size:
            raise bad_request(f"so many beams and stop tokens need a vocabulary of {least} tokens", "n")
    try:
        return SamplingParams(**values)
    except RequestError as error:
        raise bad_request(str(error), error.param) from error
