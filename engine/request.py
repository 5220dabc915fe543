"""Requests and their sampling parameters: host-only records, free of torch.

A request has no prefill or decode mode. It has `num_computed_tokens`, which catches up with `num_tokens`:

    prompt_token_ids                 output_token_ids     (pending)
    |------------------------------|---------------------|- - - -|
    0 ......... num_computed_tokens ......... num_tokens

`num_pending_tokens` counts tokens that the device has sampled and the host has not seen yet. It is 0 unless the
engine overlaps scheduling with execution.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

from kvarena.engine.beams import EARLY_STOPPING, BeamSearch
from kvarena.engine.errors import RequestError


class RequestStatus(enum.Enum):
    """Where a request is in its life."""

    WAITING = "waiting"
    RUNNING = "running"
    SWAPPED = "swapped"  # waiting, with its KV in host memory
    FINISHED = "finished"


class FinishReason(enum.Enum):
    """Why a request ended."""

    STOP = "stop"  # an end-of-sequence or stop token
    LENGTH = "length"  # max_tokens reached
    ABORT = "abort"  # the client went away
    REJECTED = "rejected"  # can never run on this engine
    ERROR = "error"  # the engine failed it


class TokenConstraint(Protocol):
    """Which tokens may come next (structured output). One per request; it follows the request's tokens.

    Attributes:
        num_late: steps in a row in which there was no time for `fill`. Kept by the runner: the token that such a step
            sampled is void, and the request computes that position again.
    """

    num_late: int

    @property
    def is_free(self) -> bool:
        """Whether every token may come next: `fill` need not be called."""
        ...

    @property
    def failure(self) -> str:
        """Why the output is not what was asked for, or an empty string. The request then ends with an error."""
        ...

    def fill(self, bitmask: Any) -> None:
        """Set bit `t % 32` of `bitmask[t // 32]` for every token t that may come next.

        Args:
            bitmask: numpy int32 [ceil(vocab_size / 32)], overwritten.
        """
        ...

    def accept(self, token_id: int) -> None:
        """Move on by one token, which the mask allowed."""
        ...


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to pick a request's tokens. Validated where it is made, never changed afterwards.

    Attributes:
        temperature: 0 is greedy.
        top_p: nucleus mass in (0, 1].
        top_k: number of most likely tokens kept; 0 keeps all.
        min_p: drop tokens below this share of the most likely token's probability, in [0, 1].
        seed: seed of the request's own random stream; None lets the engine derive one from its seed and the request id.
        max_tokens: most output tokens, at least 1.
        min_tokens: end-of-sequence and stop tokens are barred until so many output tokens exist.
        stop_token_ids: tokens that end the request, beside the model's end-of-sequence tokens.
        ignore_eos: do not end at the model's end-of-sequence tokens.
        presence_penalty: subtracted once from the logit of each token in the output, in [-2, 2].
        frequency_penalty: subtracted per occurrence in the output, in [-2, 2].
        repetition_penalty: divides positive and multiplies negative logits of seen tokens (prompt and output), > 0.
        logit_bias: token id -> value added to its logit.
        logprobs: number of most likely tokens whose log-probabilities are returned beside the sampled one's;
            None returns none.
        logprob_token_ids: tokens whose log-probabilities are returned, whichever `logprobs` most likely ones there are;
            empty: those are.
        prompt_logprobs: as `logprobs`, for each prompt token but the first; None returns none.
        n: number of parallel samples of the prompt.
        beams: width of a beam search, which takes the place of drawing: temperature, top_p, top_k, min_p and seed say
            nothing then; 0: none.
        length_penalty, early_stopping: of a beam search, see `BeamSearch`.
        allowed_token_ids: the only tokens that may come; empty: any. A server's engine makes a constraint of it.
        barred: sequences of tokens that may not come; likewise.

    Raises:
        RequestError: a value out of range; `param` names it.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int = 16
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    logprob_token_ids: tuple[int, ...] = ()
    prompt_logprobs: int | None = None
    n: int = 1
    beams: int = 0
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    allowed_token_ids: tuple[int, ...] = ()
    barred: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        def check(ok: bool, name: str, must: str) -> None:
            if not ok:
                raise RequestError(f"{name}={getattr(self, name)!r} must be {must}", param=name)

        finite = (self.temperature, self.top_p, self.min_p, self.presence_penalty, self.frequency_penalty)
        for name, value in zip(
            ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty"), finite, strict=True
        ):
            check(math.isfinite(value), name, "a finite number")
        check(self.temperature >= 0, "temperature", "at least 0 (0 is greedy)")
        check(0 < self.top_p <= 1, "top_p", "in (0, 1]")
        check(self.top_k >= 0, "top_k", "at least 0 (0 keeps all tokens)")
        check(0 <= self.min_p <= 1, "min_p", "in [0, 1]")
        check(self.max_tokens >= 1, "max_tokens", "at least 1")
        check(0 <= self.min_tokens <= self.max_tokens, "min_tokens", "between 0 and max_tokens")
        check(-2 <= self.presence_penalty <= 2, "presence_penalty", "in [-2, 2]")
        check(-2 <= self.frequency_penalty <= 2, "frequency_penalty", "in [-2, 2]")
        check(
            self.repetition_penalty > 0 and math.isfinite(self.repetition_penalty),
            "repetition_penalty",
            "a finite number above 0",
        )
        check(all(math.isfinite(v) for v in self.logit_bias.values()), "logit_bias", "finite for every token")
        check(self.logprobs is None or self.logprobs >= 0, "logprobs", "at least 0")
        check(not self.logprob_token_ids or self.logprobs is not None, "logprob_token_ids", "empty without logprobs")
        check(self.prompt_logprobs is None or self.prompt_logprobs >= 0, "prompt_logprobs", "at least 0")
        check(self.n >= 1, "n", "at least 1")
        check(self.beams >= 0, "beams", "at least 0 (0 searches no beams)")
        check(not (self.beams and self.logprob_token_ids), "logprob_token_ids", "empty with beams")
        check(not self.beams or self.n <= self.beams, "n", f"at most the number of beams, {self.beams}")
        check(math.isfinite(self.length_penalty), "length_penalty", "a finite number")
        check(self.early_stopping in EARLY_STOPPING, "early_stopping", "true, false or never")

    @property
    def num_sequences(self) -> int:
        """Requests that the engine runs for one of these: samples, or beams."""
        return self.beams or self.n


@dataclass(frozen=True, slots=True)
class ImageSpan:
    """An image of a prompt: its features stand at positions [start, stop), in place of token embeddings.

        token ids     5  9 | 300 300 300 300 300 300 | 7        300: the placeholder, the same for every image
        features           |  tile 0   |   tile 1    |
                          start                     stop

    Attributes:
        start, stop: positions in the prompt.
        identity: a digest of the pixels and of how they were processed, above any token id: what these positions are
            known by where equal prompts are looked for.
        num_tiles: pieces that are encoded apart; each fills (stop - start) / num_tiles positions, in order.
        pixels: what is encoded; the runner's business alone.
        tile_weight: what a tile counts in a step's budget of tiles: more than 1 for one that is larger than most.
        grid: rows and columns of its features, for a model whose positions have three dimensions; None: a position
            is a number.
    """

    start: int
    stop: int
    identity: int
    num_tiles: int
    pixels: Any = field(default=None, repr=False, compare=False)
    tile_weight: int = 1
    grid: tuple[int, int] | None = None

    @property
    def tile_tokens(self) -> int:
        """Positions of a tile."""
        return (self.stop - self.start) // self.num_tiles

    @property
    def rope_shift(self) -> int:
        """How far positions behind it are turned less than they are counted: it advances by its longer side alone."""
        return 0 if self.grid is None else max(self.grid) - (self.stop - self.start)


@dataclass(eq=False, slots=True)
class Request:
    """One request: what was asked, and how far it is. Compared and hashed by identity.

    The first group of fields is set by the caller and never changed; the second is the engine's.

    Attributes:
        request_id: unique in the engine.
        prompt_token_ids: at least one token.
        sampling: how tokens are picked and when the request ends.
        arrival_time: the *scheduled* arrival in seconds on the engine's clock; latencies count from here.
        priority: lower runs first (the priority scheduler).
        client_id: whose request it is (the fair scheduler).
        kind: which kind of request it is, as the workload says (the eviction policy `workload`); empty: it says none.
        cache_salt: requests share prefix-cache blocks only with requests of the same salt.
        eos_token_ids: the model's end-of-sequence tokens (empty with `ignore_eos`).
        oracle_output_len: the true output length, if the workload knows it. Only reservation policies and
            shortest-first schedulers may read it.
        parent: for parallel sampling and beams, the request whose prompt KV this one may share.
        search, beam: the beam search that this is a beam of, and its number there. A beam may take over the tokens of
            another one between two steps, and computes what differs.
        constraint: which tokens may come next, or None for all.
        images: of the prompt, in order; they do not overlap.

        output_token_ids: tokens sampled so far.
        num_computed_tokens: positions whose KV is in the pool, or will be when the scheduled steps have run.
            The scheduler advances it when it schedules.
        num_pending_tokens: tokens sampled on the device that the host has not seen.
        num_slots: positions [0, num_slots) may be written without asking the allocator again. Kept by the
            allocator; 0 when the request owns nothing.
        num_cached_tokens: prompt tokens served from the prefix cache at first admission.
        num_loaded_tokens: of these, those that came up from a level below the pool.
        num_recomputed_tokens: tokens computed again because a preemption dropped them.
        num_preemptions: how often it was preempted.
        error: why it was rejected or failed, one line; empty otherwise.
    """

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    arrival_time: float = 0.0
    priority: int = 0
    client_id: str = ""
    kind: str = ""
    cache_salt: str = ""
    eos_token_ids: frozenset[int] = frozenset()
    oracle_output_len: int | None = None
    parent: Request | None = None
    search: BeamSearch | None = None
    beam: int = 0
    constraint: TokenConstraint | None = None
    images: tuple[ImageSpan, ...] = ()

    output_token_ids: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    num_pending_tokens: int = 0
    num_slots: int = 0
    num_cached_tokens: int = 0
    num_loaded_tokens: int = 0
    num_recomputed_tokens: int = 0
    num_preemptions: int = 0
    status: RequestStatus = RequestStatus.WAITING
    finish_reason: FinishReason | None = None
    error: str = ""
    # eos_token_ids and sampling.stop_token_ids together. Derived once, because it is read for every token.
    stop_ids: frozenset[int] = field(init=False)
    # What stands at each position of the prompt: a token, or an image's identity. The prompt itself without images.
    prompt_identities: list[int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.prompt_token_ids:
            raise RequestError(
                f"request {self.request_id!r} has a prompt of zero tokens; give it at least one",
                param="prompt",
            )
        eos = frozenset() if self.sampling.ignore_eos else self.eos_token_ids
        self.stop_ids = eos | frozenset(self.sampling.stop_token_ids)
        self.prompt_identities = self.prompt_token_ids
        if self.images:
            self.prompt_identities = list(self.prompt_token_ids)
            for image in self.images:
                self.prompt_identities[image.start : image.stop] = [image.identity] * (image.stop - image.start)

    @property
    def num_prompt_tokens(self) -> int:
        """Length of the prompt in tokens."""
        return len(self.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens known to the host: prompt and output."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def max_total_tokens(self) -> int:
        """Most tokens that the request can ever have: prompt + max_tokens."""
        return len(self.prompt_token_ids) + self.sampling.max_tokens

    @property
    def expected_output_len(self) -> int:
        """The true output length where the workload knows it, else the most that was asked for."""
        return self.sampling.max_tokens if self.oracle_output_len is None else self.oracle_output_len

    @property
    def is_finished(self) -> bool:
        """True when the request has ended, for whatever reason."""
        return self.status is RequestStatus.FINISHED

    def token_ids(self, start: int, stop: int) -> list[int]:
        """Tokens at positions [start, stop) of prompt + output."""
        num_prompt = len(self.prompt_token_ids)
        if stop <= num_prompt:
            return self.prompt_token_ids[start:stop]
        if start >= num_prompt:
            return self.output_token_ids[start - num_prompt : stop - num_prompt]
        return self.prompt_token_ids[start:] + self.output_token_ids[: stop - num_prompt]

    def identities(self, start: int, stop: int) -> list[int]:
        """What stands at positions [start, stop): tokens, and images by identity. Equal prefixes have equal KV."""
        num_prompt = len(self.prompt_token_ids)
        if stop <= num_prompt:
            return self.prompt_identities[start:stop]
        if start >= num_prompt:
            return self.output_token_ids[start - num_prompt : stop - num_prompt]
        return self.prompt_identities[start:] + self.output_token_ids[: stop - num_prompt]

    def within_tiles(self, start: int, stop: int, most: int, *, is_first: bool = True) -> tuple[int, int]:
        """How far a step gets that may encode so many tiles.

        Args:
            start, stop: positions that the step would compute.
            most: tiles that it may still encode, by weight.
            is_first: it has encoded none: one tile is taken even where its weight is more than `most`.

        Returns:
            The largest end <= `stop` for which [start, end) touches no more tiles, and what these weigh.
        """
        weight = 0
        for image in self.images:
            first, last = max(start, image.start), min(stop, image.stop)
            if first >= last:
                continue
            size = image.tile_tokens
            begin = (first - image.start) // size
            count = (last - 1 - image.start) // size + 1 - begin
            taken = max((most - weight) // image.tile_weight, int(is_first and not weight))
            if count > taken:
                end = image.start + (begin + taken) * size if taken else first
                return end, weight + taken * image.tile_weight
            weight += count * image.tile_weight
        return stop, weight

    def stop_reason(self) -> FinishReason | None:
        """Whether the last output token ends the request, and why."""
        num_output = len(self.output_token_ids)
        if self.output_token_ids[-1] in self.stop_ids and num_output > self.sampling.min_tokens:
            return FinishReason.STOP
        if num_output >= self.sampling.max_tokens:
            return FinishReason.LENGTH
        return None


AnyRequest = TypeVar("AnyRequest", bound=Request)


def expand(req: AnyRequest) -> list[AnyRequest]:
    """The requests that the engine runs for one, named `{request_id}-{i}`: `sampling.n` parallel samples, or the beams
    of a search; `[req]` itself for a single one.

    The first computes the prompt and is the parent of the others, which may share its KV. Seeds differ: sample 0
    keeps the seed, so that it gives the tokens of the same request with n = 1. A constraint follows one sample's
    tokens, so it is left to the caller to give each sample its own. When a search has ended, beam i has the i-th best
    text.

    Args:
        req: a request that was not added to an engine.

    Returns:
        The requests in the order in which they must be added.
    """
    if req.sampling.beams:
        return _beams(req)
    if req.sampling.n == 1:
        return [req]
    samples: list[AnyRequest] = []
    for i in range(req.sampling.n):
        seed = req.sampling.seed
        if seed is not None and i > 0:
            seed = (seed + i * 0x9E3779B97F4A7C15) % 2**63
        samples.append(_copy(req, i, replace(req.sampling, n=1, seed=seed), samples))
    return samples


def _beams(req: AnyRequest) -> list[AnyRequest]:
    asked, width = req.sampling, req.sampling.beams
    search = BeamSearch(
        width, [f"{req.request_id}-{i}" for i in range(width)], asked.max_tokens, req.stop_ids, asked.length_penalty,
        asked.early_stopping, asked.min_tokens, asked.logprobs,
    )  # fmt: skip
    sampling = replace(
        asked, n=1, temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, seed=None,
        logprobs=max(search.num_candidates, asked.logprobs or 0),
    )  # fmt: skip
    beams: list[AnyRequest] = []
    for i in range(width):
        beams.append(_copy(req, i, sampling, beams))
        # The first one computes the prompt.
        sampling = replace(sampling, prompt_logprobs=None)
        beams[i].search, beams[i].beam = search, i
    return beams


def _copy(req: AnyRequest, i: int, sampling: SamplingParams, before: list[AnyRequest]) -> AnyRequest:
    return replace(
        req,
        request_id=f"{req.request_id}-{i}",
        sampling=sampling,
        parent=before[0] if before else None,
        constraint=None,
        output_token_ids=[],
    )
