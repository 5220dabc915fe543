"""Virtual Token Counter: fairness between clients (Sheng et al., OSDI'24)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kvarena.engine.contract import KVAllocator, StepPlan, check_number
from kvarena.engine.request import Request
from kvarena.schedulers.chunked import ChunkedScheduler
from kvarena.schedulers.queue import RequestQueue

FORGET_ABOVE = 1024  # counters: a server's clients have no end


class FairScheduler(ChunkedScheduler):
    """Serves the waiting client that has received least; decodes and chunks as chunked prefill does.

    A client's counter grows by `input_weight` per prompt token when a request is first admitted, and by
    `output_weight` per sampled token. The client with the smallest counter among those that wait is admitted next,
    first come first served within it. A client that comes back after an absence is lifted to the least counter of
    those that wait, less `credit`: it cannot claim what it did not use. Without a credit (the paper) a client that
    offers just its share, and not evenly, gets less: each moment in which nothing of it waits is lost.

    Between two backlogged clients the service differs by at most 2 * max(input_weight * longest prompt, output_weight *
    most tokens in a batch) (the paper's theorem 4.4), and `credit` more. A preempted request pays nothing again.

    Args:
        allocator: who owns which slots.
        input_weight: cost of a prompt token, above 0.
        output_weight: cost of an output token, above 0; the paper's example is 1 and 2.
        credit: service, in these costs, that a client keeps a claim to while nothing of it waits; at least 0. One that
            is seen for the first time has none.
        options: see `Scheduler`.

    Attributes:
        counters: service received, by client.

    Raises:
        ConfigError: an option out of range.
    """

    def __init__(
        self,
        allocator: KVAllocator,
        *,
        input_weight: float = 1.0,
        output_weight: float = 2.0,
        credit: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(allocator, **options)
        self.input_weight = check_number("scheduler.input_weight", input_weight, above=True)
        self.output_weight = check_number("scheduler.output_weight", output_weight, above=True)
        self.credit = check_number("scheduler.credit", credit)
        self.counters: dict[str, float] = {}
        self._num_kept = 0  # counters that the last `_forget` left
        self._queues: dict[str, RequestQueue] = {}  # of the clients that wait
        self._last_to_leave: str | None = None  # the client whose request left the queue last

    def add(self, req: Request) -> None:
        """Queue a request and lift its client's counter if the client was not waiting. Raises as `Scheduler.add`."""
        floor = 0.0 if req.client_id in self._queues else self._floor()
        super().add(req)
        self.counters[req.client_id] = max(self.counters.get(req.client_id, floor), floor - self.credit)
        if len(self.counters) > FORGET_ABOVE + 2 * self._num_kept:
            self._forget()

    def _forget(self) -> None:
        """Drop absent clients whose counter no floor will be below again: they would be lifted anyway."""
        present = {req.client_id for req in self.requests.values()}
        least = min(self.counters[client] for client in present)
        self.counters = {
            client: counter
            for client, counter in self.counters.items()
            if counter > least - self.credit or client in present or client == self._last_to_leave
        }
        self._num_kept = len(self.counters)

    def head(self) -> Request | None:
        """The first request of the waiting client with the smallest counter."""
        heads = [queue.peek() for queue in self._queues.values()]
        return self.first_to_join(
            min(
                (req for req in heads if req is not None),
                key=lambda req: (self.counters[req.client_id], self.arrival[req]),
                default=None,
            )
        )

    @property
    def waiting_by_client(self) -> Mapping[str, int]:
        return {client: len(queue) for client, queue in self._queues.items()}

    def enqueue(self, req: Request) -> None:
        """Put `req` in its client's queue."""
        if self.joins(req):
            return
        self._queues.setdefault(req.client_id, RequestQueue()).push(req, self.arrival[req])

    def dequeue(self, req: Request) -> None:
        """Take `req` out of its client's queue."""
        if self.joins_no_more(req):
            return
        queue = self._queues[req.client_id]
        queue.remove(req)
        if not queue:
            del self._queues[req.client_id]
        self._last_to_leave = req.client_id

    def admit(self, req: Request, plan: StepPlan) -> bool:
        """Admit, and charge the prompt the first time."""
        admitted = super().admit(req, plan)
        if admitted and req.num_preemptions == 0:
            self.counters[req.client_id] += self.input_weight * req.num_prompt_tokens
        return admitted

    def update(self, plan: StepPlan, sampled: Sequence[int | None]) -> list[Request]:
        """Charge the sampled tokens, then take them in."""
        counters, weight = self.counters, self.output_weight
        for (req, _, _), samples, token in zip(plan.scheduled, plan.samples, sampled, strict=True):
            client = req.client_id
            if token is None and not (samples and req.search is not None):  # of a beam its search has it
                continue
            if client in counters:  # else aborted in flight, and forgotten
                counters[client] += weight
        return super().update(plan, sampled)

    def _floor(self) -> float:
        """The least counter with which a client that was away (re)joins the queue."""
        if self._queues:
            return min(self.counters[other] for other in self._queues)
        return self.counters[self._last_to_leave] if self._last_to_leave is not None else 0.0
