"""vAttention: virtual contiguity beside paged blocks, and what the size of a physical page costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from experiments.studies.base import Chart, Claim, Findings, Series, Verdict, at_least, within
from experiments.studies.cells import CellRunner
from experiments.studies.memory_use import MemoryUse, memory_use
from experiments.studies.published import VATTENTION_SOURCE, VATTENTION_SPEEDUP
from reports.style import CLASS_LOOKS
from reports.windows import ROOM

KIB = 1024


@dataclass(frozen=True)
class VAttentionStudy:
    """Args:
    page_kib: sizes of a physical page in KiB, rising.
    kv_tensors: tensors that a token's KV is spread over: 2 for each layer.
    as_good: throughput of the smallest pages over that of paged blocks, at least.
    """

    page_kib: Sequence[int]
    kv_tensors: int
    as_good: float

    def run(self, cells: CellRunner) -> Findings:
        """See `Study.run`."""
        names = ["paged", *(f"virtual-{kib}" for kib in self.page_kib), "sliced"]
        summaries: dict[str, dict[str, Any]] = {}
        uses: dict[str, MemoryUse] = {}
        for name in names:
            summaries[name] = cells.run(name, self._overrides(name))
            uses[name] = memory_use(cells.folders[-1])
        rates = {name: summary["output_tokens_per_second"] / summaries["paged"]["output_tokens_per_second"]
                 for name, summary in summaries.items()}  # fmt: skip
        token_bytes = summaries["paged"]["model"]["kv_bytes_per_token"]
        pages = {name: self._page_tokens(name, token_bytes) for name in names}
        first, last = f"virtual-{self.page_kib[0]}", f"virtual-{self.page_kib[-1]}"
        labels = {name: _label(name, pages[name]) for name in names}
        return Findings(
            title="vAttention: virtual contiguity beside paged blocks",
            headline=f"With pages of {self.page_kib[0]} KiB ({pages[first]:g} tokens) virtual regions serve "
            f"{rates[first]:.2f} times the throughput of paged blocks, with {self.page_kib[-1]:,} KiB "
            f"({pages[last]:,g} tokens) {rates[last]:.2f} times; token states fill "
            f"{uses[first].token_states.value:.0f} and {uses[last].token_states.value:.0f} % of the pool.",
            source=VATTENTION_SOURCE,
            claims=self._claims(rates, uses, pages, first, last),
            charts=[_split_chart(uses, labels), _batch_chart(uses, labels)],
            differences=[
                "The simulator gives both the same kernel, so this shows capacity alone. The paper's gain of up to "
                f"{VATTENTION_SPEEDUP:g} times over paged kernels is a kernel's: measured on one H100, a block table "
                "costs 1 to 2 % with our kernels (docs/strategies.md).",
                "Mapping a page takes no time here; on a GPU it does (docs/gpu.md, mapped memory).",
                "Pages below 2 MiB need the paper's driver; CUDA's own is 2 MiB. The simulator only counts them.",
            ],
            notes=[
                f"A Llama-3.1-8B shape, {token_bytes:,} bytes of KV a token over {self.kv_tensors} tensors (K and V of "
                "each layer), each mapped by pages of its own; “side by side” has all layers of K, and of V, in one "
                "tensor (the paper's tensor slicing), with pages of 2 MiB.",
                f"Means over step time {ROOM.phrase}; intervals are 95 %, by batch means.",
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

    def _claims(
        self, rates: dict[str, float], uses: dict[str, MemoryUse], pages: dict[str, float], first: str, last: str
    ) -> list[Claim]:
        def batch(name: str) -> float:
            return uses[name].batch.value

        ablation = [f"virtual-{kib}" for kib in self.page_kib]
        steps = [batch(small) / batch(large) for small, large in pairwise(ablation)]
        waste = uses[last].shares["internal"] + uses[last].shares["reservation"]
        return [
            at_least(f"throughput over paged blocks, pages of {self.page_kib[0]} KiB", "times", self.as_good,
                     rates[first], note="capacity is no loss where pages are small"),
            at_least("mean batch of a page size over that of the next larger, least of all", "times", 1.0,
                     min(steps), note="larger pages hold fewer requests"),
            within("throughput side by side over pages of the same tokens in each layer", "times", rates[first],
                   rates["sliced"], 0.02, note=f"{pages['sliced']:g} and {pages[first]:g} tokens in a page"),
            at_least(f"pool that is owned and empty, pages of {self.page_kib[-1]:,} KiB", "%", 10.0, waste,
                     note="about half a page for each request; 10 % is our reading of “significant”"),
            Claim("speed of the kernel over a paged kernel", "times", VATTENTION_SPEEDUP, None, "up to",
                  Verdict.NOT_COMPARABLE, note="a simulator has no kernels"),
        ]  # fmt: skip


def _label(name: str, tokens: float) -> str:
    kind = {"paged": "paged, 16 tokens", "sliced": "virtual, 2,048 KiB side by side"}.get(name)
    return kind or f"virtual, {int(name.removeprefix('virtual-')):,} KiB ({tokens:,g} tokens)"


def _split_chart(uses: dict[str, MemoryUse], labels: dict[str, str]) -> Chart:
    series = [
        Series(look.label, list(labels.values()), [use.shares[key] for use in uses.values()])
        for key, look in CLASS_LOOKS.items()
        if any(use.shares[key] > 0 for use in uses.values())
    ]
    caption = f"Mean split of KV memory {ROOM.phrase}."
    return Chart("kv_split", "stacked", "mean share of the KV pool (%)", "", caption, series)


def _batch_chart(uses: dict[str, MemoryUse], labels: dict[str, str]) -> Chart:
    names = [label.replace(", ", "\n").replace(" (", "\n(").replace(" side", "\nside") for label in labels.values()]
    means = [use.batch for use in uses.values()]
    series = Series("batch", names, [m.value for m in means], [m.low for m in means], [m.high for m in means])
    caption = "Mean number of requests in a step: what fits at the same time."
    return Chart("batch", "bars", "", "requests in a step", caption, [series])
