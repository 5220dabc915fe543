"""The requests of a server, which runs for ever: only the open ones are held, and all that is new is handed on.

RunRecorder --add, admit, first_token, end--> ServedLog --take, every few seconds--> Submitted, Progress
"""

from __future__ import annotations

from array import array
from typing import NamedTuple

from kvarena.engine.request import Request
from kvarena.experiments.recording.request_log import NAN, RequestLog


class Submitted(NamedTuple):
    """A request as it came.

    Attributes:
        row: its place in the order of submission.
        request_id, client_id, priority, max_tokens: its own.
        arrival_time, submit_time: in seconds on the engine's clock.
        prompt: token ids, int32.
        identities: what stands at each position of a prompt with images; None: the tokens do.
        salt: requests share prefixes with those of the same salt alone.
        is_greedy: the most likely token was picked, whatever it was.
    """

    row: int
    request_id: str
    client_id: str
    priority: int
    max_tokens: int
    arrival_time: float
    submit_time: float
    prompt: bytes
    identities: list[int] | None
    salt: str
    is_greedy: bool


class Progress(NamedTuple):
    """What became of a request so far. Times are NaN until they come.

    Attributes:
        row: its place in the order of submission.
        admission_time, first_token_time, finish_time: in seconds on the engine's clock.
        num_cached_tokens, num_loaded_tokens, num_preemptions, num_recomputed_tokens: its own.
        finish_reason: None: it is open.
        error: why it was refused or failed.
        output: token ids since the last time, int32.
    """

    row: int
    admission_time: float
    first_token_time: float
    finish_time: float
    num_cached_tokens: int
    num_loaded_tokens: int
    num_preemptions: int
    num_recomputed_tokens: int
    finish_reason: str | None
    error: str
    output: bytes


class _Open:
    """A request that has not ended, or whose end nobody has been told of."""

    __slots__ = ("admission", "finish", "first_token", "num_told", "reason", "req")

    def __init__(self, req: Request) -> None:
        self.req = req
        self.admission = self.first_token = self.finish = NAN
        self.num_told = 0  # output tokens
        self.reason: str | None = None


class ServedLog(RequestLog):
    """A `RequestLog` of which `take` hands out what is new, so that it holds no more than the open requests."""

    def __init__(self) -> None:
        super().__init__(tokens=True)
        self._count = 0
        self._submitted: list[Submitted] = []
        self._open: dict[int, _Open] = {}

    def __len__(self) -> int:
        return self._count

    def add(self, req: Request, now: float) -> None:
        """A new row for `req`, handed over at `now`."""
        row, sampling = self._count, req.sampling
        self._count += 1
        self.rows[req] = row
        self._open[row] = _Open(req)
        is_greedy = sampling.temperature == 0 and req.constraint is None and not req.images and not sampling.logit_bias
        is_greedy &= req.search is None
        is_greedy &= sampling.presence_penalty == sampling.frequency_penalty == 0 == sampling.min_tokens
        self._submitted.append(
            Submitted(
                row, req.request_id, req.client_id, req.priority, sampling.max_tokens, req.arrival_time, now,
                array("i", req.prompt_token_ids).tobytes(), req.prompt_identities if req.images else None,
                req.cache_salt, is_greedy and sampling.repetition_penalty == 1,
            )
        )  # fmt: skip

    def admit(self, row: int, when: float) -> None:
        """The first step that computes something of a request began at `when`; later ones change nothing."""
        one = self._open.get(row)
        if one is not None and one.admission != one.admission:  # NaN
            one.admission = when

    def first_token(self, row: int, when: float) -> None:
        """Its first token was there at `when`; later ones change nothing."""
        one = self._open.get(row)  # None: its client left while the step ran
        if one is not None and one.first_token != one.first_token:
            one.first_token = when

    def end(self, req: Request, when: float, reason: str | None = None) -> None:
        """`req` ended at `when`, by a reason that the engine does not know or by its own."""
        one = self._open[self.rows[req]]
        one.finish = when
        one.reason = reason or (req.finish_reason.value if req.finish_reason else "error")
        self._leaving.append(req)

    def is_open(self, req: Request) -> bool:
        """Whether `req` is known and has not ended."""
        one = self._open.get(self.rows.get(req, -1))
        return one is not None and one.reason is None

    def take(self, now: float) -> tuple[list[Submitted], list[Progress]]:
        """What is new since the last call, at `now`: requests, and what became of those that went on or ended."""
        submitted, self._submitted = self._submitted, []
        progress = []
        for row, one in list(self._open.items()):
            req, num_output = one.req, len(one.req.output_token_ids)
            if one.reason is None and req.is_finished:  # a beam that ended with those that were asked for
                self.end(req, now)
            # A beam's tokens may still be exchanged for another one's.
            if one.reason is None and (num_output == one.num_told or req.search is not None):
                continue
            progress.append(
                Progress(
                    row, one.admission, one.first_token, one.finish, req.num_cached_tokens, req.num_loaded_tokens,
                    req.num_preemptions, req.num_recomputed_tokens, one.reason, req.error,
                    array("i", req.output_token_ids[one.num_told :]).tobytes(),
                )
            )  # fmt: skip
            one.num_told = num_output
            if one.reason is not None:
                del self._open[row]
        return submitted, progress
