"""Arrival generators, tested as distributions: rate, variation of the intervals, dispersion of the counts.

A known tool rescales its intervals so that every run lasts N/rate (no count variance between runs); another draws
exponential intervals for "constant"; another clumps a Poisson stream up to a dispersion of 6. Each would fail here.
The bounds are 4 standard errors of the statistic under the true process, with fixed seeds.
"""

import numpy as np
import pytest

from kvarena.engine.errors import ConfigError
from kvarena.experiments.load.arrivals import (
    AllAtOnceArrival,
    ClosedLoopArrival,
    ConstantArrival,
    GammaArrival,
    OnOffArrival,
    PoissonArrival,
    RampArrival,
    TraceArrival,
)
from kvarena.experiments.workloads import WorkloadItem

NUM = 40_000


def items(num, times=None):
    return [WorkloadItem([1], 1, None if times is None else times[i]) for i in range(num)]


MANY = items(NUM)


def dispersion(times, window, end=None):
    """Variance over mean of the counts in windows; 1 for Poisson."""
    end = times[-1] if end is None else end
    counts = np.histogram(times, bins=np.arange(0, end, window))[0]
    return counts.var() / counts.mean(), len(counts)


def cv(times):
    gaps = np.diff(times, prepend=0.0)
    return gaps.std() / gaps.mean()


@pytest.mark.parametrize(
    "arrival",
    [
        AllAtOnceArrival(),
        ConstantArrival(3),
        PoissonArrival(3),
        GammaArrival(3, 0.2),
        OnOffArrival(9, 0, 2, 5),
        RampArrival(0, 5, 30),
    ],
)
def test_times_are_ordered_reproducible_and_one_per_item(arrival):
    times = arrival.times(MANY[:500], 7)
    assert times.shape == (500,)
    assert times.dtype == np.float64
    assert (np.diff(times) >= 0).all()
    assert times[0] >= 0
    assert (times == arrival.times(MANY[:500], 7)).all()
    assert (times[:100] == arrival.times(MANY[:100], 7)).all()
    drawn = not isinstance(arrival, (AllAtOnceArrival, ConstantArrival))
    assert (times != arrival.times(MANY[:500], 8)).any() == drawn


def test_all_at_once_and_constant():
    assert (AllAtOnceArrival().times(MANY[:5], 0) == 0).all()
    assert ConstantArrival(4).times(MANY[:5], 0).tolist() == [0, 0.25, 0.5, 0.75, 1.0]
    assert cv(ConstantArrival(4).times(MANY, 0)[1:]) < 1e-2


def test_poisson_is_poisson():
    times = PoissonArrival(5).times(MANY, 0)
    assert NUM / times[-1] == pytest.approx(5, rel=4 / NUM**0.5)
    assert cv(times) == pytest.approx(1, abs=4 * (1 / NUM) ** 0.5)
    for window in (0.2, 1, 10):
        index, num_windows = dispersion(times, window)
        assert index == pytest.approx(1, abs=4 * (2 / num_windows) ** 0.5)
    gaps = np.diff(times)
    assert np.corrcoef(gaps[1:], gaps[:-1])[0, 1] == pytest.approx(0, abs=4 / NUM**0.5)
    # Exponential tail: the share of intervals above 3 means is exp(-3).
    assert (gaps > 0.6).mean() == pytest.approx(np.exp(-3), abs=4 * (0.05 * 0.95 / NUM) ** 0.5)


def test_nothing_is_rescaled_to_the_expected_duration():
    """The last arrival of N varies from run to run with a coefficient of variation of 1 / sqrt(N)."""
    for arrival, shape in ((PoissonArrival(2), 1), (GammaArrival(2, 0.25), 0.25)):
        ends = np.array([arrival.times(MANY[:100], seed)[-1] for seed in range(400)])
        assert ends.mean() == pytest.approx(50, rel=4 * 0.1 / shape**0.5 / 20)
        assert ends.std() / ends.mean() == pytest.approx(0.1 / shape**0.5, rel=4 / (2 * 400) ** 0.5)


@pytest.mark.parametrize("burstiness", [0.1, 0.5, 1, 4, 50])
def test_gamma_has_the_stated_rate_and_variation(burstiness):
    times = GammaArrival(5, burstiness).times(MANY, 1)
    wanted = burstiness**-0.5
    assert NUM / times[-1] == pytest.approx(5, rel=4 * wanted / NUM**0.5)
    # Variance of a gamma sample's variance: kurtosis excess 6 / shape.
    assert cv(times) == pytest.approx(wanted, rel=4 * ((0.5 + 1.5 / burstiness + wanted**2) / NUM) ** 0.5)
    # Counts of a renewal process over long windows: dispersion CV^2.
    index, num_windows = dispersion(times, 100 * max(wanted, 1))
    assert index == pytest.approx(wanted**2, rel=6 * (2 / num_windows) ** 0.5)


