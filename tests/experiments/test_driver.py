"""The driver hands requests over on time, in open and closed loop, and ends when all have ended."""

import pytest

from kvarena.allocators.paged import PagedAllocator
from kvarena.engine.clock import VirtualClock
from kvarena.engine.contract import KVAllocator, StepPlan
from kvarena.engine.core import Engine
from kvarena.engine.errors import EngineError
from kvarena.engine.ledger import MemoryLedger
from kvarena.engine.model_runner import ReadyTokens, StepResult
from kvarena.engine.request import FinishReason, Request, SamplingParams
from kvarena.experiments.building.build import build
from kvarena.experiments.building.warm_up import warm_cache
from kvarena.experiments.jobs.job import execute
from kvarena.experiments.load.driver import ClosedLoop, drive
from kvarena.experiments.recording.record import RunRecorder
from kvarena.experiments.settings.compose import load_run
from kvarena.schedulers.continuous import ContinuousScheduler
from kvarena.schedulers.static import StaticScheduler

STEP_TIME = 0.5


class TickingRunner:
    """Every step takes half a second of simulated time and samples token 7."""

    def __init__(self, clock: VirtualClock) -> None:
        self.clock = clock

    def execute(self, plan: StepPlan, allocator: KVAllocator) -> ReadyTokens:
        self.clock.advance(STEP_TIME)
        return ReadyTokens(StepResult([7 if sampled else None for sampled in plan.samples]))

    def release(self, request_ids: list[str]) -> None:
        pass


def make_engine(scheduler=ContinuousScheduler, num_blocks: int = 16, swap_blocks: int = 0, **options) -> Engine:
    clock = VirtualClock()
    allocator = PagedAllocator(num_blocks=num_blocks, block_size=4, max_model_len=64, swap_blocks=swap_blocks)
    return Engine(
        scheduler(allocator, max_model_len=64, **options), allocator, TickingRunner(clock), clock, ledger=MemoryLedger()
    )


def make_requests(arrivals: list[float], output_len: int = 2) -> list[Request]:
    sampling = SamplingParams(max_tokens=output_len, ignore_eos=True)
    return [Request(f"r{i}", [1, 2, 3], sampling, arrival_time=t) for i, t in enumerate(arrivals)]


def rows(recorder: RunRecorder) -> list[dict]:
    return recorder.request_rows()


def test_open_loop_waits_for_arrivals_and_records_lateness():
    engine, recorder = make_engine(), RunRecorder()
    requests = make_requests([0.0, 0.2, 5.0])
    drive(engine, requests, recorder)
    first, second, third = rows(recorder)
    assert [first["submit_time"], second["submit_time"], third["submit_time"]] == [0.0, 0.5, 5.0]
    assert recorder.max_lateness == pytest.approx(0.3)  # the second arrived in the middle of a step
    assert first["token_times"] == [0.5, 1.5]  # the second's prefill came in between
    assert third["finish_time"] == 6.0
    assert recorder.num_finished == 3
    assert {row["finish_reason"] for row in rows(recorder)} == {"length"}


def test_a_request_that_can_never_run_is_refused_and_the_run_goes_on():
    engine, recorder = make_engine(num_blocks=2), RunRecorder()
    requests = make_requests([0.0, 0.0])
    requests[0].prompt_token_ids = [1] * 20
    drive(engine, requests, recorder)
    refused, served = rows(recorder)
    assert refused["finish_reason"] == "rejected"
    assert "kv_cache" in refused["error"]
    assert refused["first_token_time"] is None
    assert served["num_output_tokens"] == 2


def test_closed_loop_keeps_the_number_of_users():
    engine, recorder = make_engine(), RunRecorder()
    requests = make_requests([0.0] * 5)
    drive(engine, requests, recorder, closed_loop=ClosedLoop(requests, num_users=2, think_time=1.0))
    table = rows(recorder)
    assert len(table) == 5
    # The first two end at 1.0; the next two arrive one thinking time later.
    assert [row["arrival_time"] for row in table] == [0.0, 0.0, 2.0, 2.0, 4.0]


def test_a_static_batch_waits_for_its_deadline():
    engine, recorder = make_engine(StaticScheduler, max_wait=3.0, batch_size=8), RunRecorder()
    drive(engine, make_requests([1.0]), recorder)
    assert rows(recorder)[0]["admission_time"] == 4.0


