"""Steps that fail when they are launched (out of memory): their requests end, all others get the right tokens, and the
memory ledger is what a recount from block tables finds."""

import random

import pytest

from kvarena.engine.clock import VirtualClock
from kvarena.engine.core import Engine, StepFailed
from kvarena.engine.errors import NotDefined, RequestRejected
from kvarena.engine.ledger import MemoryLedger
from kvarena.engine.request import FinishReason
from kvarena.experiments.correctness.oracle import OracleRunner
from kvarena.experiments.correctness.oracle_link import SlowLink
from kvarena.experiments.fuzzing.matrix import allocator_options, build_cell, cells_of_round
from kvarena.experiments.fuzzing.random_traces import VOCAB_SIZE, make_trace
from kvarena.experiments.fuzzing.recount import Recount


class DeviceError(Exception):
    """What the flaky device raises."""


class FlakyRunner(OracleRunner):
    """Fails one launch in twenty, sometimes in the middle of the step's copies."""

    def __init__(self, seed: int, window: int | None) -> None:
        super().__init__(VOCAB_SIZE, window)
        self.rng = random.Random(seed)
        self.num_failures = 0

    def execute(self, plan, allocator):
        if self.rng.random() < 0.05:
            self.num_failures += 1
            self._copy(plan.copies[: self.rng.randint(0, len(plan.copies))], allocator.block_size)
            raise DeviceError("out of memory")
        return super().execute(plan, allocator)


def run(trace, cell) -> int:
    """Returns how often the device failed."""
    allocator, scheduler = build_cell(trace, cell)
    runner = FlakyRunner(trace.seed, cell.window)
    ledger, recount = MemoryLedger(), Recount(allocator, scheduler, allocator_options(trace, cell))
    clock = VirtualClock()
    if trace.most_delay:
        runner.link = SlowLink(clock, trace.most_delay, trace.seed)
    engine = Engine(scheduler, allocator, runner, clock, overlap=cell.overlap, ledger=ledger, on_launch=recount.observe)
    requests, failed, aborted = [], set(), set()
    for req in trace.requests():
        recount.add(req)
        try:
            engine.add(req)
            requests.append(req)
        except (RequestRejected, NotDefined):
            continue
    leaving = requests[::5]
    while engine.has_work:
        if leaving and (not engine.num_steps or runner.rng.random() < 0.3):  # the first one before its first step
            left = engine.abort(leaving.pop(0).request_id)
            aborted.update(
                req for req in requests if req is left or (left and req.search and req.search is left.search)
            )
        try:
            engine.step()
        except StepFailed as failure:
            if not isinstance(failure.__cause__, DeviceError):
                raise
            failed.update(engine.scheduler.fail(failure.plan))
        engine.clock.advance(1.0)
    expected = trace.expected(cell.window)
    for req in requests:
        want = expected[req.request_id]
        if req.search is None:  # what a beam has before the end another one may have in the end
            assert req.output_token_ids == want[: len(req.output_token_ids)]
        assert (req.finish_reason is FinishReason.ERROR) is (req in failed)
        assert req in failed or req in aborted or req.output_token_ids == want
    assert any(req in aborted and not req.num_computed_tokens for req in requests)
    recount.check(ledger.settle())
    allocator.arrive(float("inf"))
    assert all(level.free + level.cached == level.total for level in allocator.levels)
    usage = allocator.usage()
    assert usage.owned == usage.shared_saved == 0
    return runner.num_failures


@pytest.mark.parametrize("index", range(12))
def test_only_the_requests_of_a_failed_step_end(index):
    trace = make_trace(2000 + index)
    assert sum(run(trace, cell) for cell in cells_of_round(index)) > 0
