"""A front's way to all engines of its server: who gets a prompt, and what becomes of it when that engine is lost.

    Service -> Engines -> EngineClient -socket-> engine 0
                 |     -> EngineClient -socket-> engine 1
                 '-- router: which one

A prompt of which no token has come goes to another engine when its own is lost; a stream that has begun ends with an
error event. The lost engine is started again by the supervisor, which hands each front a socket to it.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from kvarena.engine.request import Request
from kvarena.engine.routing import Router
from kvarena.engine.server.engine.grammar_checks import CheckedGrammar
from kvarena.engine.server.front.client import EngineClient, Sent
from kvarena.engine.server.front.groups import Choice, EngineGone
from kvarena.engine.server.shared.config import ServerConfig
from kvarena.engine.server.shared.ipc import AddFrame, EngineInfo, unpack_image
from kvarena.engine.server.shared.metrics import LOADING, PAUSED, Rows, health, total

logger = logging.getLogger("kvarena.front")

_OWNED = ("token_states", "reservation", "internal")
_START_SECONDS = 0.05


class EngineState:
    """What the router may know of an engine: what all fronts have sent it, and its pool as it was at most 0.25 s ago.

    One that takes no requests has more to do than any other.
    """

    def __init__(self, engines: Engines, number: int, rows: Rows) -> None:
        self._engines, self._number = engines, number
        self._row, *self._fronts = rows.of_engine(number)

    def _of_fronts(self, name: str) -> int:
        if self._engines.fault(self._number, strict=True):
            return sys.maxsize
        return int(total(self._fronts, name))

    @property
    def num_slots(self) -> int:
        """Slots of its pool."""
        info = self._engines.infos[self._number]
        return info.num_blocks * info.block_size

    @property
    def num_sent(self) -> int:
        """Prompts that it was ever sent."""
        return int(total(self._fronts, "num_sent"))

    @property
    def num_open(self) -> int:
        """Sequences that it was sent and that have not ended."""
        return self._of_fronts("num_open")

    @property
    def num_owned_slots(self) -> int:
        """Slots that its requests own."""
        if self._engines.fault(self._number, strict=True):
            return sys.maxsize
        return int(sum(self._row.get("kvarena:kv_slots", name) for name in _OWNED))

    @property
    def num_queued_tokens(self) -> int:
        """Prompt tokens that it was sent and that no step has begun."""
        return self._of_fronts("queued_tokens")

    @property
    def num_tokens_to_compute(self) -> int:
        """Prompt tokens of those whose first token has not come."""
        return self._of_fronts("tokens_to_compute")

    def cached_tokens(self, req: Request) -> int:
        """A front does not know what an engine has cached; routers that ask are refused at the start."""
        raise NotImplementedError


class Engines:
    """All engines, for one front.

    Args:
        config: the server's settings.
        front: number of this front.
        rows: the shared metrics.
        router: picks an engine for each prompt.
        on_pool_map: called with an engine's number and each of its dashboard frames.

    Attributes:
        infos: what each engine can do; of one that was never ready, what another one can.
        eos_token_ids: the model's end-of-sequence tokens.
    """

    def __init__(
        self,
        config: ServerConfig,
        front: int,
        rows: Rows,
        router: Router | None,
        on_pool_map: Callable[[int, dict[str, Any]], None],
    ) -> None:
        self._config, self._rows, self._own, self._router = config, rows, rows.fronts[front], router
        self._on_pool_map = on_pool_map
        self._clients: list[EngineClient | None] = [None] * len(rows.engines)
        self._states = [EngineState(self, number, rows) for number in range(len(rows.engines))]
        self._watched: set[int] = set()
        self._told: dict[str, tuple[CheckedGrammar, set[int]]] = {}
        self.infos: list[EngineInfo] = []
        self.eos_token_ids: frozenset[int] = frozenset()

    async def connect(self, number: int, sock: socket.socket) -> None:
        """Attach to an engine, in place of the one that had this number."""
        old = self._clients[number]
        if old is not None:
            old.fail_all("another engine takes its place")
        make = functools.partial(
            EngineClient, number, self._own[number], self._config.max_stream_lag,
            functools.partial(self._on_pool_map, number), functools.partial(self._on_lost, number),
        )  # fmt: skip
        _, client = await asyncio.get_running_loop().create_unix_connection(make, sock=sock)
        self._clients[number] = client
        client.ready.add_done_callback(functools.partial(self._on_ready, number, client))

    def _on_ready(self, number: int, client: EngineClient, ready: asyncio.Future[None]) -> None:
        if ready.cancelled() or ready.exception() is not None or client.info is None:
            return
        if not self.infos:
            self.infos = [client.info] * len(self._clients)
            self.eos_token_ids = frozenset(client.info.eos_token_ids)
        self.infos[number] = client.info
        if number in self._watched:
            client.watch(True)

    async def ready(self) -> None:
        """Wait for all engines; not for one that is started again beside others. Raises EngineGone without any."""
        while not self.infos or any(self._is_starting(number) for number in range(len(self._clients))):
            if reason := self.gone:
                raise EngineGone(reason)
            await asyncio.sleep(_START_SECONDS)

    def _is_starting(self, number: int) -> bool:
        client, row = self._clients[number], self._rows.engines[number]
        is_first = not row.get("kvarena:engine_restarts")
        return client is not None and not client.gone and client.info is None and is_first

    @property
    def info(self) -> EngineInfo:
        """What every engine can do."""
        return replace(
            self.infos[0],
            max_model_len=min(info.max_model_len for info in self.infos),
            max_request_tokens=min(info.max_request_tokens for info in self.infos),
        )

    # How they are.

    def fault(self, number: int, strict: bool = False) -> str:
        """Why an engine takes no requests, or an empty string; `strict`: also, why it answers none for the moment."""
        client, row = self._clients[number], self._rows.engines[number]
        if client is None or client.gone:
            return client.gone if client is not None else "the engine is not there yet"
        if client.info is None or row.get("state") == LOADING:
            return "the engine is loading"
        state = health(row, self._config.heartbeat_timeout, self._config.stall_timeout)
        return state.reason if strict or not state.alive else ""

    def fault_of_all(self, strict: bool = False) -> str:
        """Why no engine takes requests, or an empty string; see `fault`."""
        faults = [self.fault(number, strict) for number in range(len(self._clients))]
        return faults[0] if all(faults) else ""

    @property
    def gone(self) -> str:
        """Why there is no engine at all any more, or an empty string."""
        reasons = [client.gone for client in self._clients if client is not None]
        return reasons[0] if reasons and all(reasons) else ""

    @property
    def num_open(self) -> int:
        """Choices that have not ended."""
        return sum(client.num_open for client in self._clients if client is not None)

    def lose(self, number: int, reason: str) -> None:
        """An engine is silent: what it has is given to others, or ends."""
        client = self._clients[number]
        if client is not None:
            client.fail_all(reason)

    def fail_all(self, reason: str) -> None:
        """The server leaves: end every open stream with an error, refuse new ones."""
        for client in self._clients:
            if client is not None:
                client.fail_all(reason, may_retry=False)

    # Requests.

    def constrain(self, grammar: CheckedGrammar) -> None:
        """Announce a grammar that the next prompts, which name its key, are to follow."""
        self._told = {grammar.key: (grammar, set())}

    def submit(self, frame: AddFrame, choices: list[Choice]) -> asyncio.Future[None]:
        """Hand a prompt to an engine; see `EngineClient.submit`. Raises EngineGone: there is none."""
        grammar = self._told[frame.constraint][0] if frame.constraint is not None else None
        return self._submit(Sent(frame, choices, grammar, asyncio.get_running_loop().create_future()))

    def _submit(self, sent: Sent) -> asyncio.Future[None]:
        number = self._pick(sent)
        client = self._clients[number]
        assert client is not None
        if sent.grammar is not None:
            grammar, told = self._told.get(sent.grammar.key, (None, set()))
            if grammar is not sent.grammar or number not in told:
                client.constrain(sent.grammar)
                told.add(number)
        return client.submit(sent.frame, sent.waiting, sent.grammar, sent.admission)

    def _pick(self, sent: Sent) -> int:
        """The engine that gets a prompt: the router's choice, or where that takes none, the one with the least to do.

        Raises EngineGone.
        """
        if reason := self.fault_of_all():
            raise EngineGone(reason)
        number = 0
        if self._router is not None:
            number = self._router.route(_as_request(sent), self._states)
        if self.fault(number):
            number = min(range(len(self._states)), key=lambda one: self._states[one].num_open)
        return number

    def _on_lost(self, number: int, reason: str, unheard: list[Sent]) -> None:
        """Give an engine's prompts of which no token has come to others; without any they end with an error."""
        if unheard and not self.fault_of_all():
            logger.warning("engine %d is lost (%s): %d prompts are tried elsewhere", number, reason, len(unheard))
        for sent in unheard:
            group = sent.waiting[0].group
            again = sent.admission
            if again.done():  # it was queued; what another one says to it only matters if that is no
                again = asyncio.get_running_loop().create_future()
                again.add_done_callback(functools.partial(_fail_if_refused, sent))
            try:
                self._submit(sent._replace(admission=again))
            except EngineGone as error:
                if not sent.admission.done():
                    sent.admission.set_exception(error)
                group.fail(error)
                self._own[number].inc("vllm:request_success", "error", by=len(sent.waiting))
            else:
                self._own[number].inc("kvarena:rerouted_requests")

    def abort(self, choices: list[Choice], reason: str) -> None:
        """End choices early and free their slots; `reason` is what the metrics count."""
        for number, client in enumerate(self._clients):
            own = [choice for choice in choices if choice.engine == number]
            if own and client is not None:
                client.abort(own, reason)

    async def order(self, kind: str, **given: Any) -> list[dict[str, Any]]:
        """Order all engines to do something; what came of it in each. One that loads does it when it is ready.

        Raises EngineGone: no engine did it.
        """
        clients = [client for client in self._clients if client is not None]
        asked = [(client, client.order(kind, given)) for client in clients]
        waited = [done for client, done in asked if client.info is not None]
        results = await asyncio.gather(*waited, return_exceptions=True)
        made = [one for one in results if isinstance(one, dict)]
        if not made:
            raise EngineGone(self.gone or "no engine is ready")
        return made

    @property
    def pauses(self) -> list[int]:
        """How the engines that are up are paused: 0 not at all, 1 requests wait, 2 they are refused."""
        return [int(row.get(PAUSED)) for row in self._rows.engines if row.get("kvarena:engine_up")]

    def count_answer(self, num_tokens: int) -> None:
        """Count an answer whose longest choice has `num_tokens`."""
        self._own[0].observe("vllm:request_max_num_generation_tokens", num_tokens)

    def watch(self, number: int, on: bool) -> None:
        """Ask for an engine's dashboard frames, or stop them."""
        (self._watched.add if on else self._watched.discard)(number)
        client = self._clients[number]
        if client is not None and client.info is not None:
            client.watch(on)

    @property
    def numbers(self) -> Sequence[int]:
        """All engines'."""
        return range(len(self._clients))


def _as_request(sent: Sent) -> Request:
    """A prompt as a router looks at it: by its tokens, salt and images' identities."""
    frame, images = sent.frame, tuple(map(unpack_image, sent.frame.images))
    return Request(frame.request_id, sent.waiting[0].prompt, frame.sampling, cache_salt=frame.cache_salt, images=images)


def _fail_if_refused(sent: Sent, again: asyncio.Future[None]) -> None:
    error = None if again.cancelled() else again.exception()
    if error is not None:
        sent.waiting[0].group.fail(EngineGone(f"its engine was lost, and another one refused it: {error}"))
