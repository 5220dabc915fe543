"""Sessions: each request's prompt is the whole history so far, so it extends the prompt before.

    system | first | reply 1 | next | reply 2 | next ...
    |<- prompt 1 ->|
    |<------- prompt 2 ----->  ... ->|

What an engine will answer is not known beforehand, so the replies in a history are drawn from the seed, with the length
of the output that was asked for. A prefix cache can reuse a prompt that it has seen, and never the engine's own reply.

Times are a fixed schedule, which no engine delays: sessions start as a Poisson process, and the next turn comes
`token_time` per output token plus a drawn gap after the last one.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kvarena.engine.checks import check_int, check_number
from kvarena.engine.errors import ConfigError
from kvarena.experiments.workloads.parts.base import FloatArray, IntArray, LengthTable, Workload
from kvarena.experiments.workloads.parts.distributions import LengthDistribution, LognormalLength, UniformLength
from kvarena.experiments.workloads.parts.limits import MAX_LENGTH
from kvarena.experiments.workloads.parts.seeds import Purpose, generator
from kvarena.experiments.workloads.synthetic import required_num_requests

_MAX_SESSIONS_PER_REQUEST = 1000


class _SessionWorkload(Workload):
    """Turns of sessions in order of time.

    Args:
        turns: turns of a session.
        first: tokens that the first turn adds to the system prompt.
        following: tokens that each later turn adds to the history.
        output: tokens of each reply.
        system_len: tokens of the system prompt that all sessions share; 0 is none.
        gap: mean seconds between the end of a reply and the next turn; exponential.
        pause_share: share of the later turns before which somebody pauses, beside the gap.
        pause: mean seconds of that; exponential.
        token_time: seconds per output token that a reply is taken to last.
        session_rate: sessions started per second.
        max_total_len: a session ends before the turn whose prompt + output exceeds this; None is no limit.
        common: num_requests, seed, vocab_size, reserved_token_ids.
    """

    def __init__(
        self,
        *,
        turns: UniformLength,
        first: LengthDistribution,
        following: LengthDistribution,
        output: LengthDistribution,
        system_len: int,
        gap: float,
        token_time: float,
        session_rate: float,
        max_total_len: int | None,
        pause_share: float = 0.0,
        pause: float = 0.0,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self._num = required_num_requests(self.num_requests)
        self._turns, self._first, self._following, self._output = turns, first, following, output
        self._system_len = check_int("workload.system_len", system_len, 0, MAX_LENGTH)
        self._gap, self._pause_share, self._pause = gap, pause_share, pause
        self._token_time = check_number("workload.token_time", token_time)
        self._session_rate = check_number("workload.session_rate", session_rate, above=True)
        if max_total_len is not None:
            check_int("workload.max_total_len", max_total_len, 2)
        self._max_total = MAX_LENGTH if max_total_len is None else max_total_len
        self._session: IntArray = np.empty(0, dtype=np.int64)

    def _build(self) -> LengthTable:
        num_sessions = self._num // self._turns.low + 1
        while True:
            prompts, outputs, planned, kept = self._draw_lengths(num_sessions)
            if kept.sum() >= self._num:
                break
            if num_sessions > _MAX_SESSIONS_PER_REQUEST * self._num:
                raise ConfigError(
                    f"{self.name}: hardly any first turn fits in workload.max_total_len={self._max_total}; raise it, "
                    "or shorten the prompts"
                )
            num_sessions *= 2
        # No more sessions than needed: later ones would push turns of earlier ones out of the first `num_requests`.
        num_sessions = int(np.searchsorted(np.cumsum(kept.sum(axis=1)), self._num)) + 1
        kept = kept[:num_sessions]
        times = self._draw_times(outputs[:num_sessions])[kept]
        order = np.argsort(times, kind="stable")[: self._num]
        session = np.nonzero(kept)[0]
        self._session = session[order]
        turn = np.nonzero(kept)[1][order]
        num_cut = int((kept.sum(axis=1) < planned[:num_sessions]).sum())
        notes = [f"{num_sessions} sessions, {len(session) / num_sessions:.2f} turns each, replies in histories drawn"]
        notes += [f"{num_cut} sessions cut short at {self._max_total} tokens"] if num_cut else []
        return LengthTable(
            prompts[:num_sessions][kept][order],
            outputs[:num_sessions][kept][order],
            times[order] - times[order[0]],
            [f"session-{index}" for index in self._session.tolist()],
            kinds=[f"turn-{1 + index}" for index in turn.tolist()],
            notes=tuple(notes),
        )

    def _draw_lengths(self, num_sessions: int) -> tuple[IntArray, IntArray, IntArray, np.ndarray]:
        """Per session and turn: prompt and output lengths; planned turns; which turns are kept."""
        shape = (num_sessions, self._turns.high)
        size = num_sessions * self._turns.high
        planned = self._turns.draw(generator(self.seed, Purpose.STRUCTURE), num_sessions)
        added = self._following.draw(generator(self.seed, Purpose.PROMPT_LENGTHS), size).reshape(shape)
        added[:, 0] = self._first.draw(generator(self.seed, Purpose.PROMPT_LENGTHS, 1), num_sessions)
        outputs = self._output.draw(generator(self.seed, Purpose.OUTPUT_LENGTHS), size).reshape(shape)
        prompts = self._system_len + np.cumsum(added, axis=1) + np.cumsum(outputs, axis=1) - outputs
        fits = (prompts + outputs <= self._max_total) & (np.arange(self._turns.high) < planned[:, None])
        return prompts, outputs, planned, fits

    def _draw_times(self, outputs: IntArray) -> FloatArray:
        """Per session and turn: its time in seconds."""
        starts = np.cumsum(generator(self.seed, Purpose.TIMES).exponential(1 / self._session_rate, len(outputs)))
        gaps = generator(self.seed, Purpose.TIMES, 1).exponential(1.0, outputs.shape) * self._gap
        if self._pause_share:
            rng = generator(self.seed, Purpose.TIMES, 2)
            pauses = rng.exponential(1.0, outputs.shape) * self._pause
            gaps += pauses * (rng.random(outputs.shape) < self._pause_share)
        waits = np.cumsum(outputs * self._token_time + gaps, axis=1)
        return np.asarray(starts[:, None] + np.concatenate([np.zeros((len(outputs), 1)), waits[:, :-1]], axis=1))

    def prompt(self, row: int) -> list[int]:
        """The shared system prompt and the session's history up to this turn."""
        history_len = int(self.table.prompt_lens[row]) - self._system_len
        return self._prefix_tokens.take(0, self._system_len) + self._tokens.take(int(self._session[row]), history_len)


