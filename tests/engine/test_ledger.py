"""The ledger settles reservation and internal fragmentation from what the requests did in the end."""

import numpy as np
import pytest

from kvarena.engine.classes import CLASSES
from kvarena.engine.contract import KVUsage, ScheduledRequest, StepPlan
from kvarena.engine.errors import EngineError
from kvarena.engine.ledger import MemoryLedger, StepCheck
from kvarena.engine.request import FinishReason, Request, RequestStatus


def make_request(name: str = "r") -> Request:
    return Request(name, [1, 2, 3])


def usage(total: int, computed: int, owned: int, external: int = 0, cached: int = 0) -> KVUsage:
    return KVUsage(total, computed, owned, external, 0, cached, total - owned - external - cached)


def scheduled(req: Request, start: int, num_new_tokens: int) -> ScheduledRequest:
    """As a scheduler does it: the request's own count moves on."""
    req.num_computed_tokens = start + num_new_tokens
    return ScheduledRequest(req, start, num_new_tokens)


def end(req: Request) -> None:
    req.status, req.finish_reason, req.num_slots = RequestStatus.FINISHED, FinishReason.LENGTH, 0


def test_contiguous_reservation_is_split_when_the_request_has_ended():
    ledger, req = MemoryLedger(), make_request()
    req.num_slots = 10
    for step, (start, new) in enumerate([(0, 3), (3, 1), (4, 1)]):
        ledger.observe(StepPlan([scheduled(req, start, new)], [True]), usage(20, 3 + step, 10))
    end(req)
    ledger.observe(StepPlan(), usage(20, 0, 0))
    split = ledger.settle()
    # 5 of 10 slots were filled in the end: 5 never (internal); the rest waited to be filled (reservation).
    assert split["internal"].tolist() == [5, 5, 5, 0]
    assert split["reservation"].tolist() == [2, 1, 0, 0]
    assert split["token_states"].tolist() == [3, 4, 5, 0]
    assert sum(split[name] for name in CLASSES).tolist() == [20] * 4


