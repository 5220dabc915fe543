"""The simulated runner: features, the step-time model, and one device under overlap."""

from types import SimpleNamespace

import pytest

from kvarena.engine.clock import VirtualClock
from kvarena.engine.contract import BlockCopy, CopyKind, ScheduledRequest, StepPlan
from kvarena.engine.errors import ConfigError
from kvarena.engine.request import Request
from kvarena.experiments.recording.step_features import StepFeatures, step_features
from kvarena.experiments.simulation.runner import SimulatedRunner
from kvarena.experiments.simulation.step_time import HostTime, RooflineStepTime, TableStepTime


def plan(*entries: tuple[int, int], samples: bool = True, num_copies: int = 0) -> StepPlan:
    scheduled = [ScheduledRequest(Request(f"r{i}", [1]), *entry) for i, entry in enumerate(entries)]
    copies = [BlockCopy(CopyKind.SWAP_IN, 1, 1)] * num_copies
    return StepPlan(scheduled, [samples] * len(scheduled), copies=copies)


def test_features_of_a_mixed_step():
    # Two decodes at 10 and 20 tokens; a first chunk of 3; a chunk of 2 after 4.
    features = step_features(plan((9, 1), (19, 1), (0, 3), (4, 2), num_copies=2))
    assert features == StepFeatures(
        num_prefill_tokens=5,
        num_decode_requests=2,
        num_kv_tokens=10 + 20 + 3 + 6,
        num_attention_pairs=(1 + 2 + 3) + (5 + 6),
        num_copied_blocks=2,
        num_prefill_requests=2,
        longest_prefill=6,
    )


def test_a_step_s_parts_add_up():
    model = RooflineStepTime(1.0, 0.2, 0.1, 0.01, 0.001, 0.0001, 0.00001)
    assert model(StepFeatures(1, 2, 3, 4, 5, 1)) == pytest.approx(1.0 + 0.3 + 0.03 + 0.003 + 0.0004 + 0.00005)
    with pytest.raises(ConfigError, match="per_kv_token"):
        RooflineStepTime(1.0, 0.0, 0.0, per_kv_token=-1.0)
    with pytest.raises(ConfigError, match="base"):
        RooflineStepTime(float("nan"), 0.0, 0.0)


def test_the_clock_moves_when_the_result_is_taken():
    clock = VirtualClock()
    runner = SimulatedRunner(RooflineStepTime(2.0, 0.0, 0.0), clock, token_id=5)
    step = runner.execute(plan((0, 3), (0, 3)), allocator=None)
    assert clock.now() == 0.0
    assert step.result().token_ids == [5, 5]
    assert clock.now() == 2.0
    assert runner.execute(plan((0, 3), samples=False), allocator=None).result().token_ids == [None]


def test_steps_in_flight_run_one_after_the_other():
    clock = VirtualClock()
    runner = SimulatedRunner(RooflineStepTime(2.0, 0.0, 0.0), clock)
    first = runner.execute(plan((0, 3)), allocator=None)
    clock.advance(0.5)  # the host plans the next step meanwhile
    second = runner.execute(plan((3, 1)), allocator=None)
    first.result()
    assert clock.now() == 2.0
    clock.advance(5.0)
    second.result()
    assert clock.now() == 7.0  # it had ended at 4.0


def test_the_host_works_before_and_after_a_step():
    clock = VirtualClock()
    host = HostTime(before=0.5, before_per_request=0.1, after=0.25, after_per_request=0.05)
    runner = SimulatedRunner(RooflineStepTime(2.0, 0.0, 0.0), clock, host=host)
    pending = runner.execute(plan((0, 3), (4, 1)), None)
    assert clock.now() == pytest.approx(0.7)  # the device waits for the host
    pending.result()
    assert clock.now() == pytest.approx(2.7)
    step = SimpleNamespace(plan=plan((0, 3), (4, 1)))
    runner.after_step(step)
    assert clock.now() == pytest.approx(3.05)


