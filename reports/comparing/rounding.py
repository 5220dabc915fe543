"""Whether two runs differ by rounding or by an error: judged at a request's first differing token, by recorded scores.

    output   t0  t1  t2  a ...      the prefix is the same up to here, so only rounding may tell the runs apart;
             t0  t1  t2  b ...      later tokens have other prefixes and say nothing

A run with `driver.scores` recorded what each token was picked by: its logit, or with sampling logit / temperature
minus the draw's log E (engine/sampling/scores.py). The draw of a request and position is the same in both runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from kvarena.reports.reading.columns import names_of
from kvarena.reports.reading.files import RunFiles, as_lists, read_table
from kvarena.reports.reading.names import SCORES_FILE

EXACT = "float32"  # in which nothing may differ
# One unit in the last place of numbers from 1 to 2.
EPSILONS = {"bfloat16": 2.0**-7, "float16": 2.0**-10}
# The scores of equal prefixes differ by rounding alone. A difference at a first differing token may be so many times
# their median (of a normal distribution: 5.4 standard deviations), and never more than so many units in the last place.
MOST_MEDIANS = 8
MOST_UNITS = 32
LEAST_VALUES = 100  # to know what is typical; with fewer the units alone decide
ROUNDING, ERROR, NOT_RECORDED = "rounding", "error", "not recorded"


class Candidates(NamedTuple):
    """The best tokens of one sampled position and their scores, best first; both [K]."""

    token_ids: np.ndarray
    values: np.ndarray

    def score(self, token_id: int) -> float | None:
        """A token's score, or None where it is not among the best."""
        at = np.flatnonzero(self.token_ids == token_id)
        return float(self.values[at[0]]) if len(at) else None


@dataclass(frozen=True, slots=True)
class Scores:
    """scores.parquet: row `rows[request_id]` of each list, `num_candidates` entries per output token."""

    rows: dict[str, int]
    num_candidates: np.ndarray
    token_ids: pa.LargeListArray
    values: pa.LargeListArray

    def at(self, request_id: str, position: int) -> Candidates | None:
        """The candidates of one output token, or None where they are not in the file."""
        found = self.before(request_id, position + 1)
        return None if found is None else Candidates(found.token_ids[-1], found.values[-1])

    def before(self, request_id: str, position: int) -> Candidates | None:
        """Those of all output tokens before it, both [position, K]; None where they are not all there."""
        row = self.rows.get(request_id)
        if row is None:
            return None
        shape = position, int(self.num_candidates[row])
        columns = [column[row].values.to_numpy()[: shape[0] * shape[1]] for column in (self.token_ids, self.values)]
        return None if len(columns[1]) < shape[0] * shape[1] else Candidates(*(one.reshape(shape) for one in columns))


def read_scores(run: RunFiles) -> Scores | None:
    """A run's recorded scores, or None. Raises ReportError when the file is broken."""
    path = run.path / SCORES_FILE
    if not path.exists():
        return None
    table = read_table(path, names_of(SCORES_FILE))
    lists = [as_lists(table.column(name), path, name) for name in ("token_ids", "values")]
    ids = table.column("request_id").to_pylist()
    return Scores({name: row for row, name in enumerate(ids)}, table.column("num_candidates").to_numpy(), *lists)


class Judgement(NamedTuple):
    """What a first differing token came to.

    Attributes:
        verdict: ROUNDING, ERROR or NOT_RECORDED.
        gap: by how much one of the two tokens beat the other, the larger of both runs; None where not recorded.
        difference: the largest difference between the runs' scores of these two tokens.
        limit: what `difference` may be.
        bounded: a token was not among the recorded ones, and the last of those stood in for it.
    """

    verdict: str
    gap: float | None = None
    difference: float | None = None
    limit: float | None = None
    bounded: bool = False


def typical_difference(ours: Scores, theirs: Scores, lengths: Mapping[str, int]) -> float | None:
    """By how much rounding moves a score: the median over tokens with equal prefixes, of those that moved at all.

    Args:
        ours, theirs: of the two runs.
        lengths: of each request that both have, how many tokens the outputs have in common at their start.

    Returns:
        0 where none moved: then nothing rounds. None where both runs recorded fewer than LEAST_VALUES such scores.
    """
    differences = []
    for request_id, length in lengths.items():
        one, other = ours.before(request_id, length), theirs.before(request_id, length)
        if one is None or other is None:
            continue
        same = one.token_ids[:, :, None] == other.token_ids[:, None, :]
        with np.errstate(invalid="ignore"):  # of what a filter dropped
            both = (one.values[:, :, None] - other.values[:, None, :])[same]
        differences.append(np.abs(both[np.isfinite(both)]))
    found = np.concatenate(differences) if differences else np.empty(0)
    if len(found) < LEAST_VALUES:
        return None
    moved = found[found > 0]
    return float(np.median(moved)) if len(moved) else 0.0


def judge(
    ours: Candidates | None,
    theirs: Candidates | None,
    token: int,
    other: int,
    epsilon: float,
    typical: float | None = None,
) -> Judgement:
    """Judge one first differing token.

    It is rounding when the gap between the two tokens, in either run, is at most twice the largest difference between
    the runs' scores of them. Picks that are the largest of what was recorded keep that by arithmetic (the two gaps add
    up to at most twice the difference), so it catches draws and samplers that did not pick the largest; a forward that
    went wrong has a large difference. So the difference must be of a rounding's size, too: at most MOST_MEDIANS times
    the typical one, and at most MOST_UNITS units in the last place, of the runs' dtype, of the largest score there.

    Args:
        ours, theirs: recorded at that position; None where they were not.
        token, other: what either run picked.
        epsilon: one unit in the last place of 1, in the coarser run's dtype.
        typical: what `typical_difference` gave.
    """
    if ours is None or theirs is None:
        return Judgement(NOT_RECORDED)
    values, bounded = np.empty((2, 2)), False
    for row, candidates in enumerate((ours, theirs)):
        for column, wanted in enumerate((token, other)):
            score = candidates.score(wanted)
            if score is None:  # at most the last recorded one's
                score, bounded = float(candidates.values[-1]), True
            values[row, column] = score
    if not np.isfinite(values).all():
        return Judgement(NOT_RECORDED)  # a filter (top-k, top-p, min-p) dropped it: its score is not known
    gap = float(np.abs(values[:, 0] - values[:, 1]).max())
    difference = float(np.abs(values[0] - values[1]).max())
    limit = MOST_UNITS * epsilon * max(1.0, float(np.abs(values).max()))
    if typical is not None:
        limit = min(limit, MOST_MEDIANS * typical)
    within = gap <= 2 * difference and difference <= limit
    return Judgement(ROUNDING if within else ERROR, gap, difference, limit, bounded)


def coarser_epsilon(run: RunFiles, reference: RunFiles) -> float | None:
    """The larger unit in the last place of two runs' dtypes; None where one is not known. 0: nothing may differ."""
    dtypes = [str((one.manifest.get("model") or {}).get("dtype")) for one in (run, reference)]
    if all(dtype == EXACT for dtype in dtypes):
        return 0.0
    known = [0.0 if dtype == EXACT else EPSILONS.get(dtype) for dtype in dtypes]
    return None if None in known else max(value for value in known if value is not None)