def test_paged_growth_wastes_only_the_last_block():
    ledger, req = MemoryLedger(), make_request()
    computed = 0
    for new in [3, 1, 1, 1]:  # block size 4: a second block from position 4 on
        computed += new
        req.num_slots = -(-computed // 4) * 4
        ledger.observe(StepPlan([scheduled(req, computed - new, new)], [True]), usage(16, computed, req.num_slots))
    end(req)
    split = ledger.settle()
    assert split["reservation"].tolist() == [1, 0, 1, 0]
    assert split["internal"].tolist() == [0, 0, 2, 2]


def test_a_preempted_stay_is_settled_by_what_it_had_filled():
    ledger, req = MemoryLedger(), make_request()
    req.num_slots = 8
    ledger.observe(StepPlan([scheduled(req, 0, 3)], [True]), usage(8, 3, 8))
    ledger.observe(StepPlan([scheduled(req, 3, 1)], [True]), usage(8, 4, 8))
    # Preempted and admitted again in the same plan: a new stay, which fills everything.
    ledger.observe(StepPlan([scheduled(req, 0, 8)], [True], preempted=[req]), usage(8, 8, 8))
    end(req)
    assert ledger.settle()["internal"].tolist() == [4, 4, 0]


def test_a_residency_begins_with_admission_not_with_the_first_step():
    """Two requests of a static batch, prompts 8 + 1, regions of 20, a budget of 4: each fills 8 and 8 of its 20."""
    ledger, a, b = MemoryLedger(), Request("a", [1] * 8), Request("b", [1])
    a.num_slots = b.num_slots = 20
    for start, admitted in ((0, [a, b]), (4, [])):
        ledger.observe(StepPlan([scheduled(a, start, 4)], [False], admitted=admitted), usage(40, start + 4, 40))
    for start in range(8):
        ledger.observe(StepPlan([scheduled(b, start, 1)], [True]), usage(40, 9 + start, 40))
    end(a)
    end(b)
    assert ledger.settle()["internal"].tolist() == [24] * 10


def test_who_is_admitted_again_before_the_next_step_has_begun_a_new_residency():
    """As after a failed step, whose requests lose their slots without a preemption."""
    ledger, req = MemoryLedger(), make_request()
    req.num_slots = 8
    ledger.observe(StepPlan([scheduled(req, 0, 3)], [True], admitted=[req]), usage(8, 3, 8))
    ledger.observe(StepPlan([scheduled(req, 0, 8)], [True], admitted=[req]), usage(8, 8, 8))
    end(req)
    assert ledger.settle()["internal"].tolist() == [5, 0]


def test_the_cached_prefix_of_a_request_that_never_ran_is_not_wasted():
    ledger, req = MemoryLedger(), make_request()
    req.num_slots, req.num_computed_tokens = 8, 4  # admitted with a hit, aborted before its first step
    ledger.observe(StepPlan(admitted=[req]), usage(8, 4, 8))
    end(req)
    ledger.observe(StepPlan(), usage(8, 0, 0))
    assert ledger.settle()["internal"].tolist() == [4, 0]


@pytest.mark.parametrize(
    ("status", "num_computed"),
    [
        (RequestStatus.WAITING, 0),
        (RequestStatus.SWAPPED, 3),
        (RequestStatus.FINISHED, 3),
        (RequestStatus.FINISHED, 0),
    ],
)
def test_a_stay_that_ended_is_settled_by_what_it_had_filled(status: RequestStatus, num_computed: int):
    ledger, req = MemoryLedger(), make_request()
    req.num_slots = 8
    ledger.observe(StepPlan([scheduled(req, 0, 3)], [True]), usage(8, 3, 8))
    # A request that was preempted and then aborted has ended, and its count is 0 all the same.
    req.status, req.num_slots, req.num_computed_tokens = status, 0, num_computed
    ledger.observe(StepPlan(), usage(8, 0, 0))
    assert ledger.settle()["internal"].tolist() == [5, 0]


def test_slots_held_for_finished_requests_are_counted_beside_the_classes():
    ledger, req = MemoryLedger(), make_request()
    req.num_slots = 8
    ledger.observe(StepPlan([scheduled(req, 0, 3)], [True]), usage(8, 3, 8))
    req.status = RequestStatus.FINISHED  # a static batch holds its slots
    ledger.observe(StepPlan(), usage(8, 3, 8))
    req.num_slots = 0
    ledger.observe(StepPlan(), usage(8, 0, 0))
    split = ledger.settle()
    assert split["held"].tolist() == [0, 8, 0]
    assert split["internal"].tolist() == [5, 5, 0]


@pytest.mark.parametrize(
    "bad",
    [
        KVUsage(10, 2, 4, 0, 0, 0, 5),
        KVUsage(10, 5, 4, 0, 0, 0, 6),
        KVUsage(10, 0, 11, 0, 0, 0, -1),
        KVUsage(10, 0, 4, 0, 2, 0, 6),
    ],
)
def test_counts_that_do_not_add_up_fail_the_step(bad: KVUsage):
    with pytest.raises(EngineError, match="does not add up"):
        MemoryLedger().observe(StepPlan(), bad)


def test_computed_slots_without_a_stay_fail_the_settlement():
    ledger, req = MemoryLedger(), make_request()
    req.num_slots = 8
    ledger.observe(StepPlan([scheduled(req, 0, 1)], [True]), usage(8, 7, 8))
    with pytest.raises(EngineError, match="does not add up to the pool"):
        ledger.settle()


def test_an_empty_run_settles_to_empty_columns():
    assert all(isinstance(column, np.ndarray) and len(column) == 0 for column in MemoryLedger().settle().values())


def test_a_check_counts_what_does_not_add_up_and_what_leaked():
    said = []
    check = StepCheck(said.append)
    check.observe(StepPlan(), usage(20, 3, 10))
    check.check_idle(usage(20, 0, 0))
    assert not said
    check.observe(StepPlan(), usage(20, 3, 10)._replace(free=9))
    check.check_idle(usage(20, 3, 10))
    assert len(said) == 2 and "does not add up" in said[0] and "10 of 20 slots are owned" in said[1]
