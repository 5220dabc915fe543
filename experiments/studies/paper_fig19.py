"""PagedAttention, Figure 19: what preemption costs by recomputation and by swapping, for every block size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from engine.errors import ConfigError
from engine.runner.step_time import RooflineStepTime, StepFeatures
from experiments.studies.base import Chart, Claim, Findings, Series, Verdict, at_most, near
from experiments.studies.cells import CellRunner
from experiments.studies.orca import DIFFERENCES, Load, run_system
from experiments.studies.published import COMPARABLE_BLOCK_SIZES, FIGURE_19_SOURCE, RECOMPUTE_OVER_SWAP
from experiments.studies.recorded import SWAP_LINES, device_of, read_lines
from reports.files import read_run

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


@dataclass(frozen=True)
class PaperFig19Study:
    """Args:
    block_sizes: in slots, rising; at least one that the paper calls comparable.
    num_tokens: of the request of (a).
    rate: requests per second of (b), at which memory is scarce.
    num_requests: how many arrive.
    swap_gib: host memory for KV, in GiB.
    near: latencies are comparable if they differ by at most this share.
    swaps: lines of `experiments.benchmarks.swaps`; None takes those recorded on one H100.

    Raises:
        ConfigError: a number out of range, or block sizes that do not rise.
    """

    block_sizes: Sequence[int]
    num_tokens: int
    rate: float
    num_requests: int
    swap_gib: float
    near: float
    swaps: str | None = None

    def __post_init__(self) -> None:
        for key in ("num_tokens", "rate", "num_requests", "swap_gib", "near"):
            if not getattr(self, key) > 0:
                raise ConfigError(f"study.{key}={getattr(self, key)} must be above 0")
        sizes = list(self.block_sizes)
        if len(sizes) < 2 or sizes != sorted(set(sizes)):
            raise ConfigError(f"study.block_sizes={sizes} must be at least two sizes that rise")

    def run(self, cells: CellRunner) -> Findings:
        """See `Study.run`."""
        found: dict[str, dict[int, dict[str, Any]]] = {mode: {} for mode in MODES}
        costs: dict[int, Cost] = {}
        for size in self.block_sizes:
            for mode, summaries in found.items():
                summaries[size] = self._run(cells, mode, size)
            costs[size] = self._cost(read_run(cells.folders[-1]).manifest["simulation"], size)
        lines = read_lines(self.swaps, SWAP_LINES)
        claims = [*_cost_claims(costs), *_measured_claims(lines), *self._latency_claims(found)]
        held = sum(claim.verdict is Verdict.HOLDS for claim in claims)
        judged = sum(claim.verdict in (Verdict.HOLDS, Verdict.DIFFERS) for claim in claims)
        return Findings(
            title="PagedAttention, Figure 19: recomputation and swapping",
            headline=f"{held} of {judged} statements hold. {_cheaper(costs)}",
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
                f"have it: ours are {self.rate:g} requests/s and {self.num_tokens:,} tokens.",
            ],
            notes=[
                f"(a) A request of {self.num_tokens:,} tokens: one step that computes them all, against moving its "
                "blocks out and in, from the step times of the cells.",
                f"(b) The same requests under both, last-arrived preempted first, {self.swap_gib:g} GiB of host "
                f"memory. Comparable: within {self.near:.0%} of one another (our reading).",
            ],
        )

    def _run(self, cells: CellRunner, mode: str, size: int) -> dict[str, Any]:
        load = Load("sharegpt", self.rate, self.num_requests)
        more = [f"allocator.block_size={size}", f"scheduler.preemption={mode}"]
        if mode == "swap":
            more.append(f"allocator.swap_gib={self.swap_gib}")
        return run_system(cells, "vLLM", load, *more, label=f"block{size}-{mode}")

    def _cost(self, simulation: Mapping[str, Any], size: int) -> Cost:
        if simulation["kind"] != "analytic":
            raise ConfigError("experiment=paper_fig19 needs a card's profile: set runner.profile=a100-40gb, h100, ...")
        seconds = RooflineStepTime(**simulation["step_time"])
        tokens, num_blocks = self.num_tokens, -(-self.num_tokens // size)
        prompt = StepFeatures(tokens, 0, tokens, tokens * (tokens + 1) // 2, 0, 1)
        # Out and in again.
        return Cost(seconds(prompt), 2 * num_blocks * seconds.per_copied_block)

    def _latency_claims(self, found: dict[str, dict[int, dict[str, Any]]]) -> list[Claim]:
        least, most = COMPARABLE_BLOCK_SIZES
        claims = []
        for size in self.block_sizes:
            ours = {mode: of[size] for mode, of in found.items()}
            latency = {mode: of[METRIC]["mean"] for mode, of in ours.items()}
            ratio = latency["swap"] / latency["recompute"]
            quantity = f"(b) block size {size}: latency, swapping over recomputation"
            note = ", ".join(
                f"{name} {latency[mode]:.3f} s/token, {ours[mode]['num_preemptions']:,} preemptions"
                for mode, name in MODES.items()
            )
            if least <= size <= most:
                claims.append(near(quantity, "times", 1.0, ratio, self.near, note=f"paper: comparable; {note}"))
            else:
                claims.append(Claim(quantity, "times", None, ratio, "not stated", Verdict.MEASURED, note=note))
        return claims

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

    def _latency_chart(self, found: dict[str, dict[int, dict[str, Any]]]) -> Chart:
        sizes = [float(size) for size in self.block_sizes]
        series = [
            Series(MODES[mode], sizes, [of[size][METRIC]["mean"] for size in self.block_sizes])
            for mode, of in found.items()
        ]
        caption = f"(b) Mean normalised latency, ShareGPT at {self.rate:g} requests/s, by block size."
        return Chart(
            "latency", "lines", "block size (slots)", "normalised latency (s/token)", caption, series, log_x=True
        )


def swap_times(lines: Sequence[Mapping[str, Any]], num_tokens: int) -> dict[int, float]:
    """Block size -> milliseconds out and in again, mean of the repeats with so many tokens."""
    times: dict[int, list[float]] = {}
    for line in lines:
        if line.get("num_tokens") == num_tokens:
            times.setdefault(line["block_size"], []).append((line["swap_out_us"] + line["swap_in_us"]) / 1e3)
    return {size: mean(of) for size, of in times.items()}


def _cost_claims(costs: dict[int, Cost]) -> list[Claim]:
    recompute = [cost.recompute for cost in costs.values()]
    over = {size: cost.recompute / cost.swap for size, cost in costs.items()}
    worst = max(over, key=lambda size: over[size])
    note = f"largest at block size {worst}: {1e3 * costs[worst].recompute:.1f} ms, {1e3 * costs[worst].swap:.1f} ms"
    return [
        at_most("(a) recomputation: most over least of all block sizes", "times", FLAT, max(recompute) / min(recompute),
                note="paper: the same for all; 5 % is our reading"),
        at_most("(a) recomputation over swapping, largest of all block sizes", "times", RECOMPUTE_OVER_SWAP,
                over[worst], note=note),
    ]  # fmt: skip


def _measured_claims(lines: Sequence[Mapping[str, Any]]) -> list[Claim]:
    """How much longer small blocks take to swap than large ones, as recorded on a GPU."""
    quantity = "(a) swapping, smallest over largest block size, on a GPU"
    tokens = next((line["num_tokens"] for line in lines if "num_tokens" in line), None)
    if tokens is None:
        return [Claim(quantity, "times", None, None, "not stated", Verdict.NOT_COMPARABLE, note="no lines recorded")]
    times = swap_times(lines, tokens)
    small, large = min(times), max(times)
    note = f"{device_of(lines)}, {tokens:,} tokens: {times[small]:.1f} ms at {small}, {times[large]:.1f} ms at {large}"
    return [Claim(quantity, "times", None, times[small] / times[large], "not stated", Verdict.MEASURED, note=note)]


def _cheaper(costs: dict[int, Cost]) -> str:
    by_swap = [str(size) for size, cost in costs.items() if cost.swap < cost.recompute]
    if not by_swap:
        return "Recomputing a request costs less than swapping it at every block size."
    if len(by_swap) == len(costs):
        return "Swapping a request costs less than recomputing it at every block size."
    return f"Swapping a request costs less than recomputing it at block sizes {', '.join(by_swap)}."