class MultiTurnWorkload(_SessionWorkload):
    """People in conversation: long replies, short questions, time to think.

    Args:
        num_turns: {min, max} questions of a conversation, both included.
        user_len: {mean, sigma, min, max} tokens of a question (truncated lognormal).
        output_len: {mean, sigma, min, max} tokens of a reply.
        think_time: mean seconds from the end of a reply to the next question.
        options: system_len, token_time, session_rate, max_total_len; num_requests (turns in all), seed, vocab_size,
            reserved_token_ids.
    """

    name = "multi_turn"
    source = "synthetic, conversations with think times"

    def __init__(self, *, num_turns: Any, user_len: Any, output_len: Any, think_time: float, **options: Any) -> None:
        user = LognormalLength.from_option("workload.user_len", user_len)
        super().__init__(
            turns=UniformLength.from_option("workload.num_turns", num_turns),
            first=user,
            following=user,
            output=LognormalLength.from_option("workload.output_len", output_len),
            gap=check_number("workload.think_time", think_time),
            **options,
        )


class AgentLoopWorkload(_SessionWorkload):
    """Agents at work: a long shared system prompt, short tool calls, long observations, a context that grows.

    Args:
        num_steps: {min, max} model calls of a task, both included.
        task_len: {mean, sigma, min, max} tokens of the task (truncated lognormal).
        observation_len: {mean, sigma, min, max} tokens that a tool returns.
        output_len: {mean, sigma, min, max} tokens of a call.
        tool_time: mean seconds that a tool takes.
        user_share: share of the later calls that a person asks for, not a tool's end, from 0 to 1.
        user_time: mean seconds that a person takes before that.
        options: system_len, token_time, session_rate, max_total_len; num_requests (calls in all), seed, vocab_size,
            reserved_token_ids.
    """

    name = "agent_loop"
    source = "synthetic, agents with growing context"

    def __init__(
        self, *, num_steps: Any, task_len: Any, observation_len: Any, output_len: Any, tool_time: float,
        user_share: float = 0.0, user_time: float = 0.0, **options: Any,
    ) -> None:  # fmt: skip
        if check_number("workload.user_share", user_share) > 1:
            raise ConfigError(f"workload.user_share={user_share} must be a share from 0 to 1")
        super().__init__(
            turns=UniformLength.from_option("workload.num_steps", num_steps),
            first=LognormalLength.from_option("workload.task_len", task_len),
            following=LognormalLength.from_option("workload.observation_len", observation_len),
            output=LognormalLength.from_option("workload.output_len", output_len),
            gap=check_number("workload.tool_time", tool_time),
            pause_share=user_share,
            pause=check_number("workload.user_time", user_time),
            **options,
        )
