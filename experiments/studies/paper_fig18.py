"""PagedAttention, Figure 18: what a block table costs the attention kernel (a), and what the block size costs (b)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from experiments.studies.base import Chart, Claim, Findings, Series, Verdict, at_least, at_most, between
from experiments.studies.cells import CellRunner
from experiments.studies.orca import DIFFERENCES, Load, run_system
from experiments.studies.published import FIGURE_18_SOURCE, GOOD_BLOCK_SIZES, TABLE_COST
from experiments.studies.recorded import KERNEL_LINES, device_of, read_lines

KernelTimes = dict[str, dict[bool, list[float]]]  # case -> without a table? -> microseconds of each repeat
METRIC = "normalized_latency_seconds_per_token"


@dataclass(frozen=True)
class PaperFig18Study:
    """Args:
    block_sizes: in slots; at least those that the paper calls good (`published.GOOD_BLOCK_SIZES`).
    rates: workload -> requests per second, at which memory is scarce.
    num_requests: workload -> how many arrive.
    near: a block size is as good as the best if its latency is at most so many times the best's.
    kernels: lines of `experiments.benchmarks.kernels --only figure18`; None takes those recorded on one H100.
    """

    block_sizes: Sequence[int]
    rates: dict[str, float]
    num_requests: dict[str, int]
    near: float
    kernels: str | None = None

    def run(self, cells: CellRunner) -> Findings:
        """See `Study.run`."""
        found: dict[str, dict[int, dict[str, Any]]] = {}
        for workload in GOOD_BLOCK_SIZES:
            load = Load(workload, self.rates[workload], self.num_requests[workload])
            found[workload] = {
                size: run_system(cells, "vLLM", load, f"allocator.block_size={size}", label=f"block{size}")
                for size in self.block_sizes
            }
        table = kernel_times(read_lines(self.kernels, KERNEL_LINES))
        ratios = {workload: _against_best(of) for workload, of in found.items()}
        claims = [table_claim(table)]
        for workload, of in found.items():
            claims += self._claims(workload, ratios[workload], of)
        held = sum(claim.verdict is Verdict.HOLDS for claim in claims)
        judged = sum(claim.verdict is not Verdict.NOT_COMPARABLE for claim in claims)
        good = " and ".join(
            f"{name} at block sizes {', '.join(str(size) for size, ratio in of.items() if ratio <= self.near)}"
            for name, of in ratios.items()
        )
        return Findings(
            title="PagedAttention, Figure 18: the block table in the kernel, and the block size",
            headline=f"{held} of {judged} statements hold. Within {self.near:g} times the best: {good}.",
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
                "(b) The paper fixes a rate and does not state it in its text; ours are those at which memory is "
                "scarce in the simulator: "
                + ", ".join(f"{name} {rate:g} requests/s" for name, rate in self.rates.items())
                + ". With memory to spare the block size makes no difference here.",
            ],
            notes=[
                "Latency is the mean of (end - scheduled arrival) / output length over all requests, as in the paper's "
                f"figures. “As good as the best”: at most {self.near:g} times the least mean (our reading).",
                "(a) Decode attention of one layer with OPT-13B's 40 heads of 128 in bf16, median of CUDA-graph "
                "replays over memory larger than the L2 cache "
                "(`python -m experiments.benchmarks.kernels --only figure18`). "
                "The claim's value is the mean over batches, contexts and repeats of (paged / contiguous - 1).",
            ],
        )  # fmt: skip

    def _claims(self, workload: str, ratios: dict[int, float], found: dict[int, dict[str, Any]]) -> list[Claim]:
        least, most = GOOD_BLOCK_SIZES[workload]
        claims = []
        for size, ratio in ratios.items():
            latency = found[size][METRIC]["mean"]
            quantity = f"(b) {workload}, block size {size}: latency against the best"
            note = f"{latency:.3f} s/token, {found[size]['num_preemptions']:,} preemptions"
            if size < least:
                unit, of = "times", "not judged: the kernel's cost"
                claims.append(Claim(quantity, unit, None, ratio, of, Verdict.NOT_COMPARABLE, note=note))
            elif size <= most:
                claims.append(at_most(quantity, "times", self.near, ratio, note=f"paper: good; {note}"))
            else:
                claims.append(at_least(quantity, "times", self.near, ratio, note=f"paper: worse; {note}"))
        return claims

    def _latency_chart(self, found: dict[str, dict[int, dict[str, Any]]]) -> Chart:
        return Chart(
            "latency", "lines", "block size (slots)", "normalised latency (s/token)",
            "(b) Mean normalised latency by block size. The paper: ShareGPT best at 16 to 128, Alpaca at 16 and 32.",
            [
                Series(
                    f"{name}, {self.rates[name]:g} requests/s",
                    [float(size) for size in of],
                    [summary[METRIC]["mean"] for summary in of.values()],
                )
                for name, of in found.items()
            ],
            log_x=True,
            log_y=True,
        )  # fmt: skip


def _against_best(found: dict[int, dict[str, Any]]) -> dict[int, float]:
    best = min(summary[METRIC]["mean"] for summary in found.values())
    return {size: summary[METRIC]["mean"] / best for size, summary in found.items()}


def _batch_chart(found: dict[str, dict[int, dict[str, Any]]]) -> Chart:
    series = [
        Series(name, [float(size) for size in of], [summary["batch_size_mean"] for summary in of.values()])
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
    return between(quantity, "%", least, most, mean(costs.values()), note=note)


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
