"""Prefix caches on Mooncake's traces: the hit rate as the cache grows, towards that of a cache without end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from engine.errors import ConfigError
from experiments.studies.base import Chart, Claim, Findings, Series, Verdict, at_least, at_most, within
from experiments.studies.cells import CellRunner
from experiments.studies.published import ENDLESS_HITS, ENDLESS_SOURCE
from experiments.workloads.mooncake import MooncakeWorkload

ALLOCATORS = {"paged_prefix": "paged_prefix (hash chain)", "radix": "radix (tree)"}
VOCAB_SIZE = 1000  # of the workload that only counts hash ids


@dataclass(frozen=True)
class RadixHitsStudy:
    """Args:
    path: a Mooncake trace.
    num_requests: how many of its requests run, from the start.
    num_slots: sizes of the pool in tokens, rising.
    block_size: in tokens; hits are whole blocks.
    max_total_len: prompt + output in tokens; a longer request is left out, as in the cells.
    near: the largest cache must come so close to the endless one, in percentage points.

    Raises:
        ConfigError: no path, or sizes that do not rise.
    """

    path: str | None
    num_requests: int
    num_slots: Sequence[int]
    block_size: int
    max_total_len: int
    near: float

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigError("study.path is empty; give a Mooncake trace: study.path=FILE.jsonl")
        if len(self.num_slots) < 2 or list(self.num_slots) != sorted(set(self.num_slots)):
            raise ConfigError(f"study.num_slots={list(self.num_slots)} must be at least two sizes that rise")

    def run(self, cells: CellRunner) -> Findings:
        """See `Study.run`."""
        assert self.path
        whole = self._block_hits()
        hits, total = self._trace(self.num_requests, self.max_total_len).token_hits(self.block_size)
        endless = 100 * hits / total
        rates = {name: [self._rate(cells, name, size) for size in self.num_slots] for name in ALLOCATORS}
        last = ", ".join(f"{name} {of[-1]:.1f} %" for name, of in rates.items())
        return Findings(
            title=f"Prefix caches on a Mooncake trace: {Path(self.path).name}",
            headline=f"A cache without end would find {endless:.1f} % of the prompt tokens of the first "
            f"{self.num_requests:,} requests; at {self.num_slots[-1]:,} tokens: {last}.",
            source=ENDLESS_SOURCE,
            claims=[self._whole_claim(whole), *self._claims(rates, endless)],
            charts=[self._chart(rates, endless)],
            differences=[
                "The stated value counts blocks of 512 tokens over the whole file, partial ones included; the caches "
                f"count tokens in whole blocks of {self.block_size} over the requests that ran.",
                "SGLang's paper states hit rates of its own workloads, which are not these traces; no value of it is "
                "compared.",
                "One simulated engine; Mooncake's own cache spans the DRAM and SSD of a cluster.",
            ],
            notes=[
                "Hit rate: prompt tokens found in the cache at a request's first admission, over all prompt tokens. "
                "The pool also holds what runs, so the cache is what is left of it.",
                "Requests arrive at the trace's times and run first come first served. Prompts share tokens exactly "
                "where the trace's hash ids agree; generated tokens are in the cache too, and nobody asks for them.",
                f"A request of more than {self.max_total_len:,} tokens is left out of both, and the next one is taken.",
                "The endless cache knows a prompt as soon as it arrives; a real one when it is computed. So two "
                "requests that run side by side find less.",
            ],
        )

    def _trace(self, num_requests: int | None, max_total_len: int | None) -> MooncakeWorkload:
        return MooncakeWorkload(
            path=self.path, num_requests=num_requests, max_total_len=max_total_len, seed=0, vocab_size=VOCAB_SIZE
        )

    def _block_hits(self) -> float:
        hits, total = self._trace(None, None).block_hits()
        return 100 * hits / total

    def _rate(self, cells: CellRunner, allocator: str, num_slots: int) -> float:
        summary = cells.run(
            f"{allocator}-{num_slots}",
            [
                f"allocator={allocator}",
                f"allocator.block_size={self.block_size}",
                f"kv_cache.num_slots={num_slots}",
                f"workload.path={Path(self.path or '').resolve()}",
                f"workload.num_requests={self.num_requests}",
                f"workload.max_total_len={self.max_total_len}",
            ],
        )
        return 100 * float(summary["cached_prompt_share"])

    def _whole_claim(self, ours: float) -> Claim:
        stated = ENDLESS_HITS.get(Path(self.path or "").name)
        quantity = "block hit rate of a cache without end, whole file"
        if stated is None:
            return Claim(quantity, "%", None, ours, "not stated for this file", Verdict.NOT_COMPARABLE)
        return within(quantity, "%", stated, ours, 0.05, note="checks that the file is read as meant")

    def _claims(self, rates: dict[str, list[float]], endless: float) -> list[Claim]:
        claims = []
        for name, of in rates.items():
            size = self.num_slots[-1]
            quantity = f"{name}, {size:,} tokens: hit rate against the cache without end"
            claims += [
                within(quantity, "%", endless, of[-1], self.near),
                at_most(f"{name}: largest hit rate of all sizes", "%", endless, max(of), note="none can find more"),
                at_least(f"{name}: least gain from one size to the next", "points", 0.0,
                         min(after - before for before, after in pairwise(of)), note="a larger cache finds no less"),
            ]  # fmt: skip
        return claims

    def _chart(self, rates: dict[str, list[float]], endless: float) -> Chart:
        sizes = [size / 1e6 for size in self.num_slots]
        series = [Series(ALLOCATORS[name], sizes, of) for name, of in rates.items()]
        caption = (
            f"Prompt tokens found in the cache, first {self.num_requests:,} requests. The dotted line is a cache "
            "without end; where one line shows, both caches find the same."
        )
        x, y = "KV pool (millions of tokens)", "hit rate (% of prompt tokens)"
        return Chart("hit_rate", "lines", x, y, caption, series, log_x=True, y_mark=endless)
