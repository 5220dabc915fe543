"""PagedAttention, Figure 19: what preemption costs by recomputation and by swapping, for every block size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any, NamedTuple

from kvarena.engine.checks import check_number
from kvarena.engine.errors import ConfigError
from kvarena.experiments.recording.step_features import StepFeatures
from kvarena.experiments.simulation.step_time import RooflineStepTime
from kvarena.experiments.studies.base import Chart, Findings, Series, mean_series
from kvarena.experiments.studies.cells import CellRunner
from kvarena.experiments.studies.claims import Claim, Mean, at_least, at_most, check, counted, measured, near
from kvarena.experiments.studies.orca import DIFFERENCES, Load, beside_name, run_system, seeds_text
from kvarena.experiments.studies.papers.published import (
    COMPARABLE_BLOCK_SIZES,
    FIGURE_19_AXIS,
    FIGURE_19_SOURCE,
    RECOMPUTE_OVER_SWAP,
)
from kvarena.experiments.studies.papers.recorded import SWAP_LINES, device_of, read_lines
from kvarena.reports.reading.files import read_run

METRIC = "normalized_latency_seconds_per_token"
MODES = {"recompute": "recomputation", "swap": "swapping"}
FLAT = 1.05  # times the least: our reading of "constant"


@dataclass(frozen=True)
class Cost:
    """Seconds that a preempted request costs: (a).

    Attributes:
        recompute: a step that computes all its tokens and nothing else.
        swap: out and in again.
    """

    recompute: float
    swap: float


class Runs(NamedTuple):
    """One way to preempt at one block size: a number for each seed.

    Attributes:
        latency: mean normalised latency in seconds per token.
        preemptions: of the run.
    """

    latency: list[float]
    preemptions: list[int]


Served = dict[str, dict[int, Runs]]  # by mode and block size


@dataclass(frozen=True)
class PaperFig19Study:
    """Args:
    block_sizes: in slots, rising; at least one that the paper calls comparable.
    num_tokens: of the request of (a).
    rate: requests per second of (b), at which memory is scarce.
    duration: seconds of arrivals.
    swap_gib: host memory for KV, in GiB.
    near: latencies are comparable if they differ by at most this share.
    seeds: of the workload.
    ideal: profile that is run beside the config's; null: none.
    ideal_seeds: of the workload, under it.
    swaps: lines of `kvarena.experiments.benchmarks.kernels.swaps`; None takes those recorded on one H100.

    Raises:
        ConfigError: a number out of range, or block sizes that do not rise.
    """

    block_sizes: Sequence[int]
    num_tokens: int
    rate: float
    duration: float
    swap_gib: float
    near: float
    seeds: Sequence[int]
    ideal: str | None
    ideal_seeds: Sequence[int]
    swaps: str | None = None

    def __post_init__(self) -> None:
        for key in ("num_tokens", "rate", "duration", "swap_gib", "near"):
            check_number(f"study.{key}", getattr(self, key), above=True)
        sizes = list(self.block_sizes)
        if len(sizes) < 2 or sizes != sorted(set(sizes)):
            raise ConfigError(f"study.block_sizes={sizes} must be at least two sizes that rise")
        if not self.seeds or (self.ideal and not self.ideal_seeds):
            raise ConfigError("study.seeds and study.ideal_seeds must name at least one seed each")

    def run(self, cells: CellRunner) -> Findings:
        """See `Study.run`."""
        costs: dict[int, Cost] = {}
        found: Served = {mode: {} for mode in MODES}
        beside: Served = {mode: {} for mode in MODES}
        for size in self.block_sizes:
            for mode in MODES:
                found[mode][size] = self._runs(cells, mode, size, self.seeds)
            costs[size] = self._cost(read_run(cells.folders[-1]).manifest["simulation"], size)
            for mode in MODES if self.ideal else ():
                profile = f"runner.profile={self.ideal}"
                beside[mode][size] = self._runs(cells, mode, size, self.ideal_seeds, profile, label="ideal-")
        lines = read_lines(self.swaps, SWAP_LINES)
        claims = [*_cost_claims(costs), *_measured_claims(lines), *self._latency_claims(found, beside)]
        return Findings(
            title="PagedAttention, Figure 19: recomputation and swapping",
            headline=f"{counted(claims, 'statements hold')}. {_cheaper(costs)}",
            source=FIGURE_19_SOURCE,
            claims=claims,
            charts=[self._cost_chart(costs, lines), self._latency_chart(found)],
            differences=[
                *DIFFERENCES[:2],
                "A swap here moves a block with all its layers in one transfer, from a gathered copy. The paper's "
                "moves many small pieces when blocks are small, which is why its swaps are slow there, and ours are "
                "hardly.",
                "What a transfer costs beside its bytes, and the share of the link that it reaches, are measured on "
                "one H100 over PCIe 5.0 and taken over to the A100's PCIe 4.0 (conf/profile/a100-40gb.yaml).",
                "The simulator lets a step wait for its swaps; the engine copies out while the forward runs.",
                "The paper's rate, and the length of the request of its microbenchmark, are not in its text as we "
                f"have it: ours are {self.rate:g} requests/s for {self.duration:g} s and {self.num_tokens:,} tokens. "
                f"The axis of (b) ends at {FIGURE_19_AXIS:g} s per token, so its load saturates the engine, as ours "
                "does; above capacity latency grows with the time of arrivals, an hour in the paper.",
            ],
            notes=[
                f"(a) A request of {self.num_tokens:,} tokens: one step that computes them all, against moving its "
                "blocks out and in, from the step times of the cells.",
                f"(b) The same requests under both, last-arrived preempted first, {self.swap_gib:g} GiB of host "
                f"memory. Comparable: within {self.near:.0%} of one another, seed by seed (our reading). "
                f"{seeds_text(self.seeds)}",
            ],
            beside=beside_name(self.ideal, self.ideal_seeds),
        )

    def _runs(
        self, cells: CellRunner, mode: str, size: int, seeds: Sequence[int], *overrides: str, label: str = ""
    ) -> Runs:
        load = Load("sharegpt", self.rate, max(1, round(self.rate * self.duration)))
        more = [*overrides, f"allocator.block_size={size}", f"scheduler.preemption={mode}"]
        if mode == "swap":
            more.append(f"allocator.swap_gib={self.swap_gib}")
        label = f"{label}block{size}-{mode}"
        runs = [run_system(cells, "vLLM", load, *more, seed=seed, label=label) for seed in seeds]
        return Runs([run[METRIC]["mean"] for run in runs], [run["num_preemptions"] for run in runs])

    def _cost(self, simulation: Mapping[str, Any], size: int) -> Cost:
        if simulation["kind"] != "analytic":
            raise ConfigError("experiment=paper_fig19 needs a card's profile: set runner.profile=a100-40gb, h100, ...")
        seconds = RooflineStepTime(**simulation["step_time"])
        tokens, num_blocks = self.num_tokens, -(-self.num_tokens // size)
        prompt = StepFeatures(tokens, 0, tokens, tokens * (tokens + 1) // 2, 0, 1)
        # Out and in again.
        return Cost(seconds(prompt), 2 * num_blocks * seconds.per_copied_block)

    def _latency_claims(self, found: Served, beside: Served) -> list[Claim]:
        least, most = COMPARABLE_BLOCK_SIZES
        claims = []
        for size in self.block_sizes:
            ratio = over_recompute(found, size)
            second = over_recompute(beside, size) if self.ideal else None
            quantity = f"(b) block size {size}: latency, swapping over recomputation"
            note = ", ".join(
                f"{name} {mean(found[mode][size].latency):.3g} s/token, "
                f"{mean(found[mode][size].preemptions):,.0f} preemptions"
                for mode, name in MODES.items()
            )
            if least <= size <= most:
                note = f"paper: comparable; {note}"
                claims.append(near(quantity, "times", 1.0, ratio, self.near, beside=second, note=note))
            else:
                claims.append(measured(quantity, "times", ratio, beside=second, note=note))
        size = max(self.block_sizes, key=lambda size: mean(found["recompute"][size].latency))
        return [
            *claims,
            measured(
                f"(b) largest latency, recomputation at block size {size}", "s/token",
                Mean.of(found["recompute"][size].latency),
                beside=Mean.of(beside["recompute"][size].latency) if self.ideal else None,
                note=f"the paper's axis ends at {FIGURE_19_AXIS:g}",
            ),
        ]  # fmt: skip

    def _cost_chart(self, costs: dict[int, Cost], lines: Sequence[Mapping[str, Any]]) -> Chart:
        sizes = [float(size) for size in costs]
        series = [
            Series("recomputation (simulated)", sizes, [1e3 * cost.recompute for cost in costs.values()]),
            Series("swap out and in (simulated)", sizes, [1e3 * cost.swap for cost in costs.values()]),
        ]
        caption = f"(a) What a preempted request of {self.num_tokens:,} tokens costs."
        if lines:
            times = swap_times(lines, self.num_tokens)
            if times:
                sizes = [float(size) for size in times]
                series.append(
                    Series(f"swap out and in, measured on one {device_of(lines)}", sizes, list(times.values()))
                )
        return Chart("cost", "lines", "block size (slots)", "time of a preemption (ms)", caption, series, log_x=True)

    def _latency_chart(self, found: Served) -> Chart:
        sizes = [float(size) for size in self.block_sizes]
        series = [
            mean_series(MODES[mode], sizes, [Mean.of(of[size].latency) for size in self.block_sizes])
            for mode, of in found.items()
        ]
        caption = (
            f"(b) Mean normalised latency, ShareGPT at {self.rate:g} requests/s, by block size; bands: 95 % over seeds."
        )
        return Chart(
            "latency", "lines", "block size (slots)", "normalised latency (s/token)", caption, series, log_x=True
        )


def over_recompute(found: Served, size: int) -> Mean:
    """Latency by swapping over that by recomputation, seed by seed."""
    return Mean.of_ratios(found["swap"][size].latency, found["recompute"][size].latency)


def swap_times(lines: Sequence[Mapping[str, Any]], num_tokens: int) -> dict[int, float]:
    """Block size -> milliseconds out and in again, mean of the repeats with so many tokens."""
    times: dict[int, list[float]] = {}
    for line in lines:
        if line.get("num_tokens") == num_tokens:
            times.setdefault(line["block_size"], []).append((line["swap_out_us"] + line["swap_in_us"]) / 1e3)
    return {size: mean(of) for size, of in times.items()}


def _cost_claims(costs: dict[int, Cost]) -> list[Claim]:
    """(a): by the profile's step times alone, so exact numbers without an interval."""
    recompute = [cost.recompute for cost in costs.values()]
    over = {size: cost.recompute / cost.swap for size, cost in costs.items()}
    worst, small, large = max(over, key=lambda size: over[size]), min(over), max(over)

    def note(size: int) -> str:
        return f"{1e3 * costs[size].recompute:.1f} ms against {1e3 * costs[size].swap:.1f} ms"

    return [
        at_most("(a) recomputation over swapping, largest of all block sizes", "times", RECOMPUTE_OVER_SWAP,
                over[worst], note=f"at block size {worst}: {note(worst)}"),
        at_most(f"(a) recomputation over swapping at the smallest block size, {small}", "times", 1.0, over[small],
                note=f"paper: recomputation costs less where blocks are small; {note(small)}"),
        at_least(f"(a) recomputation over swapping at the largest block size, {large}", "times", 1.0, over[large],
                 note=f"paper: swapping costs less where blocks are large; {note(large)}"),
        check(at_most("(a) recomputation: most over least of all block sizes", "times", FLAT,
                      max(recompute) / min(recompute),
                      note="paper: the same for all; so by construction here, no step time knows the block size")),
    ]  # fmt: skip


def _measured_claims(lines: Sequence[Mapping[str, Any]]) -> list[Claim]:
    """How much longer small blocks take to swap than large ones, as recorded on a GPU; nothing without lines."""
    quantity = "(a) swapping, smallest over largest block size, on a GPU"
    tokens = next((line["num_tokens"] for line in lines if "num_tokens" in line), None)
    if tokens is None:
        return []
    times = swap_times(lines, tokens)
    small, large = min(times), max(times)
    note = f"{device_of(lines)}, {tokens:,} tokens: {times[small]:.1f} ms at {small}, {times[large]:.1f} ms at {large}"
    return [measured(quantity, "times", times[small] / times[large], note=note)]


def _cheaper(costs: dict[int, Cost]) -> str:
    by_swap = [str(size) for size, cost in costs.items() if cost.swap < cost.recompute]
    if not by_swap:
        return "Recomputing a request costs less than swapping it at every block size."
    if len(by_swap) == len(costs):
        return "Swapping a request costs less than recomputing it at every block size."
    return f"Swapping a request costs less than recomputing it at block sizes {', '.join(by_swap)}."
