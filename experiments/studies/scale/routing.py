"""Routers on a Mooncake trace: what each one's replicas find in their caches, beside one cache as large as all of them.

study.path --> for each router a run on `num_replicas` simulated replicas
           --> one run on a card that is `num_replicas` times as large and as fast: one cache for all
           --> a cache without end, counted over the trace itself
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvarena.engine.checks import check_int
from kvarena.engine.errors import ConfigError
from kvarena.experiments.simulation.profiles import Card, load_profile, write_profile
from kvarena.experiments.studies.base import Chart, Findings, Series
from kvarena.experiments.studies.cells import CellRunner
from kvarena.experiments.studies.claims import Claim, at_most, check, measured
from kvarena.experiments.workloads.mooncake import MooncakeWorkload
from kvarena.reports.analysis.replicas import DEFINITION

VOCAB_SIZE = 128256  # token counts do not depend on it
WHOLE = "one cache"


@dataclass
class RoutingStudy:
    """Which router finds the most, and at what price.

    Args:
        path: a Mooncake trace.
        num_requests: from its start; None: all.
        num_replicas: of each router.
        routers: by name.
        profile: a card; the one cache is on a card of `num_replicas` times its figures.
        num_slots: of a replica's pool.
        block_size: tokens; hits are whole blocks.
        max_total_len: prompt + output in tokens; longer requests are left out.

    Raises:
        ConfigError: no trace, no router, or a profile that is no card.
    """

    path: str | None
    num_requests: int | None
    num_replicas: int
    routers: Sequence[str]
    profile: str
    num_slots: int
    block_size: int
    max_total_len: int

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigError("study.path is empty; give a Mooncake trace: study.path=FILE.jsonl")
        if not self.routers:
            raise ConfigError("study.routers is empty; name routers, such as [round_robin,kv_exact]")
        check_int("study.num_replicas", self.num_replicas, 2)

    def run(self, cells: CellRunner) -> Findings:
        """See `Study.run`."""
        assert self.path
        trace = MooncakeWorkload(path=self.path, num_requests=self.num_requests, max_total_len=self.max_total_len,
                                 seed=0, vocab_size=VOCAB_SIZE)  # fmt: skip
        hits, total = trace.token_hits(self.block_size)
        endless = 100 * hits / total
        whole = self._whole(cells)
        found = {name: cells.run(name, [*self._cell(), f"router={name}", f"router.num_replicas={self.num_replicas}"])
                 for name in self.routers}  # fmt: skip
        rates = {name: _hit_rate(summary) for name, summary in (found | {WHOLE: whole}).items()}
        best = max(self.routers, key=rates.__getitem__)
        return Findings(
            title=f"Routers over {self.num_replicas} simulated replicas on a Mooncake trace: {Path(self.path).name}",
            headline=f"Of {whole['num_requests']:,} requests' prompt tokens {best} finds {rates[best]:.1f} % in the "
            f"replicas' caches, one cache of {self.num_replicas} times the size {rates[WHOLE]:.1f} %, and a cache "
            f"without end would find {endless:.1f} %.",
            source="Nobody states these numbers: the routers beside one another, one cache as large as all, and the "
            "count of a cache without end.",
            claims=[*self._rows(found, whole, rates), *self._checks(rates, endless)],
            charts=self._charts(found, whole, rates, endless),
            differences=[
                f"The one cache belongs to a card of {self.num_replicas} times the memory, bandwidth and operations of "
                "each replica's, which no one sells: it has no queue of its own, and no request is computed twice.",
                "A router sees what a cache holds at once (kv_exact); KV events take a step or two to arrive.",
            ],
            notes=[
                f"Arrivals: {cells.config().arrival.settings.get('speed', 1.0):g} times as fast as the trace has them, "
                f"{whole['num_requests'] / whole['duration_seconds']:.1f} requests per second.",
                f"Each replica: {self.num_slots:,} slots of KV, what an H200 holds beside the weights of an 8B model.",
                "One trace, replayed: no seed changes it but that of power_of_two's draws, so there are no intervals.",
                DEFINITION,
            ],
        )

    def _cell(self) -> list[str]:
        number = "null" if self.num_requests is None else str(self.num_requests)
        return [
            f"allocator.block_size={self.block_size}",
            f"kv_cache.num_slots={self.num_slots}",
            f"workload.path={Path(self.path or '').resolve()}",
            f"workload.num_requests={number}",
            f"workload.max_total_len={self.max_total_len}",
        ]

    def _whole(self, cells: CellRunner) -> dict[str, Any]:
        """The run on one large card."""
        card, times = load_profile(self.profile), self.num_replicas
        if not isinstance(card, Card):
            raise ConfigError(f"study.profile={self.profile} must be a card, whose figures can be multiplied")
        larger = replace(
            card, source=f"{times} times the figures of {self.profile}: {card.source}", collectives=None,
            memory_bytes=times * card.memory_bytes, bandwidth=times * card.bandwidth, flops=times * card.flops,
            layer_gap=card.layer_gap / times, copy_bandwidth=times * card.copy_bandwidth,
        )  # fmt: skip
        path = cells.out_dir / "profiles" / f"{Path(self.profile).stem}-x{times}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_profile(larger, path)
        scheduler = cells.config(self._cell()).scheduler
        larger_batches = [
            f"scheduler.{key}={times * scheduler.need(key)}" for key in ("max_num_seqs", "max_num_batched_tokens")
        ]
        size = [f"kv_cache.num_slots={times * self.num_slots}", f"runner.profile={path.resolve()}"]
        return cells.run("one-cache", [*self._cell(), *size, *larger_batches])

    def _rows(self, found: dict[str, Any], whole: dict[str, Any], rates: dict[str, float]) -> list[Claim]:
        claims = []
        for name, summary in (found | {WHOLE: whole}).items():
            share = "" if name == WHOLE else f"{rates[name] / rates[WHOLE]:.0%} of the one cache"
            bound = summary["cache_share_of_optimum"]
            best = "" if bound is None else f"{bound:.0%} of Belady's MIN, in each replica's order"
            note = "; ".join(filter(None, (share, best)))
            claims.append(measured(f"{name}: hit rate", "%", rates[name], note=note))
            if summary["imbalance"] is not None:
                claims.append(measured(f"{name}: imbalance", "", summary["imbalance"], note="busiest / mean"))
            goodput = summary["slo"]["whole_run"]["good_requests_per_second"]
            claims += [
                measured(f"{name}: goodput", "requests/s", goodput, note=summary["slo"]["goal"]),
                measured(f"{name}: TTFT, p99", "s", summary["ttft_seconds"]["p99"]),
            ]
        return claims

    def _checks(self, rates: dict[str, float], endless: float) -> list[Claim]:
        best = max(rates.values())
        return [
            check(at_most("largest hit rate of all", "%", endless, best, note="none finds more than one without end"))
        ]

    def _charts(
        self, found: dict[str, Any], whole: dict[str, Any], rates: dict[str, float], endless: float
    ) -> list[Chart]:
        names = [*self.routers, WHOLE]
        goodput = [(found | {WHOLE: whole})[name]["slo"]["whole_run"]["good_requests_per_second"] for name in names]
        of = f"{whole['num_requests']:,} requests over {self.num_replicas} simulated replicas"
        return [
            Chart("hit_rate", "bars", "", "hit rate (% of prompt tokens)",
                  f"Prompt tokens found in a prefix cache, {of}. The dotted line is a cache without end.",
                  [Series("hit rate", names, [rates[name] for name in names])],
                  y_mark=endless, y_mark_name="a cache without end"),
            Chart("goodput", "bars", "", "goodput (requests/s)",
                  f"Requests that kept both limits, per second, {of} ({whole['slo']['goal']}).",
                  [Series("goodput", names, goodput)]),
            Chart("imbalance", "bars", "", "imbalance (busiest / mean)",
                  f"Tokens that the busiest replica computed, over the mean, {of}; 1 is even.",
                  [Series("imbalance", list(self.routers), [found[name]["imbalance"] for name in self.routers])],
                  y_mark=1.0, y_mark_name="even"),
        ]  # fmt: skip


def _hit_rate(summary: dict[str, Any]) -> float:
    return 100 * float(summary["cached_prompt_share"] or 0.0)
