"""Eviction policies beside the optimum: policy x size x trace by plain replay, and in the simulated engine.

traces  --plain replay-->  hits of each policy, of MIN, of a cache without end      seconds of computing
first trace --engine-->    hits, share of the bound, prompt seconds saved, TTFT     with what runs in the pool
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from kvarena.engine.checks import check_number
from kvarena.engine.errors import ConfigError
from kvarena.experiments.caching.plain_replay import (
    Trace,
    endless_hits,
    num_distinct,
    numbered,
    replay_min,
    replay_policy,
)
from kvarena.experiments.settings.targets import instantiate
from kvarena.experiments.studies.base import Chart, Findings, Series
from kvarena.experiments.studies.cells import CellRunner
from kvarena.experiments.studies.claims import Claim, Mean, at_least, check, measured
from kvarena.experiments.workloads import Workload
from kvarena.experiments.workloads.mooncake import MooncakeWorkload

VOCAB_SIZE = 1000
LRU, MIN, ENDLESS = "lru", "MIN", "without end"
DEFAULT = "ageing"
NO_WORSE, POINTS = 0.98, 0.2  # of LRU's hits, or so many points
SOURCE = (
    "L. A. Belady, A study of replacement algorithms for a virtual-storage computer, 1966; the policies' sources stand "
    "in docs/strategies.md."
)


class Replayed(NamedTuple):
    """Hits of one trace at one size, in percent of the blocks of its later part, by policy; MIN among them."""

    trace: str
    num_blocks: int
    label: str
    hits: dict[str, float]


@dataclass(frozen=True)
class CachePoliciesStudy:
    """Args:
    paths: Mooncake traces; the first one runs in the engine, too.
    sizes: of the cache for these, in tokens.
    drawn: workloads that are drawn, each with its settings as on the command line.
    shares: sizes of the cache for these, in shares of their different blocks.
    block_size: tokens of a block of drawn workloads; a trace's have those of its hash ids.
    left_out: share of a trace, from its start, whose hits are not counted: there the default's constants were chosen.
    policies: by name.
    engine_requests: of the first trace in the simulated engine; 0: none.
    engine_slots: sizes of its pool, in tokens.
    load: requests per second, over those that LRU sustains.
    seeds: of the engine's runs: arrivals within a time stamp, and tokens.

    Raises:
        ConfigError: nothing to replay, or a number out of range.
    """

    paths: Sequence[str]
    sizes: Sequence[int]
    drawn: Mapping[str, Sequence[str]]
    shares: Sequence[float]
    block_size: int
    left_out: float
    policies: Sequence[str]
    engine_requests: int
    engine_slots: Sequence[int]
    load: float
    seeds: Sequence[int]

    def __post_init__(self) -> None:
        if not self.paths and not self.drawn:
            raise ConfigError("study.paths and study.drawn are empty; give Mooncake traces: study.paths=[FILE.jsonl]")
        if self.engine_requests and not self.paths:
            raise ConfigError("study.engine_requests runs a trace; give one in study.paths, or set it to 0")
        if LRU not in self.policies:
            raise ConfigError(f"study.policies={list(self.policies)} must have lru, which others are held against")
        if not 0 <= self.left_out < 1:
            raise ConfigError(f"study.left_out={self.left_out} must be a share below 1")
        check_number("study.load", self.load, above=True)

    def run(self, cells: CellRunner) -> Findings:
        """See `Study.run`."""
        replays = [one for name, workload in self._workloads(cells).items() for one in self._replay(name, workload)]
        engine, speeds = self._engine(cells)
        default = [one.hits[DEFAULT] / one.hits[LRU] for one in replays if DEFAULT in one.hits and one.hits[LRU]]
        gain = f" {DEFAULT} finds {min(default):.2f} to {max(default):.2f} times what LRU does." if default else ""
        return Findings(
            title="Eviction policies beside the optimum",
            headline=f"{len(self.policies)} policies at {len(replays)} sizes of traces' caches, by plain replay.{gain}",
            source=SOURCE,
            claims=[*engine, *self._measured(replays), *self._checks(replays)],
            charts=[self._chart(name, replays) for name in dict.fromkeys(one.trace for one in replays)],
            notes=[
                "Plain replay: a trace in its order, hits of leading blocks over all blocks, nothing running, the size "
                f"kept after each request. Counted from {self.left_out:.0%} of the requests on; the default's "
                "constants were chosen before that.",
                "MIN: Belady's optimum with bypass. It knows the future; for prefixes it is exact.",
                "In the engine the pool holds what runs beside the cache, requests arrive as in the trace (those of a "
                "time stamp spread over its bin), and each run has a bound of its own, for its own order.",
                *speeds,
            ],
        )

    # ------------------------------------------------------------ plain replays

    def _workloads(self, cells: CellRunner) -> dict[str, Workload]:
        found: dict[str, Workload] = {}
        for path in self.paths:
            found[Path(path).stem] = MooncakeWorkload(path=path, seed=0, vocab_size=VOCAB_SIZE)
        for name, settings in self.drawn.items():
            part = cells.config([f"workload={name.partition('-')[0]}", "arrival=all_at_once", *settings]).workload
            found[name] = instantiate(part, vocab_size=VOCAB_SIZE)
        return found

    def _replay(self, name: str, workload: Workload) -> list[Replayed]:
        table = workload.table
        times = None if table.arrival_times is None else table.arrival_times.tolist()
        if isinstance(workload, MooncakeWorkload):
            trace, tokens = numbered(workload.block_ids()), workload.hash_block_size
            sizes = [(size // tokens, f"{size / 1e6:g} M tokens") for size in self.sizes]
        else:
            trace, tokens = numbered(_chains(workload, self.block_size)), self.block_size
            distinct = num_distinct(trace)
            sizes = [(max(1, int(share * distinct)), f"{share:.0%} of the blocks") for share in self.shares]
        said = {"block_size": tokens, "times": times, "kinds": table.kinds}
        return [Replayed(name, size, label, self._hits(trace, size, said)) for size, label in sizes]

    def _hits(self, trace: Trace, num_blocks: int, said: Mapping[str, Any]) -> dict[str, float]:
        begin = int(len(trace) * self.left_out)
        total = sum(map(len, trace[begin:]))
        found = {name: replay_policy(trace, num_blocks, name, **said)[0] for name in self.policies}
        found |= {MIN: replay_min(trace, num_blocks), ENDLESS: endless_hits(trace)}
        return {name: 100 * float(hits[begin:].sum()) / total for name, hits in found.items()}

    def _measured(self, replays: Sequence[Replayed]) -> list[Claim]:
        claims = []
        for one in replays:
            for name in (*self.policies, MIN):
                ratio = f"{one.hits[name] / one.hits[LRU]:.2f} x LRU, " if one.hits[LRU] else ""
                share = f"{one.hits[name] / one.hits[MIN]:.0%} of MIN" if one.hits[MIN] else ""
                quantity = f"{one.trace}, {one.label} ({one.num_blocks:,} blocks), {name}: hits"
                claims.append(measured(quantity, "%", one.hits[name], note=ratio + share))
        return claims

    def _checks(self, replays: Sequence[Replayed]) -> list[Claim]:
        claims = []
        for one in replays:
            most = max(one.hits[name] for name in self.policies)
            quantity = f"{one.trace}, {one.label}: MIN less the best policy"
            claims.append(at_least(quantity, "points", 0.0, one.hits[MIN] - most, note="none finds more"))
            if DEFAULT in one.hits:
                bar = min(NO_WORSE * one.hits[LRU], one.hits[LRU] - POINTS)
                quantity = f"{one.trace}, {one.label}: {DEFAULT}, nowhere under {NO_WORSE} of LRU or {POINTS} points"
                claims.append(at_least(quantity, "%", bar, one.hits[DEFAULT]))
        return [check(claim) for claim in claims]

    def _chart(self, name: str, replays: Sequence[Replayed]) -> Chart:
        mine = [one for one in replays if one.trace == name]
        labels = [one.label for one in mine]
        series = [Series(policy, labels, [one.hits[policy] for one in mine]) for policy in (*self.policies, MIN)]
        caption = f"Hits of each policy on {name}, by plain replay. The dotted line is a cache without end."
        return Chart(f"hits_{name}", "bars", "size of the cache", "hits (% of blocks)", caption, series,
                     y_mark=mine[0].hits[ENDLESS], y_mark_name=ENDLESS)  # fmt: skip

    # ------------------------------------------------------------ the engine

    def _engine(self, cells: CellRunner) -> tuple[list[Claim], list[str]]:
        """Claims, and sentences on how fast requests came."""
        claims: list[Claim] = []
        notes: list[str] = []
        if not self.engine_requests:
            return claims, notes
        for slots in self.engine_slots:
            common = [
                "workload=mooncake",
                f"workload.path={Path(self.paths[0]).resolve()}",
                f"workload.num_requests={self.engine_requests}",
                "workload.spread_bins=true",
                f"kv_cache.num_slots={slots}",
            ]
            sustained = float(cells.run(
                f"sustained-{slots}", [*common, f"allocator.eviction={LRU}", "arrival=all_at_once"]
            )["requests_per_second"])  # fmt: skip
            speed = self.load * sustained / self._rate()
            notes.append(
                f"With a pool of {slots:,} tokens LRU sustains {sustained:.2f} requests/s of the first "
                f"{self.engine_requests:,} requests, all there at once; they arrive at {self.load:.0%} of that, "
                f"{speed:.3f} times the trace's speed."
            )
            for name in self.policies:
                runs = [
                    cells.run(
                        f"{name}-{slots}-seed{seed}",
                        [*common, f"allocator.eviction={name}", "arrival=trace", f"arrival.speed={speed:.5f}",
                         f"workload.seed={seed}"],
                    )
                    for seed in self.seeds
                ]  # fmt: skip
                claims += self._engine_claims(f"engine, {slots:,} tokens, {name}", runs)
        return claims, notes

    def _rate(self) -> float:
        """Requests per second of the trace's requests that run."""
        table = MooncakeWorkload(
            path=self.paths[0], seed=0, vocab_size=VOCAB_SIZE, num_requests=self.engine_requests
        ).table
        assert table.arrival_times is not None
        return (len(table) - 1) / max(float(table.arrival_times[-1]), 1e-9)

    @staticmethod
    def _engine_claims(what: str, runs: Sequence[dict[str, Any]]) -> list[Claim]:
        def mean(key: str, scale: float = 1.0) -> Mean:
            return Mean.of([scale * float(run[key] or 0.0) for run in runs])

        ttft = Mean.of([float(run["ttft_seconds"]["p99"]) for run in runs])
        return [
            measured(f"{what}: hit rate", "%", mean("cached_prompt_share", 100)),
            measured(f"{what}: share of MIN", "%", mean("cache_share_of_optimum", 100)),
            measured(f"{what}: prompt seconds saved", "s", mean("prompt_seconds_saved")),
            measured(f"{what}: p99 TTFT", "s", ttft),
        ]


def _chains(workload: Workload, block_size: int) -> list[list[tuple[Any, ...]]]:
    """Keys of the full blocks of a workload's prompts: equal ones for equal blocks behind equal prefixes."""
    rows = []
    numbers: dict[tuple[Any, ...], int] = {}
    for item in workload.items_iter():
        prompt, before, row = item.prompt_token_ids, -1, []
        for start in range(0, len(prompt) // block_size * block_size, block_size):
            key = (before, *prompt[start : start + block_size])
            before = numbers.setdefault(key, len(numbers))
            row.append((before,))
        rows.append(row)
    return rows
