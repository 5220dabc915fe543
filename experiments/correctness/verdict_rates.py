"""How often the verdicts of a report (reports/comparing/verdicts.py) are false, and how often they decide:

    kvarena check verdict_rates --repetitions 200

Equal cells run in the order of a sweep (experiments/settings/run_order.py) on a machine with a noise of 1 % a run and a
drift: linear, a step, ten times that step, or a random walk, of 0.5, 1 and 2 % a run; over 2 to 12 cells, 2 to 6
rounds, and one metric or four whose noise is the same by nine tenths. With seeds, each cell has an effect of its own of
3 % in each seed, so that rounds alone would tell equals apart. A repetition is false if its report holds any verdict of
`lower`, `higher` or `fastest`. Then two cells that differ by 5 % over five rounds: how often the report says so.

Prints the worst settings, and as its last line JSON with all of them. Exit code 1 when a setting is above the bound.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from kvarena.experiments.jobs.output import tracked
from kvarena.experiments.settings.run_order import order
from kvarena.experiments.tools import tool_parser
from kvarena.reports.comparing.verdicts import THROUGHPUT, Verdict, compare_cells

NOISE = 0.01  # of a run, as a standard deviation of its logarithm
SEED_EFFECT = 0.03  # of a cell in one seed
SHARED = 0.9  # of the noise's variance, by all metrics of a run
METRICS = (THROUGHPUT, "ttft_seconds", "tpot_seconds", "e2e_seconds")
SIZES = (0.005, 0.01, 0.02)
DRIFTS = (("none", 0.0), *itertools.product(("linear", "step", "large step", "walk"), SIZES))
MOST_FALSE, LEAST_RIGHT = 16 / 200, 180 / 200


@dataclass(frozen=True)
class Setting:
    """A simulated report: `num_seeds` times `num_rounds` blocks of `num_cells` runs, and a true difference.

    `effect` is the logarithm by which cell 1 exceeds all others.
    """

    drift: str
    size: float
    num_cells: int
    num_rounds: int
    num_seeds: int = 1
    num_metrics: int = 1
    effect: float = 0.0


def drift_of(setting: Setting, num_runs: int, rng: np.random.Generator) -> np.ndarray:
    """The machine's speed at each run, in time order, as a logarithm."""
    size, runs = setting.size, np.arange(num_runs)
    if setting.drift == "linear":
        return size * runs
    if setting.drift == "walk":
        return np.cumsum(rng.normal(0, size, num_runs))
    if setting.drift in ("step", "large step"):
        return (runs >= rng.integers(1, num_runs)) * size * (10 if setting.drift == "large step" else 1)
    return np.zeros(num_runs)


def simulate(setting: Setting, rng: np.random.Generator) -> list[Verdict]:
    """One repetition: the runs of a sweep, and the verdicts of its report."""
    cells, blocks = setting.num_cells, setting.num_seeds * setting.num_rounds
    positions = np.empty((cells, blocks))
    for block in range(blocks):
        positions[order(cells, block), block] = block * cells + np.arange(cells)
    drift = drift_of(setting, cells * blocks, rng)[positions.astype(int)]
    seeds = np.repeat(np.arange(setting.num_seeds), setting.num_rounds)
    shared, own = SHARED**0.5 * NOISE, (1 - SHARED) ** 0.5 * NOISE
    noise = drift + rng.normal(0, shared if setting.num_metrics > 1 else NOISE, (cells, blocks))
    if setting.num_seeds > 1:
        noise += rng.normal(0, SEED_EFFECT, (cells, setting.num_seeds))[:, seeds]
    noise[1] += setting.effect
    values = {}
    for metric in METRICS[: setting.num_metrics]:
        alone = rng.normal(0, own, (cells, blocks)) if setting.num_metrics > 1 else 0.0
        values[metric] = np.exp(noise + alone)
    return compare_cells(values, seeds.tolist(), positions=positions)


def count_false(setting: Setting, repetitions: int, seed: int) -> int:
    """Repetitions in which the report of equal cells holds any verdict."""
    rng = np.random.default_rng([seed, *repr(setting).encode()])
    return sum(any(answer.is_decided for answer in simulate(setting, rng)) for _ in range(repetitions))


def count_right(setting: Setting, repetitions: int, seed: int) -> int:
    """Repetitions in which the throughput of cell 1 is found higher than the baseline's."""
    rng = np.random.default_rng([seed, *repr(setting).encode()])
    return sum(simulate(setting, rng)[0].verdict == "higher" for _ in range(repetitions))


def equal_settings(
    cells: Sequence[int] = range(2, 13), rounds: Sequence[int] = range(2, 7), seeds: Sequence[int] = (1, 3)
) -> list[Setting]:
    """Every setting without a true difference."""
    return [
        Setting(drift, size, num_cells, num_rounds, num_seeds, num_metrics)
        for num_seeds, num_metrics, (drift, size), num_cells, num_rounds in itertools.product(
            seeds, (1, len(METRICS)), DRIFTS, cells, rounds
        )
    ]


def _false(job: tuple[Setting, int, int]) -> tuple[Setting, int]:
    return job[0], count_false(*job)


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    parser = tool_parser(__name__, __doc__)
    parser.add_argument("--repetitions", type=int, default=200, help="reports per setting")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--num-seeds", type=int, nargs="+", default=[1, 3], help="workload seeds of a sweep")
    options = parser.parse_args(arguments)
    repetitions = options.repetitions
    jobs = [(setting, repetitions, options.seed) for setting in equal_settings(seeds=options.num_seeds)]
    with multiprocessing.Pool(options.jobs) as pool:
        found = pool.imap_unordered(_false, jobs, chunksize=4)
        results = list(tracked(found, "verdict_rates", len(jobs), "settings"))
    results.sort(key=lambda result: (-result[1], repr(result[0])))
    for setting, number in results[:10]:
        print(f"{number:4d} of {repetitions} reports of equal cells hold a false verdict: {setting}")
    powers = [Setting("none", 0.0, 2, 5, 1, metrics, np.log(1.05)) for metrics in (1, len(METRICS))]
    rights = [count_right(setting, repetitions, options.seed) for setting in powers]
    for setting, number in zip(powers, rights, strict=True):
        print(f"{number:4d} of {repetitions} reports find a difference of 5 %: {setting}")
    worst = max(number for _, number in results)
    passed = worst <= MOST_FALSE * repetitions and min(rights) >= LEAST_RIGHT * repetitions
    report = {
        "repetitions": repetitions,
        "settings": len(results),
        "most_false": worst,
        "mean_false": sum(number for _, number in results) / len(results),
        "right": rights,
        "passed": passed,
        "false": [asdict(setting) | {"false": number} for setting, number in results],
    }
    print(json.dumps(report))
    return 0 if passed else 1
