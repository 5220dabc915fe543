"""Times some steps of an idle engine, for a scheduler that plans by what steps take.

    rows x 1 token, short contexts           what decodes take
    8 decodes beside a prompt of t tokens    what steps with prompts take, at each size that they are padded to
    rows x 1 token behind real prompts       what reading context takes
    a chunk at the end of a long prompt      what pairs of queries and keys take

A simulation's profile is timed in the same way, on a clock of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple

from kvarena.engine.clock import Clock
from kvarena.engine.contract import KVAllocator, ScheduledRequest, StepPlan, StepTimes
from kvarena.engine.model_runner import ModelRunner
from kvarena.engine.request import Request, SamplingParams

ROWS = (1, 8, 16, 32, 64, 128, 256)
BESIDE = 8  # decodes beside a prompt: with it more requests than the few that graphs have a shape of their own for
PROMPT, CHUNK, NUM_PROMPTS = 1024, 512, 16
LONG_PROMPT, MOST_TOKENS = 8192, 6000
REPEATS = 3
# A point that takes longer is not timed again, and is the last of its kind: a slow device must not hold up a start.
SLOW_SECONDS = 0.25


class Limits(NamedTuple):
    """What an engine can do: most requests and tokens of a step, and the longest request.

    Attributes:
        padded: sizes to which steps with prompts are padded, ascending.
    """

    rows: int
    tokens: int
    length: int
    padded: Sequence[int] = ()


class StepTimer:
    """Runs steps on a runner that nobody else uses meanwhile.

    Args:
        runner: idle.
        allocator: over an empty pool; nothing is left in it.
        clock: the runner's.
        overlap: a step is launched before the one before has ended, as the engine's loop will do it: what the host does
            counts only where it takes longer than the device.
    """

    def __init__(self, runner: ModelRunner, allocator: KVAllocator, clock: Clock, *, overlap: bool) -> None:
        self._runner, self._allocator, self._clock, self._overlap = runner, allocator, clock, overlap
        self._count = 0

    def requests(self, lengths: Iterable[int]) -> list[Request] | None:
        """Requests that own slots for so many tokens; None where the pool has no room for them."""
        made: list[Request] = []
        for length in lengths:
            self._count += 1
            req = Request(f"timed-{self._count}", [1] * length, SamplingParams(max_tokens=1))
            if not self._allocator.allocate(req, length):
                self.release(made)
                return None
            made.append(req)
        return made

    def release(self, requests: Sequence[Request]) -> None:
        """Give back what they own."""
        self._runner.release([req.request_id for req in requests])
        for req in requests:
            self._allocator.free(req)

    def seconds(self, entries: Sequence[tuple[Request, int, int]], repeats: int = REPEATS) -> float:
        """The least time of a step that computes `count` tokens of each request from `start` on."""
        plan = StepPlan(
            scheduled=[ScheduledRequest(req, start, count) for req, start, count in entries],
            samples=[start + count == req.num_tokens for req, start, count in entries],
        )
        found: list[float] = []
        begin = self._clock.now()
        in_flight = self._runner.execute(plan, self._allocator) if self._overlap else None
        while len(found) < repeats and sum(found) < SLOW_SECONDS:
            launched = self._runner.execute(plan, self._allocator)
            (in_flight or launched).result()
            in_flight = launched if self._overlap else None
            end = self._clock.now()
            found.append(end - begin)
            begin = end
        if in_flight is not None:
            in_flight.result()
        return min(found)


def time_steps(timer: StepTimer, limits: Limits) -> StepTimes:
    """Fit step times to some steps that are timed here."""
    rows, decode_seconds = _decodes(timer, limits)
    per_kv_token = _kv_token(timer, limits, rows, decode_seconds)
    per_pair = _pair(timer, limits)
    tokens, seconds = _prompts(timer, limits, per_pair)
    return StepTimes(
        rows=tuple(rows), decode_seconds=_rising(decode_seconds), tokens=tuple(tokens), seconds=_rising(seconds),
        per_kv_token=per_kv_token, per_pair=per_pair,
    )  # fmt: skip


def _rising(seconds: Iterable[float]) -> tuple[float, ...]:
    """What timing says of a larger step is never less than of a smaller one, to 10 ns."""
    return tuple(round(one, 8) for one in accumulate(seconds, max))


def _decodes(timer: StepTimer, limits: Limits) -> tuple[list[int], list[float]]:
    sizes, seconds = [], []
    for size in sorted({*(rows for rows in ROWS if rows < limits.rows), limits.rows}):
        requests = timer.requests([1] * size)
        if requests is None:
            break
        sizes.append(size)
        seconds.append(timer.seconds([(req, 0, 1) for req in requests]))
        timer.release(requests)
        if seconds[-1] > SLOW_SECONDS:
            break
    return sizes, seconds


def _prompts(timer: StepTimer, limits: Limits, per_pair: float) -> tuple[list[int], list[float]]:
    """Steps of ever more tokens, less what pairs take: each padded size, then close ones, for there are stairs."""
    beside = min(BESIDE, limits.rows - 1)
    sizes = list(limits.padded) or [16]
    size = sizes[-1] + 16 if limits.padded else 20  # where graphs end
    while size <= min(limits.tokens, limits.length + beside, MOST_TOKENS):
        sizes.append(size)
        size = size * 3 // 2 if size >= 1024 else size * 9 // 8
    tokens, seconds = [], []
    for size in sizes:
        length = size - beside
        if length < 2 or length > limits.length or size > limits.tokens:
            continue
        requests = timer.requests([*[1] * beside, length])
        if requests is None:
            break
        entries = [*((req, 0, 1) for req in requests[:-1]), (requests[-1], 0, length)]
        taken = timer.seconds(entries)
        timer.release(requests)
        tokens.append(size)
        seconds.append(max(0.0, taken - per_pair * length * (length + 1) / 2))
        if taken > SLOW_SECONDS:
            break
    if not tokens:  # a pool of a few tokens
        return [1], [0.0]
    return tokens, seconds


def _kv_token(timer: StepTimer, limits: Limits, rows: Sequence[int], seconds: Sequence[float]) -> float:
    """Seconds of a token of context, from decodes behind prompts that were computed."""
    if max(seconds) > SLOW_SECONDS:
        return 0.0
    size = max(one for one in rows if one <= NUM_PROMPTS)
    context = min(PROMPT, limits.length - 1, limits.tokens // size)
    requests = timer.requests([context + 1] * size) if context > 0 else None
    if requests is None:
        return 0.0
    timer.seconds([(req, 0, context) for req in requests], repeats=1)
    longer = timer.seconds([(req, context, 1) for req in requests])
    timer.release(requests)
    return max(0.0, longer - seconds[rows.index(size)]) / (size * context)


def _pair(timer: StepTimer, limits: Limits) -> float:
    """Seconds of a pair of query and key, from a chunk at the begin and at the end of a prompt."""
    length = min(LONG_PROMPT, limits.length)
    chunk = min(CHUNK, length // 4, limits.tokens)
    requests = timer.requests([length]) if chunk else None
    if requests is None:
        return 0.0
    [req] = requests
    first, at = timer.seconds([(req, 0, chunk)]), chunk
    while at < length - chunk and first < SLOW_SECONDS:
        count = min(limits.tokens, length - chunk - at)
        timer.seconds([(req, at, count)], repeats=1)
        at += count
    # The last chunk samples a token and the first one does not: one row of logits more.
    last = timer.seconds([(req, at, chunk)]) if first < SLOW_SECONDS else first
    timer.release(requests)
    return max(0.0, last - first) / (chunk * at)
