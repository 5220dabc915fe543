"""The engine process's loop: take requests in, step, send each front one frame with all its tokens.

    while running:  receive frames -> engine.add / abort (`intake.py`) -> engine.step() -> one frame per front

A step that fails ends that step's requests with an error and the loop goes on; three failed steps in a row, or a broken
invariant, end the process. A step for which the device has no memory is no such failure: the device works, and its
memory may be free again. The loop never waits for a front: sockets are non-blocking and their outboxes bounded.
"""

from __future__ import annotations

import logging
import selectors
import socket
import threading
import time

from kvarena.engine.beams import Text
from kvarena.engine.contract import CopyKind, StepPlan
from kvarena.engine.core import StepFailed, StepOutput
from kvarena.engine.errors import EngineError, OutOfMemory, RankFailed
from kvarena.engine.ledger import StepCheck
from kvarena.engine.request import FinishReason, Request
from kvarena.engine.server.engine.gauges import Gauges
from kvarena.engine.server.engine.intake import Intake
from kvarena.engine.server.engine.orders import Orders, Pause
from kvarena.engine.server.engine.served import Outgoing, ServedEngine, ServedRequest
from kvarena.engine.server.engine.tenants import Tenants
from kvarena.engine.server.shared import metrics
from kvarena.engine.server.shared.ipc import BAD_CONSTRAINT, Link, ToFront
from kvarena.engine.server.shared.page import Page

logger = logging.getLogger("kvarena.engine")

HEARTBEAT_SECONDS = 0.2
MAX_FAILED_STEPS = 3
_IDLE_WAIT = 0.5
_BELL = -1