def test_the_host_is_hidden_behind_a_step_in_flight():
    clock = VirtualClock()
    runner = SimulatedRunner(RooflineStepTime(2.0, 0.0, 0.0), clock, host=HostTime(before=0.5))
    first, second = runner.execute(plan((0, 3)), None), runner.execute(plan((3, 1)), None)
    first.result()
    assert clock.now() == pytest.approx(2.5)
    second.result()
    assert clock.now() == pytest.approx(4.5)


def test_tokens_wait_for_the_launch_of_the_next_step():
    clock = VirtualClock()
    host = HostTime(launch_decode=0.5, launch_prefill=1.0, launch_eager=10.0, max_launch_tokens=4)
    runner = SimulatedRunner(RooflineStepTime(6.0, 0.0, 0.0), clock, host=host)
    decode = runner.execute(plan((3, 1)), allocator=None)
    assert clock.now() == 0.5
    prompt = runner.execute(plan((0, 5)), allocator=None)
    # The device began with the decode's graph at 0.5, and with the prompt when it had ended that, at 6.5; the host came
    # back after the launch.
    decode.result()
    assert clock.now() == 10.5
    short = runner.execute(plan((0, 4)), allocator=None)
    assert clock.now() == 11.5
    prompt.result()
    assert clock.now() == 12.5
    short.result()
    assert clock.now() == 18.5


def test_a_step_ends_no_sooner_than_its_launch():
    clock = VirtualClock()
    runner = SimulatedRunner(
        RooflineStepTime(2.0, 0.0, 0.0), clock, host=HostTime(before=1.0, launch_eager=10.0, tail=0.25)
    )
    runner.execute(plan((0, 5)), allocator=None).result()
    assert clock.now() == 11.25


def test_a_graph_begins_when_it_is_launched_and_tokens_that_wait_take_the_host_a_moment():
    clock = VirtualClock()
    runner = SimulatedRunner(
        RooflineStepTime(2.0, 0.0, 0.0), clock, host=HostTime(launch_decode=3.0, take=0.5, before_prefill=9.0)
    )
    first = runner.execute(plan((3, 1)), allocator=None)
    second = runner.execute(plan((4, 1)), allocator=None)
    first.result()  # ended at 5.0, seen at 6.0
    assert clock.now() == 6.5
    second.result()  # begun at 6.0
    assert clock.now() == 8.0


@pytest.mark.parametrize("seconds", [[1.0, 2.0, 4.0, 4.0], [1.0, 1.0, 1.0, 4.0], [0.0, 4.0, 4.0, 4.0]])
def test_beyond_its_table_a_step_is_never_free(seconds: list[float]):
    """A table that ends in a stair: twice the tokens take at least the whole table's slope longer."""
    table = TableStepTime([0, 256, 512, 1024], seconds)
    assert table(StepFeatures(1024, 0, 0, 0, 0, 1)) == pytest.approx(4.0)
    longer = table(StepFeatures(2048, 0, 0, 0, 0, 1))
    assert longer >= 4.0 + (4.0 - seconds[0]) - 1e-9
    assert table(StepFeatures(4096, 0, 0, 0, 0, 1)) == pytest.approx(longer + 2 * (longer - 4.0))


def test_a_launch_grows_with_requests_and_prompt_tokens():
    host = HostTime(
        launch_decode=1.0, launch_prefill=2.0, launch_eager=10.0, max_launch_tokens=4, launch_per_request=0.5,
        launch_per_token=0.25,
    )  # fmt: skip
    assert host.launch(StepFeatures(0, 2, 0, 0, 0, 0)) == 1.0 + 2 * 0.5
    assert host.launch(StepFeatures(3, 1, 0, 0, 0, 1)) == 2.0 + 2 * 0.5 + 3 * 0.25
    assert host.launch(StepFeatures(8, 0, 0, 0, 0, 1)) == 10.0 + 0.5 + 8 * 0.25


def test_few_queries_of_a_long_context_do_not_fill_the_device():
    table = TableStepTime([1, 1024], [0.0, 0.0], per_attention_pair=1.0, fill_queries=512)
    short, long = 256, 1024
    contexts = [StepFeatures(new, 0, 0, new * 10_000, 0, 1, longest_prefill=10_000) for new in (short, long)]
    assert [table(features) for features in contexts] == [512 * 10_000, 1024 * 10_000]