def test_a_scheduler_that_never_plans_is_an_error_and_not_a_hang():
    class Stuck(ContinuousScheduler):
        def build_plan(self, plan: StepPlan, now: float) -> None:
            pass

    with pytest.raises(EngineError, match="plans nothing while 1 requests wait and 0 run"):
        drive(make_engine(Stuck), make_requests([0.0]), RunRecorder())


def test_recomputed_and_swapped_tokens_are_counted_per_step():
    engine, recorder = make_engine(num_blocks=4), RunRecorder()
    drive(engine, make_requests([0.0, 0.0], output_len=8), recorder)  # 2 x 11 tokens in 16 slots
    assert sum(row["num_preemptions"] for row in rows(recorder)) > 0
    columns = recorder.step_columns()
    assert columns["num_recomputed_tokens"].sum() == sum(row["num_recomputed_tokens"] for row in rows(recorder)) > 0

    swapping = make_engine(num_blocks=4, preemption="swap", swap_blocks=8)
    recorder = RunRecorder()
    drive(swapping, make_requests([0.0, 0.0], output_len=8), recorder)
    columns = recorder.step_columns()
    assert columns["num_recomputed_tokens"].sum() == 0
    assert columns["num_swapped_out"].sum() == columns["num_swapped_in"].sum() > 0


def test_overlap_gives_the_same_tokens_and_counts():
    plain, overlapped = make_engine(), make_engine()
    overlapped.overlap = True
    recorders = RunRecorder(), RunRecorder()
    for engine, recorder in zip((plain, overlapped), recorders, strict=True):
        drive(engine, make_requests([0.0, 0.1, 0.2], output_len=5), recorder)
    tokens = [[row["output_token_ids"] for row in rows(r)] for r in recorders]
    assert tokens[0] == tokens[1]
    assert all(len(row["token_times"]) == row["num_output_tokens"] for r in recorders for row in rows(r))
    assert recorders[1].num_steps == overlapped.ledger.num_steps
    assert {row["finish_reason"] for row in rows(recorders[1])} == {FinishReason.LENGTH.value}


def test_a_warm_cache_serves_the_prompts_and_leaves_no_trace(tmp_path):
    summaries = {}
    for cache in ("cold", "warm"):
        folder = tmp_path / cache
        folder.mkdir()
        cfg = load_run([
            "runner=simulated", "runner.profile=a100-40gb", "model=opt-13b-shape", "engine.dtype=auto",
            f"driver.cache={cache}", "allocator=paged_prefix", "workload=uniform", "workload.num_requests=6",
            "workload.prompt_len={min:100,max:200}", "report.pages=false", "report.progress=false",
        ])  # fmt: skip
        choices = {
            "allocator": "paged_prefix",
            "scheduler": "continuous",
            "workload": "uniform",
            "arrival": "all_at_once",
        }
        summaries[cache] = execute(cfg, folder, cache, choices)
    cold, warm = summaries["cold"], summaries["warm"]
    assert (cold["cache"], cold["cached_prompt_share"]) == ("cold", 0)
    assert warm["cached_prompt_share"] > 0.8  # all but each prompt's last block
    assert warm["num_requests"] == cold["num_requests"] == 6
    assert warm["computed_new_tokens"] == cold["computed_new_tokens"] - warm["num_cached_tokens"]


def test_a_warm_cache_charges_nobody():
    """What clients were served while the cache warmed up is no debt in the measured run."""
    cfg = load_run([
        "runner=simulated", "runner.profile=a100-40gb", "model=opt-13b-shape", "engine.dtype=auto", "scheduler=fair",
        "allocator=paged_prefix", "workload=fixed", "workload.num_requests=3",
    ])  # fmt: skip
    setup = build(cfg)
    warm_cache(cfg, setup.parts, setup.load.requests)
    assert setup.parts.engine.allocator.usage().cached > 0
    assert setup.parts.engine.scheduler.counters == {}


def test_a_run_of_nothing_but_rejected_requests_has_a_report(tmp_path):
    cfg = load_run([
        "runner=simulated", "runner.profile=h100", "engine.dtype=bfloat16", "workload=fixed", "workload.num_requests=3",
        "workload.prompt_len=3000", "report.progress=false",
    ])  # fmt: skip
    choices = {"allocator": "paged", "scheduler": "continuous", "workload": "fixed", "arrival": "all_at_once"}
    summary = execute(cfg, tmp_path, "nothing", choices)
    assert summary["num_rejected"] == 3
    assert "3 rejected" in (tmp_path / "report.md").read_text()
