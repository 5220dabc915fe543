"""What sharing a prefix is worth, and of what: room in memory, prompts not computed again, decodes that read it once.

    cell          blocks shared   prefix of prompts        pool                  rows        reads
    none          no              computed by each         holds a part of them  that many   each its own
    given         no              given as computed        as above              as above    each its own
    roomy         no              computed by each         holds as many rows as with sharing, each its own
    cached        yes             computed once            as none               all         each its own
    whole         yes             computed once            as none               all         once
    few cached    yes             computed once            as none               as none     each its own
    few whole     yes             computed once            as none               as none     once

    compute = given / none     capacity = roomy / none     bandwidth = few whole / few cached     all = whole / none

Each effect is what changes where nothing else does. Their product is what all of them would give if none knew of the
others; what the whole gives beside it is their interaction, above all that with more rows side by side each read serves
more of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kvarena.allocators.paged import PagedAllocator
from kvarena.engine.checks import SHARE, check_int, check_number, require
from kvarena.engine.contract import cdiv
from kvarena.engine.errors import ConfigError
from kvarena.engine.request import Request
from kvarena.experiments.building.parts import target_device
from kvarena.experiments.settings.config import SimulatedRunnerConfig
from kvarena.experiments.studies.base import Chart, Findings, mean_series
from kvarena.experiments.studies.cells import CellRunner
from kvarena.experiments.studies.claims import Claim, Mean, compared, measured

EFFECTS = {"capacity": ("roomy", "none"), "compute": ("given", "none"), "bandwidth": ("few_whole", "few_cached")}
READS = ("whole", "few_whole")
SEVERAL = {"samples": "n", "beams": "beams"}
CELL = ("arrival=all_at_once", "scheduler=continuous", "report.pages=false", "report.kv_map=false")


class GivenPrefixAllocator(PagedAllocator):
    """Claims that the first tokens of every prompt are computed, in blocks of its own: nothing is shared.

    Args:
        given: so many tokens; whole blocks of them count.
        options: see `PagedAllocator`.
    """

    def __init__(self, *, given: int, **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        self._given = given

    def match_prefix(self, req: Request) -> int:
        """See `KVAllocator.match_prefix`."""
        return min(self._given, req.num_tokens - 1) // self.block_size * self.block_size


class Point(NamedTuple):
    """So many prefixes of so many tokens, each of so many rows."""

    prefixes: int
    tokens: int
    rows: int

    def __str__(self) -> str:
        return f"{self.prefixes} x {self.tokens:,} tokens, {self.rows} rows each"


@dataclass(frozen=True)
class SharingStudy:
    """Args:
    points: [prefixes, tokens of each, rows of each], one list per point.
    samples: [prompts, tokens of each, samples of each]: as PagedAttention's Figure 15, in tokens/s; may be empty.
    beams: the same of beam searches, with their width.
    own: tokens of a prompt behind its prefix.
    output: tokens of an answer.
    waves: requests of a cell, as a multiple of the rows.
    held: part of the rows that the pool holds where nothing is shared.
    rounds: runs of each cell.
    near: as far as the product of the effects may be from the whole before their interaction is named.

    Raises:
        ConfigError: no point, or a number out of range.
    """

    points: Sequence[Sequence[int]]
    samples: Sequence[Sequence[int]]
    beams: Sequence[Sequence[int]]
    own: int
    output: int
    waves: int
    held: float
    rounds: int
    near: float

    def __post_init__(self) -> None:
        for name, points in (("points", self.points), ("samples", self.samples), ("beams", self.beams)):
            if any(len(point) != 3 or min(point) < 1 for point in points):
                raise ConfigError(f"study.{name}={list(points)} must be lists of [prefixes, tokens, rows], at least 1")
        if not self.points:
            raise ConfigError("study.points must name at least one [prefixes, tokens, rows]")
        for name in ("own", "output", "waves", "rounds"):
            check_int(f"study.{name}", getattr(self, name), 1)
        require(SHARE.holds(self.held), "study.held", self.held, SHARE.words)
        check_number("study.near", self.near)

    def run(self, cells: CellRunner) -> Findings:
        """See `Study.run`."""
        config = cells.config(CELL)
        reads = isinstance(config.runner, SimulatedRunnerConfig) or target_device(config.engine.device) == "cuda"
        block = config.allocator.need("block_size")
        claims: list[Claim] = []
        found: dict[Point, dict[str, Mean]] = {}
        for point in [Point(*values) for values in self.points]:
            effects, rates = self._effects(self._rates(cells, point, block, reads), reads)
            found[point] = effects
            claims += self._claims(point, effects, rates)
        for kind, points in (("samples", self.samples), ("beams", self.beams)):
            claims += [claim for values in points for claim in self._several(cells, Point(*values), reads, kind)]
        best = max(found, key=lambda point: found[point]["whole"].value)
        parts = ", ".join(f"{name} {effect.value:.2f}" for name, effect in found[best].items() if name != "whole")
        return Findings(
            title="Sharing a prefix: capacity, compute and bandwidth",
            headline=f"Output tokens/s with sharing over without, at the most {found[best]['whole'].value:.2f} "
            f"({best}); each effect alone: {parts}.",
            source="this project's own measurement",
            claims=claims,
            charts=[self._chart(found)],
            notes=[
                f"{self.waves} x as many requests as rows, all at once; {self.own} tokens of a prompt are its own, "
                f"{self.output} of output. Where nothing is shared the pool holds {self.held:.0%} of the rows.",
                "Capacity: a pool in which as many rows fit without sharing as with it. Compute: the prefix counts as "
                "computed, in blocks of each row's own. Bandwidth: reads shared or not, by as many rows as fit without "
                "sharing.",
                *([] if reads else ["On a CPU each decode reads its own context: without the effect on bandwidth."]),
            ],
        )

    def _rates(self, cells: CellRunner, point: Point, block: int, reads: bool) -> dict[str, list[float]]:
        """Output tokens per second of each cell, by round."""
        settings = self._cells(point, block, reads)
        rates: dict[str, list[float]] = {name: [] for name in settings}
        label = "x".join(map(str, point))
        for repeat in range(self.rounds):
            for name, overrides in settings.items():
                summary = cells.run(f"{name}-{label}-r{repeat}", [*CELL, *overrides, f"sweep.round={repeat}"])
                rates[name].append(float(summary["output_tokens_per_second"]))
        return rates

    def _cells(self, point: Point, block: int, reads: bool) -> dict[str, list[str]]:
        """Overrides of each cell, those that share reads only where that is possible."""
        num_rows = point.prefixes * point.rows
        prefix, tail = point.tokens // block * block, cdiv(self.own + self.output, block) * block + block
        few = max(1, int(self.held * num_rows))
        slots = max(few * (prefix + tail), point.prefixes * prefix + tail)
        many = min(num_rows, max(few, (slots - point.prefixes * prefix) // tail))
        load = [
            "workload=shared_prefix", f"workload.num_prefixes={point.prefixes}", f"workload.prefix_len={point.tokens}",
            f"workload.suffix_len.min={self.own}", f"workload.suffix_len.max={self.own}",
            f"workload.output_len.min={self.output}", f"workload.output_len.max={self.output}",
            f"workload.num_requests={self.waves * num_rows}",
        ]  # fmt: skip
        pool, all_rows, few_rows = f"kv_cache.num_slots={slots}", f"scheduler.max_num_seqs={num_rows}", few
        plain, cache = [*load, "allocator=paged"], [*load, "allocator=paged_prefix", pool]
        limited = f"scheduler.max_num_seqs={few_rows}"
        given = [f"allocator._target_={__name__}.GivenPrefixAllocator", f"+allocator.given={point.tokens}"]
        cells = {
            "none": [*plain, pool, all_rows],
            "given": [*plain, *given, pool, all_rows],
            "roomy": [*plain, f"kv_cache.num_slots={many * (prefix + tail)}", all_rows],
            "cached": [*cache, all_rows], "whole": [*cache, all_rows],
            "few_cached": [*cache, limited], "few_whole": [*cache, limited],
        }  # fmt: skip
        if not reads:
            return {name: overrides for name, overrides in cells.items() if name not in (*READS, "few_cached")}
        return {
            name: [*overrides, f"runner.share_reads={str(name in READS).lower()}"] for name, overrides in cells.items()
        }

    def _effects(self, rates: Mapping[str, list[float]], reads: bool) -> tuple[dict[str, Mean], dict[str, Mean]]:
        """Each effect alone, their product and the whole, as ratios; and the cells' tokens per second."""
        alone = {name: pair for name, pair in EFFECTS.items() if set(pair) <= rates.keys()}
        effects = {name: Mean.of_ratios(rates[one], rates[other]) for name, (one, other) in alone.items()}
        products = [1.0] * self.rounds
        for one, other in alone.values():
            products = [p * a / b for p, a, b in zip(products, rates[one], rates[other], strict=True)]
        effects["product"] = Mean.of(products)
        effects["whole"] = Mean.of_ratios(rates["whole" if reads else "cached"], rates["none"])
        return effects, {name: Mean.of(values) for name, values in rates.items()}

    def _claims(self, point: Point, effects: dict[str, Mean], rates: dict[str, Mean]) -> list[Claim]:
        interaction = effects["whole"].value / effects["product"].value
        note = "as far as the product goes"
        if abs(interaction - 1) > self.near:
            room = rates["cached"].value / rates["given"].value
            note = f"interaction of the effects: {interaction:.2f} of their product; where prompts are given, room is "
            note += f"worth {room:.2f}, not {effects['capacity'].value:.2f}"
            if "whole" in rates:
                many = rates["whole"].value / rates["cached"].value
                note += f"; reads shared by all rows, not by few, {many:.2f}, not {effects['bandwidth'].value:.2f}"
        notes = {"whole": note, "product": "of the effects above"}
        names = {"whole": "all of sharing", "product": "product of the effects"}
        claims = [
            compared(f"{point}: {names.get(name, name + ' alone')}", effect, note=notes.get(name, ""))
            for name, effect in effects.items()
        ]
        return [
            *claims,
            *(measured(f"{point}: {name.replace('_', ' ')}", "tokens/s", mean) for name, mean in rates.items()),
        ]

    def _several(self, cells: CellRunner, point: Point, reads: bool, kind: str) -> list[Claim]:
        """Tokens per second of parallel samples or beams, whose blocks are shared; and with reads shared too."""
        num_rows, label = point.prefixes * point.rows, "x".join(map(str, point))
        base = [
            *CELL, "workload=fixed", f"workload.prompt_len={point.tokens}", f"workload.output_len={self.output}",
            f"workload.num_requests={point.prefixes}", f"sampling.{SEVERAL[kind]}={point.rows}",
            "allocator=paged", f"scheduler.max_num_seqs={num_rows}",
            f"kv_cache.num_slots={num_rows * (point.tokens + 2 * self.output)}",
        ]  # fmt: skip
        rates: dict[bool, list[float]] = {}
        for shares in (False, True) if reads else (False,):
            lever = [f"runner.share_reads={str(shares).lower()}"] if reads else []
            rates[shares] = [
                float(cells.run(f"{kind}-{label}-{'once' if shares else 'each'}-r{repeat}",
                                [*base, *lever, f"sweep.round={repeat}"])["output_tokens_per_second"])
                for repeat in range(self.rounds)
            ]  # fmt: skip
        what = f"{point.prefixes} prompts of {point.tokens:,} tokens, {point.rows} {kind} each"
        claims = [
            measured(f"{what}: read {'once' if shares else 'by each'}", "tokens/s", Mean.of(values))
            for shares, values in rates.items()
        ]
        if reads:
            claims.append(compared(f"{what}: read once over read by each", Mean.of_ratios(rates[True], rates[False])))
        return claims

    @staticmethod
    def _chart(found: Mapping[Point, Mapping[str, Mean]]) -> Chart:
        points = [f"{point.prefixes} x {point.tokens} x {point.rows}" for point in found]
        names = list(next(iter(found.values())))
        return Chart(
            "effects", "bars", "prefixes x tokens x rows of each", "output tokens/s over those without sharing",
            "Each effect of sharing alone, their product, and all of sharing.",
            [mean_series(name, points, [effects[name] for effects in found.values()]) for name in names],
        )  # fmt: skip