class EngineLoop:
    """Serves fronts over sockets until the control socket closes.

    Args:
        served: the engine and its facts.
        fronts: one socket per front.
        control: the supervisor's socket; it hands over the sockets of fronts that take another one's place, and its
            end of stream stops the loop.
        page: the shared metrics page.
        number: of this engine.
        max_num_queued_requests: waiting requests beyond which new ones are refused.
        tenants: what each API key may have.
        pause: how the other engines of the server stand, as an operator ordered.
        ledger: every step's slots must add up.
    """

    def __init__(
        self,
        served: ServedEngine,
        fronts: list[socket.socket],
        control: socket.socket,
        page: Page,
        max_num_queued_requests: int,
        number: int = 0,
        tenants: Tenants | None = None,
        pause: Pause = Pause.NONE,
        ledger: bool = True,
    ) -> None:
        self._served, self._engine = served, served.engine
        self._links = [Link(sock) for sock in fronts]
        self._intake = Intake(served, len(fronts), max_num_queued_requests, tenants)
        self._control = control
        self._row = metrics.Row(page, number)
        self._orders = Orders(served.engine, self._intake, self._row, self._finish, pause)
        self._num_failed_in_a_row = 0
        check = served.engine.ledger = StepCheck(self._violated) if ledger else None
        self._gauges = Gauges(served.engine, self._row, served.image_counts, check)
        self._selector = selectors.DefaultSelector()
        control.setblocking(False)
        self._selector.register(control, selectors.EVENT_READ, None)
        for index, link in enumerate(self._links):
            self._selector.register(link.sock, selectors.EVENT_READ, index)
        if self._intake.grammars is not None:
            self._selector.register(self._intake.grammars.bell, selectors.EVENT_READ, _BELL)

    def run(self) -> None:
        """Serve. Raises EngineError when the engine cannot go on."""
        beat = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._row.set("heartbeat", time.monotonic())
        self._row.set("vllm:engine_sleep_state", 1, "awake")
        self._row.set("kvarena:engine_up", 1)
        self._row.set("state", metrics.READY)
        beat.start()
        feed, recorder = self._served.feed, self._served.recorder
        self._row.set("kvarena:recording_up", recorder is not None and recorder.is_on)
        try:
            while self._receive():
                if self._served.peers is not None:
                    self._served.peers.check()
                if self._has_steps:
                    self._step()
                self._orders.settle()
                if feed is not None:
                    feed.flush()
                if recorder is not None:
                    recorder.turn()
                    self._row.set("kvarena:recording_up", recorder.is_on)
                self._send()
                self._gauges.update(self._links, self._intake.outs, self._intake.requests.values(), self._has_steps)
        except BaseException:
            self._row.set("kvarena:engine_up", 0)
            self._row.set("state", metrics.FAILED)
            raise
        finally:
            if feed is not None:
                feed.close()

    def _beat(self) -> None:
        while True:
            self._row.set("heartbeat", time.monotonic())
            time.sleep(HEARTBEAT_SECONDS)

    def close(self) -> None:
        """Nobody steps the engine any more: its other ranks end, and its recording."""
        if self._served.recorder is not None:
            self._served.recorder.close()
        if self._served.peers is not None:
            self._served.peers.close()

    # Requests in.

    def _receive(self) -> bool:
        """Take in what the fronts sent; waits only while the engine is idle. False: time to stop."""
        for key, _ in self._selector.select(self._wait_seconds()):
            if key.data is None:
                if not self._control_open():
                    return False
                continue
            if key.data == _BELL:
                self._intake.unpark()
                continue
            link = self._links[key.data]
            self._intake.receive(key.data, link.receive())
            if link.closed:
                self._drop_front(key.data)
        had_work = self._has_steps
        self._intake.run_round()
        if self._has_steps and not had_work:
            self._row.set("progress", time.monotonic())
            self._row.set("has_work", 1)
        return True

    @property
    def _has_steps(self) -> bool:
        """Whether there is something to step: a step that is in flight is taken in however the engine is paused."""
        return self._engine.in_flight if self._orders.is_frozen else self._engine.has_work

    def _wait_seconds(self) -> float:
        engine = self._engine
        if self._intake.has_backlog:
            return 0.0
        if any(link.num_queued_bytes for link in self._links):
            return 0.001 if not self._has_steps else 0.0
        if not self._has_steps:
            return _IDLE_WAIT
        if engine.in_flight or engine.scheduler.num_running:
            return 0.0
        now = engine.clock.now()
        wake = engine.wake_time(now)
        return min(max(wake - now, 0.0), _IDLE_WAIT) if wake is not None else 0.0

    def _control_open(self) -> bool:
        try:
            index, files, _, _ = socket.recv_fds(self._control, 1, 1)
        except BlockingIOError:
            return True
        except OSError:
            return False
        if files:
            self._take_front(index[0], socket.socket(fileno=files[0]))
        return bool(index)

    def _take_front(self, front: int, sock: socket.socket) -> None:
        """A new front process in an old one's place."""
        self._drop_front(front)
        self._links[front], self._intake.outs[front] = Link(sock), Outgoing()
        self._selector.register(sock, selectors.EVENT_READ, front)
        self._links[front].send([ToFront.READY, self._served.info])

    def _drop_front(self, front: int) -> None:
        """A front is gone: end its requests."""
        link = self._links[front]
        if link.sock.fileno() < 0:
            return  # it has been dropped
        self._selector.unregister(link.sock)
        link.close()
        # Without requests nobody lost anything: a server that stops says no warning.
        num_open = self._intake.drop_front(front)
        self._orders.drop_front(front)
        logger.log(
            logging.WARNING if num_open else logging.INFO, "front %d is gone with %d open requests", front, num_open
        )

    # Steps.

    def _step(self) -> None:
        try:
            output = self._engine.settle() if self._orders.is_frozen else self._engine.step()
        except StepFailed as failure:
            self._fail(failure)
            return
        if output is None:
            return
        self._num_failed_in_a_row = 0
        self._row.set("progress", time.monotonic())
        if self._served.recorder is not None:
            self._served.recorder.on_step(output)
        self._dispatch(output)

    def _violated(self, said: str) -> None:
        """The KV ledger is wrong: counted, and told of once. Whoever is served loses nothing by it."""
        if not self._row.get("kvarena:ledger_violations"):
            logger.error("%s (kvarena:ledger_violations_total counts further ones)", said)
        self._row.inc("kvarena:ledger_violations")

    def _fail(self, failure: StepFailed) -> None:
        """End the requests of a failed step."""
        reason = self._served.words(str(failure))
        # Of a device without memory, and of a rank that is gone, the line says all; a trace would bury it.
        is_told = isinstance(failure.__cause__, (OutOfMemory, RankFailed))
        logger.error("a step failed: %s", reason, exc_info=None if is_told else failure.__cause__)
        self._row.inc("kvarena:failed_steps")
        self._num_failed_in_a_row += not is_told
        for req in self._engine.scheduler.fail(failure.plan):
            self._engine.runner.release([req.request_id])
            req.error = req.error or "the engine step of this request failed"
            self._intake.left(req)
            self._finish(req)
        if isinstance(failure.__cause__, RankFailed):
            raise EngineError(reason) from failure
        if self._num_failed_in_a_row >= MAX_FAILED_STEPS:
            raise EngineError(f"{MAX_FAILED_STEPS} engine steps in a row failed; the last: {reason}") from failure

    def _dispatch(self, output: StepOutput) -> None:
        outs, plan = self._intake.outs, output.plan
        logprobs, prompt_logprobs = output.result.logprobs, output.result.prompt_logprobs
        num_sampled = num_first = 0
        for i, ((req, start, _), token) in enumerate(zip(plan.scheduled, output.result.token_ids, strict=True)):
            if not isinstance(req, ServedRequest) or not req.is_open:
                continue
            if not req.has_begun:
                req.has_begun = True
                scheduled = time.monotonic() - (self._engine.clock.now() - output.start_time)
                outs[req.front].started.append((req.handle, scheduled, req.num_cached_tokens))
                self._count_prompt(req)
            if prompt_logprobs is not None and (entries := prompt_logprobs[i]) is not None:
                outs[req.front].prompt_logprobs.append((req.handle, start + 1, entries))
            if token is None or req.search is not None:  # which beams win is known when all have ended
                continue
            num_sampled += 1
            num_first += start < req.num_prompt_tokens
            out = outs[req.front]
            if logprobs is not None and (entry := logprobs[i]) is not None:
                out.logprobs.append((len(out.handles), entry))
            out.handles.append(req.handle)
            out.tokens.append(token)
        for req in output.plan.rejected:
            self._finish(req)
        for req in output.finished:
            self._finish(req)
        row = self._row
        row.inc("kvarena:steps")
        row.inc("vllm:generation_tokens", by=num_sampled)
        row.inc("vllm:num_preemptions", by=len(plan.preempted))
        if plan.copies:
            self._count_copies(plan)
        # As vLLM counts: tokens of prompts that were computed, and tokens that came of it. A decode computes one and
        # gives one; a prompt's end gives one more.
        row.observe("vllm:iteration_tokens_total", plan.num_new_tokens + num_first)

    def _finish(self, req: Request) -> None:
        if not isinstance(req, ServedRequest) or not req.is_open:
            return
        self._intake.forget(req)
        reason = (req.finish_reason or FinishReason.ERROR).value
        if req.constraint is not None and req.constraint.failure:
            reason, req.error = BAD_CONSTRAINT, req.constraint.failure
        if req.search is not None and req.search.is_over:
            self._send_text(req, req.search.winners[req.beam])
        last = req.output_token_ids[-1] if req.output_token_ids else None
        stop_token = last if reason == FinishReason.STOP.value else None
        error = self._served.words(req.error)
        self._intake.outs[req.front].finished.append((req.handle, reason, stop_token, error, req.num_preemptions))

    def _send_text(self, req: ServedRequest, text: Text) -> None:
        """A beam's text has won: all of its tokens at once."""
        out = self._intake.outs[req.front]
        out.logprobs += enumerate(text.entries, start=len(out.handles))
        out.handles += [req.handle] * len(text.tokens)
        out.tokens += text.tokens
        self._row.inc("vllm:generation_tokens", by=len(text.tokens))

    def _count_prompt(self, req: Request) -> None:
        """Count a prompt once, in its first step: a request that a stop string or its client ends counts too."""
        row = self._row
        row.inc("vllm:prompt_tokens", by=req.num_prompt_tokens)
        row.inc("vllm:prefix_cache_queries", by=req.num_prompt_tokens)
        num_loaded = req.num_loaded_tokens
        num_hits = req.num_cached_tokens - num_loaded
        row.inc("vllm:prefix_cache_hits", by=num_hits)
        if self._engine.allocator.levels:
            row.inc("vllm:external_prefix_cache_queries", by=req.num_prompt_tokens - num_hits)
            row.inc("vllm:external_prefix_cache_hits", by=num_loaded)
        row.inc("vllm:prompt_tokens_cached", by=req.num_cached_tokens)
        row.inc("vllm:prompt_tokens_by_source", "local_cache_hit", by=num_hits)
        row.inc("vllm:prompt_tokens_by_source", "external_kv_transfer", by=num_loaded)
        row.inc("vllm:prompt_tokens_by_source", "local_compute", by=req.num_prompt_tokens - req.num_cached_tokens)

    def _count_copies(self, plan: StepPlan) -> None:
        """Count what went to host memory and came from it, in bytes of this rank."""
        allocator = self._engine.allocator
        block_bytes = allocator.block_size * allocator.kv_bytes_per_token
        for kind, direction in ((CopyKind.SWAP_OUT, "GPU_to_CPU"), (CopyKind.SWAP_IN, "CPU_to_GPU")):
            num_blocks = sum(copy.kind is kind for copy in plan.copies)
            self._row.inc("vllm:kv_offload_total_bytes", direction, by=num_blocks * block_bytes)

    # Out.

    def _send(self) -> None:
        outs = self._intake.outs
        for index, out in enumerate(outs):
            link = self._links[index]
            message = out.message()
            if message is not None:
                link.send(message)
                outs[index] = Outgoing(watching=out.watching)
            elif link.num_queued_bytes:
                link.flush()
        for front, token, result in self._orders.replies:
            self._links[front].send([ToFront.ORDER, token, result])
        self._orders.replies.clear()
        self._row.set("has_work", float(self._has_steps))

    def announce(self) -> None:
        """Tell the fronts what they serve: the first frame that they get."""
        for link in self._links:
            link.send([ToFront.READY, self._served.info])
