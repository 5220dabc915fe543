"""What the engine process keeps beside the engine: its facts, whose requests it has, and what a step sends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from kvarena.engine.core import Engine, StepOutput
from kvarena.engine.request import Request
from kvarena.engine.server.shared.ipc import EngineInfo, ToFront, pack_ids

if TYPE_CHECKING:  # llguidance, ZeroMQ and torch: the supervisor imports this, too
    from kvarena.engine.ranks.peers import Peers
    from kvarena.engine.server.engine.event_publisher import CacheFeed
    from kvarena.engine.server.engine.matchers import CompiledGrammar
    from kvarena.engine.server.engine.steering import SteeredGrammar
    from kvarena.engine.vision.encoder import ImageCounts


class Recorder(Protocol):
    """Told what a served engine does, by its loop. Nothing of it may raise.

    Attributes:
        is_on: it still records.
    """

    is_on: bool

    def on_submit(self, req: Request, now: float) -> None:
        """`req` is handed to the engine at `now`."""
        ...

    def on_refused(self, req: Request, now: float, error: str) -> None:
        """The engine would not take it."""
        ...

    def on_left(self, req: Request, *, stopped: bool = False) -> None:
        """`req` ended outside of a step: its client left, its text is complete (`stopped`), or its step failed."""
        ...

    def on_step(self, step: StepOutput) -> None:
        """A step has ended, and its requests are as it left them."""
        ...

    def turn(self) -> None:
        """Between two steps, and now and then while there are none."""
        ...

    def close(self) -> None:
        """The server ends."""
        ...


@dataclass(frozen=True)
class ServedEngine:
    """An engine and what the fronts must know about it.

    Attributes:
        engine: on a wall clock; its ledger is the loop's, which keeps no history.
        info: what the fronts are told.
        compile_grammar: compiles a grammar from (kind, grammar), or None when the runner cannot constrain tokens.
        words: turns the settings that a message names into the words of the command that was given.
        feed: publishes what the prefix cache holds, or None.
        image_counts: what the encoder of images has done; None: the model reads text only.
        peers: the other ranks, where several share the model; they end with the engine.
        recorder: told of requests and steps, or None.
    """

    engine: Engine
    info: EngineInfo
    compile_grammar: Callable[[str, str], CompiledGrammar | SteeredGrammar] | None = None
    words: Callable[[str], str] = str
    feed: CacheFeed | None = None
    image_counts: Callable[[], ImageCounts] | None = None
    peers: Peers | None = None
    recorder: Recorder | None = None


@dataclass(eq=False, slots=True, kw_only=True)
class ServedRequest(Request):
    """A request that a front sent.

    Attributes:
        front, handle: where its tokens go.
        shown_id, key: who asked: its X-Request-Id, and the position of its API key or -1.
        has_begun: the front knows that it has begun.
        is_open: the front waits for more.
    """

    front: int
    handle: int
    shown_id: str = ""
    key: int = -1
    has_begun: bool = False
    is_open: bool = True


@dataclass(slots=True)
class Outgoing:
    """One front's share of a step.

    Attributes:
        handles, tokens: of the choices that have a new token.
        logprobs: beside them: position among the tokens, and what the runner gave.
        prompt_logprobs: handle, first position, and what the runner gave for each.
        finished: handle, reason, the token that ended it or None, what went wrong, how often it was preempted.
        admitted: of a prompt: handle, and why it was refused (reason, message) or empty texts.
        started: handle, time of the first step, prompt tokens that the prefix cache held.
        watching: its dashboard is looked at.
    """

    handles: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[tuple[int, Any]] = field(default_factory=list)
    prompt_logprobs: list[tuple[int, int, Any]] = field(default_factory=list)
    finished: list[tuple[int, str, int | None, str, int]] = field(default_factory=list)
    admitted: list[tuple[int, str, str]] = field(default_factory=list)
    started: list[tuple[int, float, int]] = field(default_factory=list)
    watching: bool = False

    def message(self) -> list[Any] | None:
        """The frame, or None when there is nothing to tell."""
        if not (self.handles or self.finished or self.admitted or self.started):
            return None
        return [
            ToFront.STEP, self.admitted, self.started, pack_ids(self.handles), pack_ids(self.tokens),
            self.logprobs, self.prompt_logprobs, self.finished,
        ]  # fmt: skip