def test_on_off_rates_phases_and_dispersion():
    arrival = OnOffArrival(on_rate=20, off_rate=2, on_duration=5, off_duration=15, phases="fixed")
    assert arrival.mean_rate == pytest.approx(6.5)
    times = arrival.times(MANY, 2)
    num_cycles = int(times[-1] // 20)
    phase = times[times < num_cycles * 20] % 20
    assert (phase < 5).sum() / num_cycles == pytest.approx(100, abs=4 * (100 / num_cycles) ** 0.5)
    assert (phase >= 5).sum() / num_cycles == pytest.approx(30, abs=4 * (30 / num_cycles) ** 0.5)
    # Within each phase it is Poisson; over both it is not: between-phase variance is added.
    index, num_windows = dispersion(times, 5)
    rates = np.array([100, 10, 10, 10])
    wanted = 1 + rates.var() / rates.mean()
    assert index == pytest.approx(wanted, rel=0.1)
    assert dispersion(times, 20, num_cycles * 20)[0] == pytest.approx(1, abs=4 * (8 / num_windows) ** 0.5)


def test_on_off_with_drawn_phases():
    arrival = OnOffArrival(on_rate=20, off_rate=0, on_duration=1, off_duration=3)
    times = arrival.times(MANY, 3)
    cycles = NUM / 20
    assert NUM / times[-1] == pytest.approx(5, rel=4 * 2 / cycles**0.5)
    # An interrupted Poisson process of rate a, leaving its on state at rate r and its off state at rate s, has the
    # long-run dispersion 1 + 2 a r / (r + s)^2 (Fischer and Meier-Hellstern 1993).
    wanted = 1 + 2 * 20 * 1 / (1 + 1 / 3) ** 2
    index, num_windows = dispersion(times, 50)
    assert index == pytest.approx(wanted, rel=5 * (2 / num_windows) ** 0.5)


def test_on_off_never_arrives_in_a_dead_phase():
    times = OnOffArrival(10, 0, 2, 8, phases="fixed").times(MANY[:5000], 0)
    assert (times % 10 <= 2).all()


@pytest.mark.parametrize(("start", "end"), [(0, 20), (20, 1), (7, 7), (1e-9, 5)])
def test_ramp_counts_follow_the_integral_of_the_rate(start, end):
    duration = 400.0
    times = RampArrival(start, end, duration).times(MANY, 4)
    for left, right in ((0, 100), (100, 200), (200, 300), (300, 400), (400, 500)):
        if right > times[-1]:
            break
        at = np.minimum([left, right], duration)
        rate = start + (end - start) * at / duration
        wanted = rate.mean() * 100
        count = ((times >= left) & (times < right)).sum()
        assert count == pytest.approx(wanted, abs=4 * wanted**0.5 + 1)


def test_trace_replays_and_scales():
    stated = [0.0, 0.5, 0.5, 3.0]
    assert TraceArrival().times(items(4, stated), 0).tolist() == stated
    assert TraceArrival(speed=2).times(items(4, stated), 9).tolist() == [0, 0.25, 0.25, 1.5]
    with pytest.raises(ConfigError, match="arrival=trace needs a workload with times"):
        TraceArrival().times(MANY[:4], 0)


def test_closed_loop_states_users_and_think_time():
    arrival = ClosedLoopArrival(num_users=4, think_time=1.5)
    assert arrival.times(MANY[:4], 0) is None
    assert (arrival.num_users, arrival.think_time) == (4, 1.5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PoissonArrival(0), "arrival.rate=0 must be a finite number above 0"),
        (lambda: ConstantArrival(-1), "arrival.rate=-1"),
        (lambda: GammaArrival(1, 0), "arrival.burstiness=0"),
        (lambda: GammaArrival(float("inf"), 1), "arrival.rate=inf"),
        (lambda: OnOffArrival(1, -1, 1, 1), "arrival.off_rate=-1"),
        (lambda: OnOffArrival(1, 1, 1, 1, phases="random"), "arrival.phases=random must be one of"),
        (lambda: RampArrival(1, 0, 1), "arrival.end_rate=0"),
        (lambda: RampArrival(1, 1, "long"), "arrival.duration=long"),
        (lambda: TraceArrival(0), "arrival.speed=0"),
        (lambda: ClosedLoopArrival(0), "arrival.num_users=0"),
        (lambda: ClosedLoopArrival(1, -1), "arrival.think_time=-1"),
    ],
)
def test_bad_options(make, message):
    with pytest.raises(ConfigError) as error:
        make()
    assert message in str(error.value)
