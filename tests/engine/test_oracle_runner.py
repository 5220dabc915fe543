"""The oracle runner says what is wrong, and where."""

import pytest

from kvarena.engine.contract import BlockCopy, CopyKind, ScheduledRequest, StepPlan
from kvarena.engine.request import Request, SamplingParams
from kvarena.experiments.correctness.oracle import OracleFault, OracleRunner, expected_output


class Tables:
    """Block tables written down by the test."""

    block_size = 4

    def __init__(self, contiguous: bool = False, **tables: list[int]) -> None:
        self.contiguous = contiguous
        self.tables = tables

    def block_table(self, req: Request) -> list[int]:
        return self.tables[req.request_id]


def request(name: str = "a", prompt: list[int] | None = None, **fields) -> Request:
    return Request(name, prompt or [1, 2, 3, 4, 5, 6], SamplingParams(max_tokens=4), num_slots=8, **fields)


def step(*entries: tuple[Request, int, int], copies: list[BlockCopy] | None = None) -> StepPlan:
    scheduled = [ScheduledRequest(*entry) for entry in entries]
    return StepPlan(scheduled, [True] * len(scheduled), copies=copies or [])


def test_chunks_copies_and_swaps_give_the_expected_token():
    req, runner, tables = request(), OracleRunner(), Tables(a=[3, 7])
    whole = runner.execute(step((req, 0, 6)), tables).result().token_ids
    assert whole == expected_output(req)[:1]
    runner = OracleRunner()
    runner.execute(step((req, 0, 5)), tables)
    copies = [BlockCopy(CopyKind.SWAP_OUT, 3, 0), BlockCopy(CopyKind.DEVICE, 7, 3), BlockCopy(CopyKind.SWAP_IN, 0, 7)]
    tables.tables["a"] = [7, 3]
    assert runner.execute(step((req, 5, 1), copies=copies), tables).result().token_ids == whole


def test_a_pending_token_comes_from_the_runners_memory():
    req, runner, tables = request(), OracleRunner(), Tables(a=[3, 7])
    pending = runner.execute(step((req, 0, 6)), tables)
    ahead = runner.execute(step((req, 6, 1)), tables).result().token_ids
    req.output_token_ids += pending.result().token_ids
    assert req.output_token_ids + ahead == expected_output(req)[:2]


def test_the_seed_changes_the_tokens():
    other = request()
    other.sampling = SamplingParams(max_tokens=4, seed=1)
    assert expected_output(request()) != expected_output(other)


@pytest.mark.parametrize(
    ("tables", "steps", "message"),
    [
        ({"a": [3, 7]}, [[("a", 5, 1)]], "position 4 .block 7, offset 0. holds nothing"),
        ({"a": [3]}, [[("a", 0, 6)]], "owns 8 slots, 1 blocks"),
        ({"a": [3, 7, 9]}, [[("a", 0, 9)]], "writes up to position 9 and owns 8"),
        ({"a": [3, 0]}, [[("a", 0, 6)]], "to the null block"),
        ({"a": [3, 3]}, [[("a", 0, 6)]], "slot 12 .position 4 of request 'a'. is written twice"),
        ({"a": [3, 7], "b": [5, 7]}, [[("a", 0, 6), ("b", 0, 6)]], "slot 28 .*'b'. is written twice"),
        (
            {"a": [3, 7], "b": [3, 9]},
            [[("a", 0, 4), ("b", 4, 1)]],
            "'b' computes position 4 alone and reads position 0, which another request writes in the same step",
        ),
        ({"a": [3, 7]}, [[("a", 2, 0)]], r"positions \[2, 2\)"),
        ({"a": [3, 7]}, [[("a", 0, 6)], [("a", 7, 1)]], "position 7 before its token was sampled"),
    ],
)
def test_what_is_wrong_is_said(tables, steps, message):
    requests, runner = {name: request(name) for name in tables}, OracleRunner()
    plans = [step(*((requests[name], start, num_new) for name, start, num_new in entries)) for entries in steps]
    for plan in plans[:-1]:
        runner.execute(plan, Tables(**tables))
    with pytest.raises(OracleFault, match=message):
        runner.execute(plans[-1], Tables(**tables))


def test_a_region_must_be_consecutive():
    with pytest.raises(OracleFault, match="not contiguous"):
        OracleRunner().execute(step((request(), 0, 6)), Tables(contiguous=True, a=[3, 7]))


def test_other_tokens_in_a_slot_are_seen():
    a, b, runner, tables = request("a"), request("b", [9, 9, 9, 9, 9, 9]), OracleRunner(), Tables(a=[3, 7], b=[3, 8])
    runner.execute(step((a, 0, 6)), tables)
    runner.execute(step((b, 0, 6)), tables)
    with pytest.raises(OracleFault, match=r"request 'a', 7 positions computed: position 0 .* the KV of other tokens"):
        runner.execute(step((a, 6, 1)), tables)


def test_copies_never_go_to_the_null_block():
    with pytest.raises(OracleFault, match="device copy of block 3 into the null block"):
        OracleRunner().execute(step(copies=[BlockCopy(CopyKind.DEVICE, 3, 0)]), Tables())


def test_a_window_reads_nothing_that_slid_out():
    req, tables = request(prompt=list(range(20))), Tables(a=[1, 2, 3, 4, 5, 6])
    req.num_slots = 24
    full, windowed = OracleRunner(), OracleRunner(window=6)
    for runner in (full, windowed):
        runner.execute(step((req, 0, 19)), tables)
    tables.tables["a"][:3] = [0, 0, 0]  # the query at 19 attends to 14..19
    assert windowed.execute(step((req, 19, 1)), tables).result().token_ids == expected_output(req, window=6)[:1]
    with pytest.raises(OracleFault, match=r"position 0 .block 0"):
        full.execute(step((req, 19, 1)), tables)


def test_released_requests_are_forgotten():
    req, runner, tables = request(), OracleRunner(), Tables(a=[3, 7])
    runner.execute(step((req, 0, 6)), tables)
    runner.release(["a", "unknown"])
    again = request(prompt=[7, 7, 7, 7, 7, 7])
    assert runner.execute(step((again, 0, 6)), tables).result().token_ids == expected_output(again)[:1]
