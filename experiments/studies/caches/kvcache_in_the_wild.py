"""KVCache Cache in the Wild (Wang et al., USENIX ATC'25): its claims on its own traces, by plain replay.

trace file --> how much is reused, by whom, how soon, how unevenly
           --> hits of its policy and of its baselines, by size of the cache

A claim on a trace that was not given is not run, and not counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvarena.engine.errors import ConfigError
from kvarena.experiments.caching.optimum import Ask, Event, Leave
from kvarena.experiments.caching.plain_replay import (
    Trace,
    endless_hits,
    num_distinct,
    numbered,
    replay_min,
    replay_policy,
)
from kvarena.experiments.caching.reuse import reuse_stretches
from kvarena.experiments.studies.base import Chart, Findings, Series
from kvarena.experiments.studies.cells import CellRunner
from kvarena.experiments.studies.claims import Claim, at_least, check, measured, near, not_run, up_to, within
from kvarena.experiments.workloads.bailian import BailianWorkload

SOURCE = (
    "J. Wang et al., KVCache Cache in the Wild: Characterizing and Optimizing KVCache Cache at a Large Cloud Provider, "
    "USENIX ATC 2025; its traces: github.com/alibaba-edu/qwen-bailian-usagetraces-anon."
)
NAMES = {"A": "Trace A (to consumers)", "B": "Trace B (to businesses)"}
OURS, MIN = "workload", "MIN"
VOCAB_SIZE = 1000
POINTS = 5.0  # that a share of a two-hour sample may be away from the day's
SHARE = 0.25  # the same of a time, and of a gain
GAINS = {"best": 3.9, "any": 23.9}  # percent: the largest over the best of the baselines, and over any of them
SAVED = "the paper measured it on A800 cards with host memory below the pool"


class Stated(NamedTuple):
    """A number of the paper on one trace: where it stands, and how ours must be to it."""

    key: str
    quantity: str
    unit: str
    value: float
    rule: str = "within"


# Sections 3.2 to 3.5 and figures 4, 5, 9, 12 and 19.
STATED: dict[str, tuple[Stated, ...]] = {
    "A": (
        Stated("endless", "hits of a cache without end", "%", 62.0),
        Stated("first_turns", "requests that are first turns", "%", 54.0),
        Stated("soon", "reuse within 10 minutes", "%", 80.0, "at least"),
        Stated("lifespan_p90", "lifespan of a block, p90", "s", 612.0, "near"),
    ),
    "B": (
        Stated("endless", "hits of a cache without end", "%", 54.0),
        Stated("hits_of_first_turns", "hits that are first turns'", "%", 97.0),
        Stated("soon", "reuse within 10 seconds", "%", 80.0, "at least"),
        Stated("lifespan_p99", "lifespan of a block, p99", "s", 97.0, "near"),
    ),
}
SOON = {"A": 600.0, "B": 10.0}  # seconds


class _Read(NamedTuple):
    """A trace: numbered blocks of each request, its time in seconds, and its kind."""

    trace: Trace
    times: list[float]
    kinds: Sequence[str]


@dataclass(frozen=True)
class KVCacheInTheWildStudy:
    """Args:
    path: the paper's traces by their names, A and B; null: its claims on that one are not run.
    shares: sizes of the cache, in shares of a trace's different blocks.
    baselines: policies that the paper's is held against.
    left_out: share of a trace, from its start, in which policies learn and hits are not counted.

    Raises:
        ConfigError: a trace of another name, or a number out of range.
    """

    path: Mapping[str, str | None]
    shares: Sequence[float]
    baselines: Sequence[str]
    left_out: float

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.path) - set(STATED)):
            raise ConfigError(f"study.path.{unknown[0]}: the paper's traces are A and B; give study.path.A=FILE.jsonl")
        if not self.baselines or OURS in self.baselines:
            raise ConfigError(f"study.baselines={list(self.baselines)} must be policies, and {OURS} none of them")
        if not self.shares or not all(0 < share <= 1 for share in self.shares):
            raise ConfigError(f"study.shares={list(self.shares)} must be shares above 0 and up to 1")
        if not 0 <= self.left_out < 1:
            raise ConfigError(f"study.left_out={self.left_out} must be a share below 1")

    def run(self, cells: CellRunner) -> Findings:  # noqa: ARG002 - part of the protocol
        """See `Study.run`."""
        claims: list[Claim] = []
        charts: list[Chart] = []
        found = []
        for name, stated_here in STATED.items():
            if (path := self.path.get(name)) is None:
                claims += self._not_run(name)
                continue
            read = _read(path)
            facts = _facts(read, SOON[name])
            claims += [_judged(NAMES[name], stated, facts[stated.key]) for stated in stated_here]
            claims += [measured(f"{NAMES[name]}, {what}", unit, facts[key]) for key, what, unit in OTHERS]
            hits = self._hits(read)
            claims += self._policy_claims(NAMES[name], hits)
            charts.append(self._chart(name, hits))
            found.append(f"{NAMES[name]}: a cache without end finds {facts['endless']:.1f} %")
        claims.append(not_run("queued TTFT, less than with other policies", "%", 28.3, SAVED))
        return Findings(
            title="KVCache Cache in the Wild",
            headline="; ".join(found) + "." if found else "No trace was given, so nothing was run.",
            source=SOURCE,
            claims=claims,
            charts=charts,
            differences=[
                "The published files are samples of two hours with hash ids of 16 tokens; the paper's figures are of a "
                "day, with ids of 4.",
                "Plain replay: a trace in its order, nothing running, sizes in shares of its blocks. The paper serves "
                "it, scaled, with caches of card and host memory, whose sizes do not carry over.",
                "Its policy fits its distributions to the hours before, in the background; here they are learnt on the "
                f"way, and hits counted from {self.left_out:.0%} of the requests on.",
                "The paper does not say whether its gains are points or shares of hits; here they are shares.",
            ],
            notes=[] if found else [f"Give the traces: study.path.A=FILE study.path.B=FILE ({SOURCE})"],
        )

    def _not_run(self, name: str) -> list[Claim]:
        why = f"needs the file: study.path.{name}=FILE.jsonl"
        claims = [not_run(f"{NAMES[name]}, {one.quantity}", one.unit, one.value, why) for one in STATED[name]]
        return claims + [not_run(f"{NAMES[name]}, {text}", "%", GAINS[key], why) for key, text in GAIN_TEXTS.items()]

    def _hits(self, read: _Read) -> dict[str, list[float]]:
        """Percent of blocks by policy, at each size; MIN among them."""
        begin = int(len(read.trace) * self.left_out)
        total = sum(map(len, read.trace[begin:]))
        found: dict[str, list[float]] = {name: [] for name in (*self.baselines, OURS, MIN)}
        for size in self._sizes(read):
            for name, of in found.items():
                hits = replay_min(read.trace, size) if name == MIN else self._replayed(read, size, name)
                of.append(100 * float(hits[begin:].sum()) / total)
        return found

    @staticmethod
    def _replayed(read: _Read, size: int, policy: str) -> NDArray[np.int64]:
        return replay_policy(read.trace, size, policy, block_size=16, times=read.times, kinds=read.kinds)[0]

    def _sizes(self, read: _Read) -> list[int]:
        return [max(1, int(share * num_distinct(read.trace))) for share in self.shares]

    def _policy_claims(self, trace: str, hits: Mapping[str, Sequence[float]]) -> list[Claim]:
        claims, gains = [], {"best": [0.0], "any": [0.0]}
        for i, share in enumerate(self.shares):
            best = max(hits[name][i] for name in self.baselines)
            claims += [
                measured(f"{trace}, {share:.0%} of the blocks, {name}: hits", "%", of[i]) for name, of in hits.items()
            ]
            most = max(of[i] for name, of in hits.items() if name != MIN)
            quantity = f"{trace}, {share:.0%} of the blocks: MIN less the best policy"
            claims.append(check(at_least(quantity, "points", 0.0, hits[MIN][i] - most)))
            if best:
                gains["best"].append(100 * (hits[OURS][i] / best - 1))
            gains["any"] += [100 * (hits[OURS][i] / hits[name][i] - 1) for name in self.baselines if hits[name][i]]
        return [
            *(up_to(f"{trace}, {text}", "%", GAINS[key], max(gains[key]), SHARE) for key, text in GAIN_TEXTS.items()),
            *claims,
        ]

    def _chart(self, name: str, hits: Mapping[str, Sequence[float]]) -> Chart:
        labels = [f"{share:.0%}" for share in self.shares]
        series = [Series(policy, labels, list(of)) for policy, of in hits.items()]
        caption = f"Hits of each policy on {NAMES[name]}, by plain replay."
        return Chart(f"hits_{name}", "bars", "size of the cache, of the trace's blocks", "hits (% of blocks)", caption,
                     series)  # fmt: skip


GAIN_TEXTS = {
    "best": "largest gain in hits over the best of the baselines",
    "any": "largest gain in hits over one of the baselines",
}
OTHERS = (
    ("top_tenth", "reuse that falls on a tenth of the blocks", "%"),
    ("turn_p90", "turn of a request, p90", ""),
)


def _judged(trace: str, stated: Stated, ours: float) -> Claim:
    quantity = f"{trace}, {stated.quantity}"
    if stated.rule == "near":
        return near(quantity, stated.unit, stated.value, ours, SHARE)
    if stated.rule == "at least":
        return at_least(quantity, stated.unit, stated.value, ours)
    return within(quantity, stated.unit, stated.value, ours, POINTS)


def _read(path: str) -> _Read:
    workload = BailianWorkload(path=str(Path(path)), seed=0, vocab_size=VOCAB_SIZE)
    trace, table = numbered(workload.block_ids()), workload.table
    assert table.arrival_times is not None and table.kinds is not None
    return _Read(trace, table.arrival_times.tolist(), table.kinds)


def _facts(read: _Read, soon: float) -> dict[str, float]:
    """What the paper counts of a trace, in percent, seconds and turns.

    Args:
        read: the trace.
        soon: seconds of a reuse that counts as soon.
    """
    hits, turns = endless_hits(read.trace), np.array([int(kind.rpartition("-")[2]) for kind in read.kinds])
    events: list[Event] = []
    for row, (keys, time) in enumerate(zip(read.trace, read.times, strict=True)):
        events += [Ask(row, np.array(keys, dtype=np.int64), len(keys), time=time), Leave(row, time)]
    stretches = reuse_stretches(events, hits, num_distinct(read.trace))
    again = ~np.isnan(stretches["seconds"])
    blocks, seconds = stretches["num_blocks"][again], stretches["seconds"][again]
    asked = np.fromiter(chain.from_iterable(read.trace), dtype=np.int64)
    times = np.repeat(np.array(read.times), [len(one) for one in read.trace])
    lifespans = _last(asked, times) - _last(asked[::-1], times[::-1])
    uses = np.sort(np.bincount(asked) - 1)[::-1]
    first = turns == 1
    return {
        "endless": _percent(hits.sum(), len(asked)),
        "first_turns": _percent(first.sum(), len(first)),
        "hits_of_first_turns": _percent(hits[first].sum(), hits.sum()),
        "soon": _percent(blocks[seconds < soon].sum(), blocks.sum()),
        "lifespan_p90": float(np.percentile(lifespans, 90)),
        "lifespan_p99": float(np.percentile(lifespans, 99)),
        "top_tenth": _percent(uses[: -(-len(uses) // 10)].sum(), uses.sum()),
        "turn_p90": float(np.percentile(turns, 90)),
    }


def _last(keys: NDArray[np.int64], times: NDArray[np.float64]) -> NDArray[np.float64]:
    """The time of each key's last entry."""
    found = np.zeros(int(keys.max()) + 1)
    found[keys] = times
    return found


def _percent(part: float, whole: float) -> float:
    return 100 * float(part) / float(whole) if whole else 0.0
