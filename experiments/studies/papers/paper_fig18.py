"""PagedAttention, Figure 18: what a block table costs the attention kernel (a), and what the block size costs (b)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any, NamedTuple

from kvarena.engine.errors import ConfigError
from kvarena.experiments.studies.base import Chart, Findings, Series, mean_series
from kvarena.experiments.studies.cells import CellRunner
from kvarena.experiments.studies.claims import Claim, Mean, at_least, at_most, between, counted, measured
from kvarena.experiments.studies.orca import DIFFERENCES, Load, beside_name, run_system, seeds_text
from kvarena.experiments.studies.papers.published import FIGURE_18_AXIS, FIGURE_18_SOURCE, GOOD_BLOCK_SIZES, TABLE_COST
from kvarena.experiments.studies.papers.recorded import KERNEL_LINES, device_of, read_lines

KernelTimes = dict[str, dict[bool, list[float]]]  # case -> without a table? -> microseconds of each repeat
METRIC = "normalized_latency_seconds_per_token"


class Served(NamedTuple):
    """One block size: a number for each seed.

    Attributes:
        latency: mean normalised latency in seconds per token.
        batch: mean requests in a step.
        preemptions: of the run.
    """

    latency: list[float]
    batch: list[float]
    preemptions: list[int]


BySize = Mapping[int, Served]


@dataclass(frozen=True)
class PaperFig18Study:
    """Args:
    block_sizes: in slots; at least those that the paper calls good (`published.GOOD_BLOCK_SIZES`).
    rates: workload -> requests per second, at which memory is scarce.
    duration: workload -> seconds of arrivals.
    near: a block size is as good as the best if its latency is at most so many times the best's.
    seeds: of the workload.
    ideal: profile that is run beside the config's; null: none.
    ideal_seeds: of the workload, under it.
    kernels: lines of `kvarena.experiments.benchmarks.kernels --only figure18`; None takes those recorded on one H100.

    Raises:
        ConfigError: no seed, or a workload without a rate or a duration.
    """

    block_sizes: Sequence[int]
    rates: Mapping[str, float]
    duration: Mapping[str, float]
    near: float
    seeds: Sequence[int]
    ideal: str | None
    ideal_seeds: Sequence[int]
    kernels: str | None = None

    def __post_init__(self) -> None:
        if not self.seeds or (self.ideal and not self.ideal_seeds):
            raise ConfigError("study.seeds and study.ideal_seeds must name at least one seed each")
        if set(self.rates) != set(GOOD_BLOCK_SIZES) or set(self.duration) != set(GOOD_BLOCK_SIZES):
            raise ConfigError(f"study.rates and study.duration must name {' and '.join(GOOD_BLOCK_SIZES)}")

    def run(self, cells: CellRunner) -> Findings:
        """See `Study.run`."""
        found = {workload: self._sizes(cells, workload, self.seeds) for workload in GOOD_BLOCK_SIZES}
        beside: dict[str, BySize] = {}
        if self.ideal:
            profile = f"runner.profile={self.ideal}"
            beside = {w: self._sizes(cells, w, self.ideal_seeds, profile, label="ideal-") for w in GOOD_BLOCK_SIZES}
        table = kernel_times(read_lines(self.kernels, KERNEL_LINES))
        claims = [table_claim(table)]
        for workload, of in found.items():
            claims += self._claims(workload, of, beside.get(workload))
        good = " and ".join(
            f"{name} at block sizes {', '.join(str(size) for size in as_good_as_best(of, self.near))}"
            for name, of in found.items()
        )
        return Findings(
            title="PagedAttention, Figure 18: the block table in the kernel, and the block size",
            headline=f"{counted(claims, 'statements hold')}. Surely within {self.near:g} times the best: {good}.",
            source=FIGURE_18_SOURCE,
            claims=claims,
            charts=[*table_charts(table), self._latency_chart(found), _batch_chart(found)],
            differences=[
                *DIFFERENCES,
                "(a) The paper holds its CUDA kernel against FasterTransformer's, which is another kernel, on an A100. "
                "Ours is one Triton kernel compiled with and without a block table, on the GPU that its claim names: "
                "the difference is addressing alone. Contexts are split over the multiprocessors in both.",
                "(b) The simulated kernel reads KV at one speed whatever the block size. So what large blocks cost "
                "(slots that nobody else can use) is shown here, and what small blocks cost (a slow kernel) is not: "
                "sizes below the good ones are drawn, and not judged.",
                f"(b) The paper fixes a rate and does not state it in its text; its axis ends at {FIGURE_18_AXIS:g} s "
                "per token, so its loads saturate the engine. Ours are those of its Figure 13 and saturate it too: "
                + ", ".join(f"{name} {rate:g} requests/s for {self.duration[name]:g} s"
                            for name, rate in self.rates.items())
                + ". Above capacity the queue, and so the latency, grows with the time of arrivals; the paper's is an "
                "hour.",
            ],
            notes=[
                "Latency is the mean of (end - scheduled arrival) / output length over all requests, as in the paper's "
                f"figures. “As good as the best”: at most {self.near:g} times that of the block size with the least "
                f"mean, seed by seed (our reading). {seeds_text(self.seeds)}",
                "(a) Decode attention of one layer with OPT-13B's 40 heads of 128 in bf16, median of CUDA-graph "
                "replays over memory larger than the L2 cache "
                "(`kvarena benchmark kernels --only figure18`). The claim's value is the mean "
                "of (paged / contiguous - 1) over combinations of batch and context, each a mean of repeats; interval: "
                "95 %, Student's t over these.",
            ],
            beside=beside_name(self.ideal, self.ideal_seeds),
        )  # fmt: skip

    def _sizes(
        self, cells: CellRunner, workload: str, seeds: Sequence[int], *overrides: str, label: str = ""
    ) -> dict[int, Served]:
        load = Load(workload, self.rates[workload], max(1, round(self.rates[workload] * self.duration[workload])))
        found: dict[int, Served] = {}
        for size in self.block_sizes:
            more = [*overrides, f"allocator.block_size={size}"]
            runs = [run_system(cells, "vLLM", load, *more, seed=seed, label=f"{label}block{size}") for seed in seeds]
            found[size] = Served(
                [run[METRIC]["mean"] for run in runs],
                [run["batch_size_mean"] for run in runs],
                [run["num_preemptions"] for run in runs],
            )
        return found

    def _claims(self, workload: str, found: BySize, beside: BySize | None) -> list[Claim]:
        least, most = GOOD_BLOCK_SIZES[workload]
        claims = []
        for size, served in found.items():
            ratio = against_best(found, size)
            quantity = f"(b) {workload}, block size {size}: latency against the best"
            note = f"{mean(served.latency):.3g} s/token, {mean(served.preemptions):,.0f} preemptions"
            more: dict[str, Any] = {"beside": beside and against_best(beside, size)}
            if size < least:
                claims.append(measured(quantity, "times", ratio, note=f"not judged: the kernel's cost; {note}", **more))
            elif size <= most:
                claims.append(at_most(quantity, "times", self.near, ratio, note=f"paper: good; {note}", **more))
            else:
                claims.append(at_least(quantity, "times", self.near, ratio, note=f"paper: worse; {note}", **more))
        worst = max(found, key=lambda size: mean(found[size].latency))
        return [
            *claims,
            measured(
                f"(b) {workload}, largest latency, at block size {worst}", "s/token", Mean.of(found[worst].latency),
                beside=beside and Mean.of(beside[worst].latency), note=f"the paper's axis ends at {FIGURE_18_AXIS:g}",
            ),
        ]  # fmt: skip

    def _latency_chart(self, found: Mapping[str, BySize]) -> Chart:
        return Chart(
            "latency", "lines", "block size (slots)", "normalised latency (s/token)",
            "(b) Mean normalised latency by block size; bands: 95 % over seeds. The paper: ShareGPT best at 16 to 128, "
            "Alpaca at 16 and 32.",
            [
                mean_series(f"{name}, {self.rates[name]:g} requests/s", [float(size) for size in of],
                            [Mean.of(served.latency) for served in of.values()], on_log=True)
                for name, of in found.items()
            ],
            log_x=True,
            log_y=True,
        )  # fmt: skip


def against_best(found: BySize, size: int) -> Mean:
    """Latency over that of the block size with the least mean, seed by seed."""
    best = min(found, key=lambda one: mean(found[one].latency))
    return Mean.of_ratios(found[size].latency, found[best].latency)


def as_good_as_best(found: BySize, most: float) -> list[int]:
    """Block sizes whose latency is surely at most `most` times that of the best: the whole interval over seeds is."""
    ratios = {size: against_best(found, size) for size in found}
    return [size for size, ratio in ratios.items() if (ratio.value if ratio.high is None else ratio.high) <= most]


def _batch_chart(found: Mapping[str, BySize]) -> Chart:
    series = [
        mean_series(name, [float(size) for size in of], [Mean.of(served.batch) for served in of.values()])
        for name, of in found.items()
    ]
    caption = "(b) Why: mean number of requests in a step. The longer a block, the fewer requests have one."
    return Chart("batch", "lines", "block size (slots)", "requests in a step", caption, series, log_x=True)


def kernel_times(lines: Sequence[Mapping[str, Any]]) -> tuple[str | None, KernelTimes]:
    """The device, and the times of each case with and without a block table. Empty without lines."""
    times: KernelTimes = {}
    for line in lines:
        if line.get("kernel") == "decode" and "us" in line:
            times.setdefault(line["case"], {False: [], True: []})[line["contiguous"]].append(float(line["us"]))
    return device_of(lines), {case: of for case, of in times.items() if of[False] and of[True]}


def table_claim(measured: tuple[str | None, KernelTimes]) -> Claim:
    """What a block table adds to the kernel's time, in percent, against the paper's range."""
    device, times = measured
    quantity = "(a) decode kernel through a block table against one without: more time"
    least, most = TABLE_COST
    if not times:
        return between(quantity, "%", least, most, None, note="not measured: a simulator has no kernels")
    costs = {case: 100 * (mean(of[False]) / mean(of[True]) - 1) for case, of in times.items()}
    low, high = min(costs, key=lambda case: costs[case]), max(costs, key=lambda case: costs[case])
    note = f"{device}; from {costs[low]:.1f} % ({low} tokens) to {costs[high]:.1f} % ({high}); the same kernel"
    return between(quantity, "%", least, most, Mean.of([*costs.values()]), note=note)


def table_charts(measured: tuple[str | None, KernelTimes]) -> list[Chart]:
    """Kernel times side by side; none without lines."""
    device, times = measured
    if not times:
        return []
    series = [
        Series(
            "contiguous" if contiguous else "paged, blocks of 16",
            [case.replace(" x ", " requests,\n") + " tokens" for case in times],
            [mean(of[contiguous]) for of in times.values()],
            [min(of[contiguous]) for of in times.values()],
            [max(of[contiguous]) for of in times.values()],
        )
        for contiguous in (True, False)
    ]
    caption = (
        f"(a) Decode attention of one layer with OPT-13B's heads on one {device}; bars of error: range of repeats."
    )
    return [Chart("kernel", "bars", "", "kernel time (us)", caption, series)]
