"""Prefix caches on Mooncake's traces: the hit rate as the cache grows, towards that of a cache without end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from kvarena.engine.errors import ConfigError
from kvarena.experiments.studies.base import Chart, Findings, Series
from kvarena.experiments.studies.cells import CellRunner
from kvarena.experiments.studies.claims import Claim, at_least, at_most, check, measured, within
from kvarena.experiments.studies.papers.published import ENDLESS_HITS, ENDLESS_SOURCE
from kvarena.experiments.workloads.mooncake import MooncakeWorkload
from kvarena.reports.reading.files import read_run

ALLOCATORS = {"paged_prefix": "paged_prefix (hash chain)", "radix": "radix (tree)"}
VOCAB_SIZE = 1000  # of the workload that only counts hash ids


@dataclass(frozen=True)
class RadixHitsStudy:
    """Args:
    path: a Mooncake trace.
    num_requests: how many of its requests run, from the start.
    num_slots: sizes of the pool in tokens that the card can hold, rising.
    beyond_slots: further sizes, rising, that it cannot: they show where the hit rate ends.
    block_size: in tokens; hits are whole blocks.
    max_total_len: prompt + output in tokens; a longer request is left out, as in the cells.
    near: the largest cache of all must come so close to the endless one, in percentage points.

    Raises:
        ConfigError: no path, or sizes that do not rise.
    """

    path: str | None
    num_requests: int
    num_slots: Sequence[int]
    beyond_slots: Sequence[int]
    block_size: int
    max_total_len: int
    near: float

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigError("study.path is empty; give a Mooncake trace: study.path=FILE.jsonl")
        if not self.num_slots or len(self._sizes) < 2 or self._sizes != sorted(set(self._sizes)):
            raise ConfigError(
                f"study.num_slots={list(self.num_slots)} and then study.beyond_slots={list(self.beyond_slots)} must be "
                "at least two sizes that rise"
            )

    @property
    def _sizes(self) -> list[int]:
        return [*self.num_slots, *self.beyond_slots]

    def run(self, cells: CellRunner) -> Findings:
        """See `Study.run`."""
        assert self.path
        whole = self._block_hits()
        hits, total = self._trace(self.num_requests, self.max_total_len).token_hits(self.block_size)
        endless = 100 * hits / total
        found_of = {name: [self._cell(cells, name, size) for size in self._sizes] for name in ALLOCATORS}
        rates = {name: [100 * float(one["cached_prompt_share"]) for one in of] for name, of in found_of.items()}
        most = {name: [one["cache_share_of_optimum"] for one in of] for name, of in found_of.items()}
        kv_bytes = int(read_run(cells.folders[-1]).manifest["model"]["kv_bytes_per_token"])
        held = len(self.num_slots) - 1
        found = ", ".join(f"{name} {of[held]:.1f} %" for name, of in rates.items())
        return Findings(
            title=f"Prefix caches on a Mooncake trace: {Path(self.path).name}",
            headline=f"With the largest pool that the card holds ({self._size(self.num_slots[-1], kv_bytes)}) a prefix "
            f"cache finds this share of the prompt tokens of the first {self.num_requests:,} requests: {found}; a "
            f"cache without end would find {endless:.1f} %.",
            source=ENDLESS_SOURCE,
            claims=[
                *self._measured(rates, most, endless, kv_bytes),
                self._whole_claim(whole),
                *self._checks(rates, endless),
            ],
            charts=[self._chart(rates, endless)],
            differences=[
                "The stated value counts blocks of 512 tokens over the whole file, partial ones included; the caches "
                f"count tokens in whole blocks of {self.block_size} over the requests that ran.",
                "SGLang's paper states hit rates of its own workloads, which are not these traces; no value of it is "
                "compared.",
                *self._beyond(kv_bytes),
                "One simulated engine; Mooncake's own cache spans the DRAM and SSD of a cluster.",
            ],
            notes=[
                "One trace, replayed: no seed changes a hit rate, so there is no interval.",
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

    def _cell(self, cells: CellRunner, allocator: str, num_slots: int) -> dict[str, Any]:
        return cells.run(
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

    def _whole_claim(self, ours: float) -> Claim:
        stated = ENDLESS_HITS.get(Path(self.path or "").name)
        quantity = "block hit rate of a cache without end, whole file"
        if stated is None:
            return measured(quantity, "%", ours, note="no count of this file to hold it against")
        note = "an independent script's count, so that the file is read as meant; the paper states none"
        return check(within(quantity, "%", stated, ours, 0.05, note=note))

    @staticmethod
    def _size(num_slots: int, kv_bytes: int) -> str:
        return f"{num_slots:,} tokens, {num_slots * kv_bytes / 1e9:,.0f} GB"

    def _beyond(self, kv_bytes: int) -> list[str]:
        if not self.beyond_slots:
            return []
        sizes = "; ".join(self._size(size, kv_bytes) for size in self.beyond_slots)
        return [f"Larger pools than the card holds ({sizes}) are there to show where the hit rate ends, no more."]

    def _measured(
        self, rates: dict[str, list[float]], most: dict[str, list[float | None]], endless: float, kv_bytes: int
    ) -> list[Claim]:
        claims = []
        for place, size in enumerate(self._sizes):
            note = "" if size in self.num_slots else "more than the card holds"
            for name, of in rates.items():
                quantity = f"{name}, {self._size(size, kv_bytes)}: hit rate"
                share = f"{of[place] / endless:.0%} of the cache without end" if endless else ""
                bound = most[name][place]
                best = "" if bound is None else f"{bound:.0%} of Belady's MIN in its order"
                claims.append(measured(quantity, "%", of[place], note="; ".join(filter(None, (share, best, note)))))
        return claims

    def _checks(self, rates: dict[str, list[float]], endless: float) -> list[Claim]:
        claims = []
        for name, of in rates.items():
            quantity = f"{name}, {self._sizes[-1]:,} tokens: hit rate against the cache without end"
            claims += [
                within(quantity, "%", endless, of[-1], self.near),
                at_most(f"{name}: largest hit rate of all sizes", "%", endless, max(of), note="none can find more"),
                at_least(f"{name}: least gain from one size to the next", "points", 0.0,
                         min(after - before for before, after in pairwise(of)), note="a larger cache finds no less"),
            ]  # fmt: skip
        return [check(claim) for claim in claims]

    def _chart(self, rates: dict[str, list[float]], endless: float) -> Chart:
        sizes = [size / 1e6 for size in self._sizes]
        series = [Series(ALLOCATORS[name], sizes, of) for name, of in rates.items()]
        caption = (
            f"Prompt tokens found in the cache, first {self.num_requests:,} requests. The card holds pools of up to "
            f"{self.num_slots[-1] / 1e6:g} million tokens. The dotted line is a cache without end; where one line "
            "shows, both caches find the same."
        )
        x, y = "KV pool (millions of tokens)", "hit rate (% of prompt tokens)"
        mark = "a cache without end"
        return Chart("hit_rate", "lines", x, y, caption, series, log_x=True, y_mark=endless, y_mark_name=mark)
