"""How the engine's loop takes requests in: a bounded amount of work between two steps, fair to the fronts.

sockets -> inbox per front -> engine.add
                '-> parked, while the request's grammar is compiled on a thread
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvarena.engine.errors import EngineError, KvarenaError, RequestRejected
from kvarena.engine.request import Request, expand
from kvarena.engine.server.engine.served import Outgoing, ServedEngine, ServedRequest
from kvarena.engine.server.engine.tenants import Tenants
from kvarena.engine.server.engine.token_lists import TokenLists
from kvarena.engine.server.shared.ipc import KEY_LIMIT, PAUSED, AddFrame, ToEngine, unpack_ids, unpack_image

if TYPE_CHECKING:
    from kvarena.engine.server.engine.compiled import CompiledGrammars

# Processor time for what arrived, between two steps; a message that was begun is finished.
ROUND_SECONDS = 0.02
# Tiles of requests that have not ended: a preempted request may need them once more.
MAX_IMAGE_BYTES = 4 << 30


class Intake:
    """The requests that fronts sent, until they have ended.

    Args:
        served: the engine and its facts.
        num_fronts: how many fronts there are.
        max_num_queued_requests: waiting requests beyond which new ones are refused.
        tenants: what each API key may have; None: all that it asks for.

    Attributes:
        requests: those that have not ended, by front and handle.
        outs: each front's share of what is told next; the loop replaces them.
        grammars: what constraints are compiled in, or None when the runner cannot apply any.
        refuses: no request is taken in for now.
        on_order: called with each order of an operator's: the front, and what its frame holds.
    """

    def __init__(
        self, served: ServedEngine, num_fronts: int, max_num_queued_requests: int, tenants: Tenants | None = None
    ) -> None:
        self._tenants = tenants or Tenants()
        self._served, self._engine = served, served.engine
        self._max_queued, self._eos_token_ids = max_num_queued_requests, frozenset(served.info.eos_token_ids)
        self._inboxes: list[deque[list[Any]]] = [deque() for _ in range(num_fronts)]
        self._parked: dict[str, list[tuple[int, AddFrame]]] = {}  # by the key of their grammar
        self._ready: deque[tuple[int, AddFrame]] = deque()  # were parked, and need not wait any more
        self.num_parked = 0  # choices in both
        self.refuses = False
        self.on_order: Callable[[int, int, str, dict[str, Any]], None] | None = None
        self._image_bytes = 0  # of the requests that have not ended; samples of one prompt count each
        self.requests: dict[tuple[int, int], ServedRequest] = {}
        self.outs = [Outgoing() for _ in range(num_fronts)]
        self.grammars: CompiledGrammars | None = None
        if served.compile_grammar is not None:
            # llguidance: the supervisor imports this module, and is to start without it.
            from kvarena.engine.server.engine.compiled import CompiledGrammars

            self.grammars = CompiledGrammars(served.compile_grammar)

    @property
    def has_backlog(self) -> bool:
        """Whether messages wait for the next round."""
        return bool(self._ready) or any(self._inboxes)

    def receive(self, front: int, messages: list[list[Any]]) -> None:
        """Queue what a front sent."""
        self._inboxes[front].extend(messages)

    def run_round(self, seconds: float = ROUND_SECONDS) -> None:
        """Handle queued messages, one of each front in turn, for so many seconds of processor time at most."""
        end = time.thread_time() + seconds
        while self.has_backlog:
            if self._ready:
                owner, frame = self._ready.popleft()
                self.num_parked -= frame.sampling.num_sequences
                self._add(owner, frame)
            for front, inbox in enumerate(self._inboxes):
                if inbox:
                    self._handle(front, inbox.popleft())
            if time.thread_time() >= end:
                return

    def _handle(self, front: int, message: list[Any]) -> None:
        kind = message[0]
        if kind == ToEngine.ADD:
            self._add(front, AddFrame(*message[1:]))
        elif kind == ToEngine.ABORT:
            for handle in message[1]:
                self._abort(front, handle, stopped=message[2])
        elif kind == ToEngine.WATCH:
            self.outs[front].watching = bool(message[1])
        elif kind == ToEngine.CONSTRAINT and self.grammars is not None:
            self.grammars.want(*message[1:])
        elif kind == ToEngine.ORDER and self.on_order is not None:
            self.on_order(front, *message[1:])

    # Constraints.

    def unpark(self) -> None:
        """Requests whose grammars are compiled now are for the next round."""
        assert self.grammars is not None
        for key, error in self.grammars.take_done():
            entries = self._parked.pop(key, [])
            if not error:
                self._ready.extend(entries)
                continue
            for front, frame in entries:
                self.num_parked -= frame.sampling.num_sequences
                self.outs[front].admitted.append((frame.handle, "invalid", error))

    def _is_parked(self, front: int, frame: AddFrame) -> bool:
        """Put a request off until its grammar is compiled; False when there is nothing to wait for."""
        key = frame.constraint
        if key is None or self.grammars is None or not self.grammars.is_under_way(key):
            return False
        self._parked.setdefault(key, []).append((front, frame))
        self.num_parked += frame.sampling.num_sequences
        return True

    def parked(self) -> list[tuple[int, AddFrame]]:
        """The requests that were put off, each with its front."""
        return [entry for entries in [*self._parked.values(), self._ready] for entry in entries]

    def refuse_parked(self, front: int, frame: AddFrame, reason: str, text: str) -> None:
        """Refuse a request that was put off, after all."""
        self._drop_parked(front, frame.handle)
        self.outs[front].admitted.append((frame.handle, reason, text))

    def _drop_parked(self, front: int, handle: int) -> None:
        """A client left while its request was put off."""

        def is_meant(entry: tuple[int, AddFrame]) -> bool:
            owner, frame = entry
            return owner == front and frame.handle <= handle < frame.handle + frame.sampling.n

        for key, entries in [*self._parked.items(), (None, self._ready)]:
            found = next(filter(is_meant, entries), None)
            if found is None:
                continue
            entries.remove(found)
            self.num_parked -= found[1].sampling.num_sequences
            if key is not None and not entries:
                del self._parked[key]
                assert self.grammars is not None
                self.grammars.drop(key)
            return

    # Requests.

    def _add(self, front: int, frame: AddFrame) -> None:
        engine, out = self._engine, self.outs[front]
        num_new = frame.sampling.num_sequences
        if self.refuses:
            out.admitted.append((frame.handle, PAUSED, "the engine is paused"))
            return
        num_waiting = engine.scheduler.num_waiting + self.num_parked
        is_full = num_waiting + num_new > self._max_queued + self._free_seats()
        if is_full and not self._has_share(frame.client_id, num_new):
            out.admitted.append((frame.handle, "queue_full", f"{num_waiting} requests are waiting"))
            return
        num_tokens = num_new * (len(frame.prompt) // 4 + frame.sampling.max_tokens)  # of int32
        if said := self._tenants.refusal(frame.key, num_new, num_tokens):
            out.admitted.append((frame.handle, KEY_LIMIT, said))
            return
        num_bytes = sum(len(image[-1]) for image in frame.images)
        if num_bytes and self._image_bytes + num_bytes > MAX_IMAGE_BYTES:
            text = f"images of {self._image_bytes >> 20} MiB are waiting or running"
            out.admitted.append((frame.handle, "images_full", text))
            return
        if self._is_parked(front, frame):
            return
        try:
            for req in self._requests(front, frame):
                self._begin(req)
                if not req.is_open:  # a beam whose text nobody asked for
                    continue
                self.requests[front, req.handle] = req
                self._image_bytes += _image_bytes(req)
                self._tenants.begin(req)
        except RequestRejected as error:
            self._undo_add(front, frame)
            out.admitted.append((frame.handle, error.reason, self._served.words(str(error))))
        except KvarenaError as error:
            self._undo_add(front, frame)
            out.admitted.append((frame.handle, "invalid", self._served.words(str(error))))
        else:
            out.admitted.append((frame.handle, "", ""))

    def _has_share(self, client: str, num_new: int) -> bool:
        """Whether a client gets into a full queue: where clients share the engine, one that fills the queue keeps
        nobody out who has less than an even share of it. So at most twice as many wait as may.
        """
        waiting = self._engine.scheduler.waiting_by_client
        if waiting is None:
            return False
        return waiting.get(client, 0) + num_new <= self._max_queued // len(waiting.keys() | {client})

    def _begin(self, req: ServedRequest) -> None:
        """Hand a request to the engine. Raises what that raises."""
        engine, recorder = self._engine, self._served.recorder
        if recorder is None:
            engine.add(req)
            return
        now = engine.clock.now()
        recorder.on_submit(req, now)
        try:
            engine.add(req)
        except KvarenaError as error:
            recorder.on_refused(req, now, str(error))
            raise

    def _free_seats(self) -> int:
        """Waiting requests that the next step can take: an idle engine's queue is not a queue."""
        return 1 if self._engine.scheduler.num_running == 0 else 0

    def _undo_add(self, front: int, frame: AddFrame) -> None:
        """Take back the choices of a request of which a later one was refused."""
        for i in range(frame.sampling.n):
            self._abort(front, frame.handle + i)

    def _requests(self, front: int, frame: AddFrame) -> list[ServedRequest]:
        now = self._engine.clock.now()
        req = ServedRequest(
            request_id=frame.request_id,
            prompt_token_ids=unpack_ids(frame.prompt),
            sampling=frame.sampling,
            arrival_time=now - max(0.0, time.monotonic() - frame.arrival),
            priority=frame.priority,
            client_id=frame.client_id,
            # Log-probabilities of a prompt need all of it computed: nobody shares such a request's salt.
            cache_salt=frame.cache_salt if frame.sampling.prompt_logprobs is None else frame.request_id,
            eos_token_ids=self._eos_token_ids,
            front=front,
            handle=frame.handle,
            shown_id=frame.shown_id,
            key=frame.key,
            images=tuple(map(unpack_image, frame.images)),
        )
        requests = expand(req)
        for i, one in enumerate(requests):
            one.handle += i
            one.is_open = i < frame.sampling.n
        allowed, barred = frame.sampling.allowed_token_ids, frame.sampling.barred
        if allowed or barred:
            for one in requests:
                one.constraint = TokenLists(allowed, barred)
        if frame.constraint is not None:
            if self.grammars is None:
                raise EngineError("this engine's runner cannot constrain tokens")
            grammar = self.grammars.get(frame.constraint)
            if grammar is None:
                raise RequestRejected("the grammar had to make room for others; try again", "constraint_lost")
            for one in requests:
                one.constraint = grammar.start()
        return requests

    def _abort(self, front: int, handle: int, *, stopped: bool = False) -> None:
        """End a request early: its client left, or its text is complete (`stopped`)."""
        req = self.requests.get((front, handle))
        if req is not None:
            self.forget(req)
            self._engine.abort(req.request_id)
            self.left(req, stopped=stopped)
        elif self.num_parked:
            self._drop_parked(front, handle)

    def left(self, req: Request, *, stopped: bool = False) -> None:
        """Tell who records that a request ended outside of a step; `stopped`: for its text is complete."""
        if self._served.recorder is not None:
            self._served.recorder.on_left(req, stopped=stopped)

    def forget(self, req: ServedRequest) -> None:
        """A request has ended."""
        req.is_open = False
        if self.requests.pop((req.front, req.handle), None) is not None:
            self._image_bytes -= _image_bytes(req)
            self._tenants.end(req)

    def drop_front(self, front: int) -> int:
        """A front is gone: end its requests; how many they were."""
        self._inboxes[front].clear()
        running = [key for key in self.requests if key[0] == front]
        for owner, handle in running:
            self._abort(owner, handle)
        handles = [frame.handle for owner, frame in self.parked() if owner == front]
        for handle in handles:
            self._drop_parked(front, handle)
        return len(running) + len(handles)


def _image_bytes(req: ServedRequest) -> int:
    return sum(image.pixels.nbytes for image in req.images)
