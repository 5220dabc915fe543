"""vAttention: virtual contiguity beside paged blocks, and what the size of a physical page costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from kvarena.engine.errors import ConfigError
from kvarena.experiments.studies.base import Chart, Findings, mean_series, split_chart
from kvarena.experiments.studies.cells import CellRunner
from kvarena.experiments.studies.claims import Claim, Mean, at_least, check, compared, measured, up_to, within
from kvarena.experiments.studies.memory_use import (
    MemoryUse,
    class_shares,
    covered,
    memory_use,
    over_seeds,
    share_over_seeds,
    waiting,
)
from kvarena.experiments.studies.orca import seeds_text
from kvarena.experiments.studies.papers.published import VATTENTION_SOURCE, VATTENTION_SPEEDUP
from kvarena.reports.analysis.windows import WAITING

KIB = 1024
NEAR = 0.25  # of an “up to”: our limit


@dataclass(frozen=True)
class VAttentionStudy:
    """Args:
    page_kib: sizes of a physical page in KiB, rising.
    kv_tensors: tensors that a token's KV is spread over: 2 for each layer.
    as_good: throughput of the smallest pages over that of paged blocks, at least.
    seeds: of the workload.

    Raises:
        ConfigError: no seed, or fewer than two sizes.
    """

    page_kib: Sequence[int]
    kv_tensors: int
    as_good: float
    seeds: Sequence[int]

    def __post_init__(self) -> None:
        if not self.seeds or len(self.page_kib) < 2:
            raise ConfigError("study needs at least one of seeds and two of page_kib")

    def run(self, cells: CellRunner) -> Findings:
        """See `Study.run`."""
        names = ["paged", *(f"virtual-{kib}" for kib in self.page_kib), "sliced"]
        outputs: dict[str, list[float]] = {name: [] for name in names}
        uses: dict[str, list[MemoryUse]] = {name: [] for name in names}
        for name in names:
            for seed in self.seeds:
                summary = cells.run(f"{name}-seed{seed}", [*self._overrides(name), f"workload.seed={seed}"])
                outputs[name].append(summary["output_tokens_per_second"])
                uses[name].append(memory_use(cells.folders[-1], waiting))
        token_bytes = summary["model"]["kv_bytes_per_token"]
        rates = {name: Mean.of_ratios(outputs[name], outputs["paged"]) for name in names}
        pages = {name: self._page_tokens(name, token_bytes) for name in names}
        first, last = f"virtual-{self.page_kib[0]}", f"virtual-{self.page_kib[-1]}"
        labels = {name: _label(name, pages[name]) for name in names}
        filled = {name: share_over_seeds(uses[name], _token_states).value for name in names}
        return Findings(
            title="vAttention: virtual contiguity beside paged blocks",
            headline=f"By capacity alone, with pages of {self.page_kib[0]} KiB ({pages[first]:g} tokens) virtual "
            f"regions serve {rates[first].value:.2f} times the throughput of paged blocks, with "
            f"{self.page_kib[-1]:,} KiB ({pages[last]:,g} tokens) {rates[last].value:.2f} times; token states fill "
            f"{filled[first]:.0f} and {filled[last]:.0f} % of the pool. The paper's gain is a kernel's, and is not "
            "reproduced here.",
            source=VATTENTION_SOURCE,
            claims=[*self._measured(outputs, uses, labels), *self._checks(rates, uses, pages, first, last)],
            charts=[_split_chart(uses, labels), _batch_chart(uses, labels)],
            differences=[
                "The simulator gives both the same kernel, so this shows capacity alone. The paper's gain of up to "
                f"{VATTENTION_SPEEDUP:g} times over paged kernels is a kernel's. What a block table costs our own "
                "decode kernel is measured by experiment=paper_fig18.",
                "Mapping a page takes no time here; on a GPU it does (docs/gpu.md, mapped memory).",
                "Pages below 2 MiB need the paper's driver; CUDA's own is 2 MiB. The simulator only counts them.",
            ],
            notes=[
                f"A Llama-3.1-8B shape, {token_bytes:,} bytes of KV a token over {self.kv_tensors} tensors (K and V of "
                "each layer), each mapped by pages of its own; “side by side” has all layers of K, and of V, in one "
                "tensor (the paper's tensor slicing), with pages of 2 MiB.",
                f"Shares and batches are means over step time {WAITING.phrase}: "
                f"{covered([use for of in uses.values() for use in of])}. Throughput is of the whole run. "
                f"{seeds_text(self.seeds)} Ratios are taken seed by seed.",
            ],
        )

    def _overrides(self, name: str) -> list[str]:
        if name == "paged":
            return ["allocator=paged"]
        virtual = ["allocator=virtual"]
        if name == "sliced":
            return [*virtual, "allocator.kv_tensors=2", f"allocator.page_bytes={2048 * KIB}"]
        kib = int(name.removeprefix("virtual-"))
        return [*virtual, f"allocator.kv_tensors={self.kv_tensors}", f"allocator.page_bytes={kib * KIB}"]

    def _page_tokens(self, name: str, token_bytes: int) -> float:
        if name == "paged":
            return 16
        if name == "sliced":
            return 2 * 2048 * KIB / token_bytes
        return self.kv_tensors * int(name.removeprefix("virtual-")) * KIB / token_bytes

    def _measured(
        self, outputs: dict[str, list[float]], uses: dict[str, list[MemoryUse]], labels: dict[str, str]
    ) -> list[Claim]:
        note = "the kernel's speed: a simulator has none"
        claims = [up_to("throughput over a paged kernel", "times", VATTENTION_SPEEDUP, None, NEAR, note=note)]
        for name, label in labels.items():
            absolute = f"{Mean.of(outputs[name]).value:,.0f} tokens/s"
            if name != "paged":
                ratio = Mean.of_ratios(outputs[name], outputs["paged"])
                claims.append(compared(f"{label}: throughput over paged blocks", ratio, note=absolute))
            else:
                claims.append(measured(f"{label}: throughput", "tokens/s", Mean.of(outputs[name])))
            claims.append(measured(f"{label}: token states", "%", share_over_seeds(uses[name], _token_states)))
        return claims

    def _checks(
        self, rates: dict[str, Mean], uses: dict[str, list[MemoryUse]], pages: dict[str, float], first: str, last: str
    ) -> list[Claim]:
        batches = {name: [use.batch for use in of] for name, of in uses.items()}
        ablation = [batches[f"virtual-{kib}"] for kib in self.page_kib]
        steps = [Mean.of_ratios(small, large) for small, large in pairwise(ablation)]
        waste = share_over_seeds(uses[last], lambda use: use.shares["internal"] + use.shares["reservation"])
        apart = Mean.of_ratios(batches["sliced"], batches[first])
        claims = [
            at_least(f"throughput over paged blocks, pages of {self.page_kib[0]} KiB", "times", self.as_good,
                     rates[first], note="capacity is no loss where pages are small"),
            at_least("mean batch of a page size over that of the next larger, least of all", "times", 1.0,
                     min(steps, key=lambda mean: mean.value), note="larger pages hold fewer requests"),
            within("mean batch side by side over pages of the same tokens in each layer", "times", 1.0, apart, 0.02,
                   note=f"{pages['sliced']:g} and {pages[first]:g} tokens in a page"),
            at_least(f"pool that is owned and empty, pages of {self.page_kib[-1]:,} KiB", "%", 10.0, waste,
                     note="about half a page for each request; 10 % is our reading of “significant”"),
        ]  # fmt: skip
        return [check(claim) for claim in claims]


def _token_states(use: MemoryUse) -> float:
    return use.shares["token_states"]


def _label(name: str, tokens: float) -> str:
    kind = {"paged": "paged, 16 tokens", "sliced": "virtual, 2,048 KiB side by side"}.get(name)
    return kind or f"virtual, {int(name.removeprefix('virtual-')):,} KiB ({tokens:,g} tokens)"


def _split_chart(uses: dict[str, list[MemoryUse]], labels: dict[str, str]) -> Chart:
    names = list(labels.values())
    return split_chart(names, class_shares(uses.values()), f"Mean split of KV memory {WAITING.phrase}.")


def _batch_chart(uses: dict[str, list[MemoryUse]], labels: dict[str, str]) -> Chart:
    names = [label.replace(", ", "\n").replace(" (", "\n(").replace(" side", "\nside") for label in labels.values()]
    means = [over_seeds(of, lambda use: use.batch) for of in uses.values()]
    caption = f"Mean number of requests in a step {WAITING.phrase}: what fits at the same time."
    return Chart("batch", "bars", "", "requests in a step", caption, [mean_series("batch", names, means)])
