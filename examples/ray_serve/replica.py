"""A replica: one engine in one actor, asked for one prompt at a time and answering with what each step brings."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, NamedTuple

from kvarena.engine.errors import EngineError
from kvarena.engine.server.engine.grammar_checks import CheckedGrammar
from kvarena.engine.server.engine.loop import EngineLoop
from kvarena.engine.server.front.client import EngineClient
from kvarena.engine.server.front.groups import Choice, Group, Refused
from kvarena.engine.server.shared import metrics
from kvarena.engine.server.shared.ipc import AddFrame, EngineInfo, socket_pair, unpack_ids
from kvarena.experiments.serving.flags import overrides_of, parse_flags
from kvarena.experiments.serving.serve import build_served_engine
from kvarena.experiments.settings.compose import compose_cell

OWNED = ("token_states", "reservation", "internal")


class Admitted(NamedTuple):
    """What becomes of a prompt first: `reason` is empty, or why the engine does not take it."""

    reason: str = ""
    text: str = ""


class News(NamedTuple):
    """What a step brings for a choice, by its place among the prompt's.

    `started`, once: prompt tokens that the cache held. `ended`, with the last: reason, the token that ended it, error.
    """

    index: int
    tokens: list[int]
    logprobs: list[Any]
    prompt_logprobs: dict[int, Any]
    started: int | None
    ended: tuple[str, int | None, str] | None


class EngineReplica:
    """The deployment's class.

    Args:
        flags: of `kvarena serve`, the model first.
    """

    def __init__(self, flags: Sequence[str]) -> None:
        config, choices = compose_cell(overrides_of(parse_flags(flags)))
        assert config.server is not None
        self._config = config.server
        strategy = {group: choices[group] for group in ("allocator", "scheduler")}
        served = build_served_engine(config, strategy)
        page = metrics.create_page(1)
        self._rows = metrics.Rows(page, 1)
        self._socket, theirs = socket_pair()
        self._control, control = socket_pair()
        loop = EngineLoop(served, [theirs], control, page, self._config.max_num_queued_requests)
        loop.announce()
        # A thread: who kills the actor kills its engine, and nothing is left to watch.
        self._thread = threading.Thread(target=loop.run, name="engine", daemon=True)
        self._thread.start()
        self._client: EngineClient | None = None
        self._connecting = asyncio.Lock()

    async def describe(self) -> EngineInfo:
        """What the engine can do."""
        client = await self._connected()
        assert client.info is not None
        return client.info

    async def _connected(self) -> EngineClient:
        async with self._connecting:
            if self._client is None:
                row = self._rows.fronts[0][0]

                def make() -> EngineClient:
                    return EngineClient(0, row, self._config.max_stream_lag, lambda _: None, lambda *_: None)

                _, client = await asyncio.get_running_loop().create_unix_connection(make, sock=self._socket)
                await client.ready
                self._client = client
        return self._client

    async def generate(self, frame: AddFrame, grammar: CheckedGrammar | None) -> AsyncIterator[Admitted | News]:
        """Compute a prompt's choices; leaving the loop ends them.

        Raises:
            EngineGone: the engine has failed.
        """
        client = await self._connected()
        arrival = time.monotonic()  # of this machine
        group = Group(client, arrival)  # type: ignore[arg-type] - only texts ask it for more
        prompt = unpack_ids(frame.prompt)
        scores: dict[int, Any] = {}
        choices = [
            Choice(group, index, prompt, frame.sampling, None, None, scores)  # type: ignore[arg-type]
            for index in range(frame.sampling.n)
        ]
        if grammar is not None:
            client.constrain(grammar)
        try:
            try:
                await client.submit(frame._replace(arrival=arrival), choices)
            except Refused as refused:
                yield Admitted(refused.reason, str(refused))
                return
            yield Admitted()
            started: set[int] = set()
            while any(not choice.ended for choice in choices) or group.dirty:
                for choice in await group.changed():
                    yield _news(choice, started)
        finally:
            client.abort(choices, "abort")

    # What Ray Serve asks.

    def check_health(self) -> None:
        """Raises EngineError: Serve then starts another replica."""
        if not self._thread.is_alive():
            raise EngineError("the engine's loop has ended")
        state = metrics.health(self._rows.engines[0], self._config.heartbeat_timeout, self._config.step_timeout)
        if state.reason:
            raise EngineError(state.reason)

    def record_routing_stats(self) -> dict[str, float]:
        """What the request router may know."""
        return {"kv_in_use": self._kv_in_use(), "waiting": self._rows.engines[0].get("vllm:num_requests_waiting")}

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What the autoscaler goes by."""
        return {"kv_in_use": self._kv_in_use()}

    def _kv_in_use(self) -> float:
        """Share of the pool that requests own, or wait for where they own nothing yet."""
        engine, front = self._rows.engines[0], self._rows.fronts[0][0]
        slots = sum(engine.get("kvarena:kv_slots", name) for name in metrics.CLASSES)
        owned = sum(engine.get("kvarena:kv_slots", name) for name in OWNED)
        return (owned + front.get("queued_tokens")) / slots if slots else 0.0


def _news(choice: Choice, started: set[int]) -> News:
    tokens, logprobs = choice.tokens, choice.logprobs
    choice.tokens, choice.logprobs = [], []
    scores = dict(choice.prompt_logprobs)
    choice.prompt_logprobs.clear()
    begins = choice.num_cached_tokens if tokens and choice.index not in started else None
    started.add(choice.index) if tokens else None
    ended = (choice.ended, choice.stop_token, choice.error) if choice.ended else None
    return News(choice.index, tokens, logprobs, scores, begins, ended)
