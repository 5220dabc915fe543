"""The ingress' way to the replicas: what `Engines` is to a front, over a Serve handle in place of sockets.

A prompt of which no token has come goes to another replica when its own is lost; a stream that has begun ends with an
error event, as behind one port.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from ray.exceptions import RayError
from ray.serve.handle import DeploymentHandle

from examples.ray_serve.replica import Admitted, News
from kvarena.engine.server.engine.grammar_checks import CheckedGrammar
from kvarena.engine.server.front.client import EngineClient, Sent
from kvarena.engine.server.front.engines import Engines
from kvarena.engine.server.front.groups import EngineGone
from kvarena.engine.server.shared.config import ServerConfig
from kvarena.engine.server.shared.ipc import AddFrame, EngineInfo, ToEngine, pack_ids
from kvarena.engine.server.shared.metrics import Rows

MAX_TRIES = 4


class RayClient(EngineClient):
    """An `EngineClient` whose frames become calls of a deployment, one for each prompt.

    Args:
        handle: of the replicas.
        more: as of `EngineClient`.
    """

    def __init__(self, handle: DeploymentHandle, **more: Any) -> None:
        super().__init__(**more)
        self._handle = handle.options(stream=True)
        self._grammars: dict[str, CheckedGrammar] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}  # by first handle

    def _send(self, *message: Any) -> None:
        kind = message[0]
        if kind == ToEngine.ADD:
            frame = AddFrame(*message[1:])
            images = [(*image[:-1], bytes(image[-1])) for image in frame.images]  # Ray copies no views
            task = asyncio.create_task(self._serve(frame._replace(images=images)))
            self._tasks[frame.handle] = task
            task.add_done_callback(lambda _: self._tasks.pop(frame.handle, None))
        elif kind == ToEngine.ABORT:
            for first, task in list(self._tasks.items()):
                if not any(choice.first == first for choice in self._choices.values()):
                    task.cancel()
        elif kind == ToEngine.CONSTRAINT:
            grammar = CheckedGrammar(*message[1:])
            self._grammars[grammar.key] = grammar

    async def _serve(self, frame: AddFrame) -> None:
        """One prompt, at one replica after the other until a token comes."""
        grammar = None if frame.constraint is None else self._grammars[frame.constraint]
        for tries in range(1, MAX_TRIES + 1):
            answer = self._handle.generate.remote(frame, grammar)
            try:
                async for item in answer:
                    self._take(frame.handle, item)
                return
            except asyncio.CancelledError:
                answer.cancel()
                raise
            except (RayError, EngineGone) as error:
                if frame.handle not in self._silent or tries == MAX_TRIES:
                    self._lose(frame.handle, f"its replica was lost ({type(error).__name__})")
                    return
                self._row.inc("kvarena:rerouted_requests")

    def _take(self, first: int, item: Admitted | News) -> None:
        if isinstance(item, Admitted):
            admission, _ = self._admissions.get(first, (None, []))
            if admission is not None and not admission.done():
                self._on_step([(first, item.reason, item.text)], [], b"", b"", [], [], [])
            elif item.reason:  # it was queued at a replica before, which is lost
                self._lose(first, f"its replica was lost, and another one refused it: {item.text}")
            return
        handle = first + item.index
        started = [] if item.started is None else [(handle, time.monotonic(), item.started)]
        scores = [(handle, at, [entry]) for at, entry in item.prompt_logprobs.items()]
        finished = [] if item.ended is None else [(handle, *item.ended, 0)]
        count = len(item.tokens)
        self._on_step(
            [], started, pack_ids([handle] * count), pack_ids(item.tokens), list(enumerate(item.logprobs)), scores,
            finished,
        )  # fmt: skip

    def _lose(self, first: int, reason: str) -> None:
        error = EngineGone(reason)
        admission, _ = self._admissions.get(first, (None, []))
        if admission is not None and not admission.done():
            admission.set_exception(error)
        for choice in [choice for choice in self._choices.values() if choice.first == first]:
            self._leave(choice)
            self._row.inc("vllm:request_success", "error")
            choice.group.fail(error)


class RayEngines(Engines):
    """All replicas as one engine; Serve's request router picks among them.

    Args:
        handle: of the replicas.
        info: what they can do.
        config: the server's settings.
        rows: of this ingress alone.
    """

    def __init__(self, handle: DeploymentHandle, info: EngineInfo, config: ServerConfig, rows: Rows) -> None:
        super().__init__(config, 0, rows, None, lambda *_: None)
        client = RayClient(
            handle, number=0, row=rows.fronts[0][0], max_stream_lag=config.max_stream_lag,
            on_pool_map=lambda _: None, on_lost=self._all_lost,
        )  # fmt: skip
        client.info = info
        client.ready.set_result(None)
        self._clients[0], self.infos, self.eos_token_ids = client, [info], frozenset(info.eos_token_ids)

    def _all_lost(self, reason: str, unheard: list[Sent]) -> None:
        """Only the ingress' own end ends them all, and then none may go anywhere else."""

    def fault(self, number: int, strict: bool = False) -> str:  # noqa: ARG002 - of the base
        """Serve knows which replicas are well."""
        client = self._clients[number]
        return client.gone if client is not None else ""
