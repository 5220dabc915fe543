"""Fits a profile to recorded runs: device and host seconds per step, by non-negative least squares.

    recorded     start ---- launch -------- launched ------ end ........ next start
                 |  before  |   device (after the one before)  |  after   |

The device's time of a step is `end - max(begin, end of the step before)`. Without overlap it begins with the launch, so
that preparing on the host is part of it. With overlap a graph begins when it is launched, and other steps with their
first kernel: what is left is what the step added to the queue of the device. Two kinds of steps tell nothing of it
then and are left out: those whose end was seen late, as the host was still launching the next one, and those whose
kernels the device had to wait for. What follows a decode that was seen late, and is no graph, begins when the fitted
function says that the decode ended.

Steps that only decode and steps with prompts run other code: each kind has a table over its tokens. All else is fitted
to both kinds at once, with what physics ties: a token whose KV is read costs the same in both, no coefficient is
negative, no table falls. Where decodes read once what they have in common, tokens attended to and tokens read have a
coefficient each. A step's weight is one over its time, so that relative errors count. Pauses of the machine are
left out (a step of eight times the robust fit: code compiled at its first use, other work); all other steps count in
full, because their mean is what throughput depends on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from kvarena.engine.errors import ConfigError
from kvarena.experiments.recording.step_features import StepFeatures
from kvarena.experiments.simulation.fitted_range import FittedRange
from kvarena.experiments.simulation.profiles import MeasuredProfile
from kvarena.experiments.simulation.recorded import RecordedRun
from kvarena.experiments.simulation.step_time import HostTime, TableStepTime

FloatArray = NDArray[np.float64]

# Where the table over tokens may bend: finer where batches are padded in steps of 8, and where decodes are.
KNOTS = np.array(
    [1, 2, 4, *range(8, 65, 8), *range(80, 257, 16), 320, 384, 512, 768, 1024, 1536, 2048, 4096, 8192, 16384, 32768]
)
MIN_STEPS = 20  # to fit a phase
REPLAYS = 5  # steps with prompts that replay a graph, or do not, for a group to be told
KNOT_STEPS = 8  # to keep a knot
HUBER = 3.0  # robust standard deviations
FILLS = (0, 128, 256, 384, 512, 768, 1024, 1536, 2048)  # tried as `fill_queries`
LARGEST_ERROR = 0.5  # of a step, in the choice among these: what is further off was a pause, or not of attention
PAUSE = 8.0  # times the fit: what takes longer was a pause of the machine
LATE = 2e-4  # seconds after a launch: tokens that come sooner had been waiting for the host
WAITED = 0.1  # of a launch kernel by kernel: tokens that come sooner after it had been waiting for it
ROUNDS = 10


class Samples(NamedTuple):
    """The steps of runs, as columns of one length.

    Attributes:
        features: as of StepFeatures, in its order; float64 [steps, 8].
        device: seconds; NaN where the host saw the beginning or the end too late.
        launch: seconds from the launch until it was done.
        before: seconds from scheduling to launch.
        after: seconds from the end of the step to the start of the next one; NaN where the engine had no work.
        tail: seconds from when all was launched to the end of the step.
        taken: seconds from the launch of the next step to the end of one that was seen late; NaN for others.
    """

    features: FloatArray
    device: FloatArray
    launch: FloatArray
    before: FloatArray
    after: FloatArray
    tail: FloatArray
    taken: FloatArray

    @property
    def num_tokens(self) -> FloatArray:
        """Tokens computed."""
        return self.features[:, 0] + self.features[:, 1]

    @property
    def num_requests(self) -> FloatArray:
        """Requests in the batch."""
        return self.features[:, 1] + self.features[:, 5]

    @property
    def only_decode(self) -> NDArray[np.bool_]:
        """Whether no request computes a prompt."""
        return self.features[:, 5] == 0

    def timed(self) -> Samples:
        """The steps whose device time is known."""
        return self.take(~np.isnan(self.device))

    def rows(self) -> list[StepFeatures]:
        """The features of every step."""
        return [StepFeatures(*row) for row in self.features.tolist()]

    def take(self, mask: NDArray[np.bool_]) -> Samples:
        """Those steps."""
        return Samples(*(column[mask] for column in self))


@dataclass(frozen=True)
class Fit:
    """A fitted profile and how well it fits the steps that it was fitted to.

    Attributes:
        profile: what `runner.profile` takes.
        num_steps: that it was fitted to.
        error: median and 90th percentile of the absolute relative error of a step's device time.
    """

    profile: MeasuredProfile
    num_steps: int
    error: tuple[float, float]


def samples(run: RecordedRun, max_launch_tokens: float = 0.0, decode: TableStepTime | None = None) -> Samples:
    """The steps of one run.

    Args:
        run: the recording.
        max_launch_tokens: with overlap, up to which steps with prompts replay a graph.
        decode: of steps that only decode. With it the device time is also known of steps without a graph that follow
            one of those whose end was seen late.
    """
    steps = run.steps
    num_decodes = steps["num_scheduled"] - steps["num_prefill_requests"]
    features = np.stack(
        [
            steps["num_new_tokens"] - num_decodes,
            num_decodes,
            steps["num_kv_tokens"],
            steps["num_attention_pairs"],
            steps["num_copies"],
            steps["num_prefill_requests"],
            steps["longest_prefill"],
            # Recordings of before have no such column, and nothing was saved.
            steps["num_kv_tokens"] - steps.get("num_distinct_kv_tokens", steps["num_kv_tokens"]),
        ],
        axis=1,
    ).astype(np.float64)
    start, launch, launched = steps["start_time"], steps["launch_time"], steps["launched_time"]
    end = steps["end_time"]
    take = np.full(len(end), np.nan)
    if run.overlap:
        late = _seen_late(launched, end)
        take[late] = end[late] - np.roll(launched, -1)[late]
        device = _device_under_overlap(features, launch, launched, end, max_launch_tokens, decode)
    else:
        device = end - np.maximum(launch, np.concatenate([[-np.inf], end[:-1]]))
    # With overlap the call that plans step N + 2 follows the one that ended step N.
    lag = 2 if run.overlap else 1
    after = np.full(len(end), np.nan)
    after[:-lag] = start[lag:] - end[:-lag]
    after[~(_has_work(run, end) & (after >= 0))] = np.nan
    return Samples(features, device, launched - launch, launch - start, after, end - launched, take)


def _seen_late(launched: FloatArray, end: FloatArray) -> NDArray[np.bool_]:
    """Whether each step's tokens were there before the next step had been launched, and so the host came late."""
    late = np.zeros(len(end), dtype=np.bool_)
    late[:-1] = (launched[1:] <= end[:-1]) & (end[:-1] < launched[1:] + LATE)
    return late


def _device_under_overlap(
    features: FloatArray,
    launch: FloatArray,
    launched: FloatArray,
    end: FloatArray,
    max_launch_tokens: float,
    decode: TableStepTime | None,
) -> FloatArray:
    """Seconds that each step added to the device's queue; NaN where that cannot be told."""
    only_decode = features[:, 5] == 0
    replays = only_decode | (features[:, 0] + features[:, 1] <= max_launch_tokens)
    late = _seen_late(launched, end)
    begin = np.where(replays, launched, launch)
    free = np.concatenate([[-np.inf], end[:-1]])
    after_late = np.concatenate([[False], late[:-1]])
    # It had ended by the time that the next was launched.
    free[after_late & replays] = -np.inf
    for i in np.flatnonzero(after_late & ~replays).tolist():
        known = decode is not None and only_decode[i - 1] and not after_late[i - 1]
        before = max(begin[i - 1], free[i - 1])
        free[i] = min(free[i], before + decode(StepFeatures(*features[i - 1].tolist()))) if known and decode else np.nan
    waited = ~replays & (end - launched < WAITED * (launched - launch))
    return np.where(late | waited, np.nan, end - np.maximum(begin, free))


def _has_work(run: RecordedRun, ends: FloatArray) -> NDArray[np.bool_]:
    """Whether a request was in the engine when each step ended and its tokens were taken in."""
    submitted = np.sort([row["submit_time"] for row in run.requests])
    finished = np.sort([row["finish_time"] for row in run.requests if row["finish_time"] is not None])
    return np.searchsorted(submitted, ends, side="right") > np.searchsorted(finished, ends, side="right")


def pooled(parts: Sequence[Samples]) -> Samples:
    """The steps of several runs."""
    return Samples(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def fit_profile(runs: Sequence[RecordedRun]) -> Fit:
    """A profile of the model and machine that all `runs` share.

    Raises:
        ConfigError: the runs differ in model or overlap, or have too few steps of a kind.
    """
    model = {(run.manifest["model"]["name"], run.manifest["model"]["kv_bytes_per_token"], run.overlap) for run in runs}
    if len(model) != 1:
        raise ConfigError(f"runs of one model, with or without overlap, make one profile; these are of {sorted(model)}")
    [(name, kv_bytes, overlap)] = model
    most = most_launch_tokens(pooled([samples(run) for run in runs])) if overlap else 0.0
    decode, _ = _fit_device(pooled([samples(run, most) for run in runs]).timed(), name)
    steps = pooled([samples(run, most, decode) for run in runs])
    decode, prefill = _fit_device(steps.timed(), name)
    profile = MeasuredProfile(
        source=_source(runs),
        error="what the study that fitted it says of its held-out cells",
        model=name,
        kv_bytes_per_token=kv_bytes,
        overlap=overlap,
        fitted=_range(runs),
        decode=decode,
        prefill=prefill,
        host=_fit_host(steps, most) if overlap else _fit_host(steps),
    )
    timed = steps.timed()
    error = np.abs(predict(profile, timed) / timed.device - 1)
    return Fit(profile, len(error), (float(np.median(error)), float(np.percentile(error, 90))))


def predict(profile: MeasuredProfile, steps: Samples) -> FloatArray:
    """Device seconds of every step by a profile."""
    return np.array([profile.device(features) for features in steps.rows()])


def _fit_device(steps: Samples, model: str) -> tuple[TableStepTime, TableStepTime]:
    """The functions of steps that only decode, and of steps with prompts, fitted together."""
    decodes, prompts = steps.only_decode, ~steps.only_decode
    for mask, what in ((decodes, "only decode"), (prompts, "have prompts")):
        if mask.sum() < MIN_STEPS:
            raise ConfigError(
                f"the runs of {model} to fit have {mask.sum()} steps that {what}, and {MIN_STEPS} are needed; give "
                "more runs in study.train"
            )
    knots, tables = zip(*(_table(steps.num_tokens, mask) for mask in (decodes, prompts)), strict=True)
    best, error = None, np.inf
    for fill in FILLS:
        others = [
            np.where(prompts, steps.num_requests, 0.0),  # of steps that only decode, requests and tokens are one number
            steps.features[:, 2],
            np.maximum(steps.features[:, 3], fill * steps.features[:, 6]),
            steps.features[:, 4],
            # Without shared reads it is the column of all tokens, and nothing would tell the two apart.
            *([steps.features[:, 2] - steps.features[:, 7]] if steps.features[:, 7].any() else []),
        ]
        columns = np.concatenate([*tables, np.stack(others, axis=1)], axis=1)
        found = _non_negative(columns, steps.device)
        off = np.abs(steps.device / np.maximum(columns @ found, 1e-6) - 1)[prompts]
        if (mean := float(np.minimum(off, LARGEST_ERROR).mean())) < error:
            best, error = (fill, found), mean
    assert best is not None  # the first has a finite error
    fill, found = best
    first, second, rest = np.split(found, np.cumsum([len(entries) for entries in knots]))
    per_request, per_kv_token, per_pair, per_copy, *more = rest.tolist()
    per_distinct = more[0] if more else 0.0
    prefill = np.cumsum(second).tolist()
    return (
        TableStepTime(knots[0], np.cumsum(first).tolist(), 0.0, per_kv_token, 0.0, per_copy, 0.0, per_distinct),
        TableStepTime(knots[1], prefill, per_request, per_kv_token, per_pair, per_copy, float(fill), per_distinct),
    )


def _table(tokens: FloatArray, mask: NDArray[np.bool_]) -> tuple[list[float], FloatArray]:
    """A table's tokens, and its columns, which are 0 in steps of the other kind.

    A table that never falls is its first entry plus rises between entries, each at least 0.
    """
    knots = _knots(tokens[mask])
    rises = [np.clip((tokens - a) / (b - a), 0, None if b == knots[-1] else 1) for a, b in pairwise(knots)]
    return knots, np.stack([np.ones(len(tokens)), *rises], axis=1) * mask[:, None]


def _knots(tokens: FloatArray) -> list[float]:
    """The entries of KNOTS between which there are enough steps, and the ends."""
    low, high = float(tokens.min()), float(max(tokens.max(), tokens.min() + 1))
    knots = [low]
    for knot in KNOTS[(low < KNOTS) & (high > KNOTS)].tolist():
        if ((tokens > knots[-1]) & (tokens <= knot)).sum() >= KNOT_STEPS:
            knots.append(float(knot))
    return [*knots, high]


def _fit_host(steps: Samples, max_launch_tokens: float | None = None) -> HostTime:
    """Host time before and after a step, each as base + share per request; with overlap also that of launches."""
    parts = np.stack([np.ones(len(steps.device)), steps.num_requests, ~steps.only_decode], axis=1).astype(np.float64)
    known = ~np.isnan(steps.after)
    before = _non_negative(parts, steps.before).tolist()
    after = (_non_negative(parts[known], steps.after[known]) if known.sum() >= MIN_STEPS else np.zeros(3)).tolist()
    launch = {} if max_launch_tokens is None else _fit_launch(steps, max_launch_tokens)
    return HostTime(
        before=before[0], before_per_request=before[1], before_prefill=before[2],
        after=after[0], after_per_request=after[1], after_prefill=after[2],
        **launch,
    )  # fmt: skip


def most_launch_tokens(steps: Samples) -> float:
    """The tokens up to which steps with prompts replay a graph.

    They are told apart where the logarithms of their launch times have the largest variance between the two groups.
    Replays are faster, and no group is smaller than REPLAYS: a step that captures its graph, or compiles, takes longer
    than all of them. 0 where there are no two such groups: then none is known to replay.
    """
    prompts = steps.take(~steps.only_decode)
    order = np.argsort(prompts.num_tokens, kind="stable")
    tokens, log = prompts.num_tokens[order], np.log(np.maximum(prompts.launch[order], 1e-6))
    left = np.arange(1, len(log))
    right = len(log) - left
    below = np.cumsum(log)[:-1]
    between = (below - left * log.mean()) ** 2 / (left * right)
    is_split = (tokens[:-1] < tokens[1:]) & (np.minimum(left, right) >= REPLAYS) & (below / left < log.mean())
    return float(tokens[int(np.argmax(np.where(is_split, between, -1.0)))]) if is_split.any() else 0.0


def _fit_launch(steps: Samples, max_launch_tokens: float) -> dict[str, float]:
    """Launches by kind, and what requests and the prompts' tokens add, as HostTime has them."""
    prompts, replays = ~steps.only_decode, steps.num_tokens <= max_launch_tokens
    eager = prompts & ~replays
    columns = {
        "launch_decode": steps.only_decode,
        "launch_prefill": prompts & replays,
        "launch_eager": eager,
        "launch_mixed": eager & (steps.features[:, 1] > 0),
        "launch_per_request": steps.num_requests,
        "launch_per_token": steps.features[:, 0],
    }
    found = _non_negative(np.stack(list(columns.values()), axis=1).astype(np.float64), steps.launch).tolist()
    waited = eager & np.isnan(steps.device) & (steps.tail < WAITED * steps.launch)
    tail = float(np.median(steps.tail[waited])) if waited.any() else 0.0
    late = ~np.isnan(steps.taken)
    take = float(np.median(steps.taken[late])) if late.any() else 0.0
    return dict(zip(columns, found, strict=True)) | {"max_launch_tokens": max_launch_tokens, "tail": tail, "take": take}


def _non_negative(columns: FloatArray, seconds: FloatArray) -> FloatArray:
    """Coefficients of at least 0 with `columns @ coefficients` near `seconds`: relative errors, without pauses.

    Errors are relative to what is fitted, not to what was measured: that would favour the steps that were short by
    chance, and the mean would come out too low.
    """
    scale = np.maximum(np.abs(columns).max(axis=0), 1e-300)
    # Far below a microsecond nothing is measured: such times must not get all the weight.
    expected = np.maximum(seconds, 1e-6)

    def solve(weight: FloatArray) -> FloatArray:
        rows = np.sqrt(weight) / expected
        return np.asarray(nnls(columns / scale * rows[:, None], seconds * rows)[0] / scale)

    weight = np.ones(len(seconds))
    for _ in range(ROUNDS):
        fitted = columns @ solve(weight)
        expected = np.maximum(fitted, 1e-6)
        residual = np.abs(fitted - seconds) / expected
        spread = 1.4826 * np.median(residual) + 1e-9
        weight = np.minimum(1.0, HUBER * spread / np.maximum(residual, 1e-12))
    steady = (seconds <= PAUSE * expected).astype(np.float64)
    for _ in range(ROUNDS):
        expected = np.maximum(columns @ solve(steady), 1e-6)
    return solve(steady)


def _range(runs: Sequence[RecordedRun]) -> FittedRange:
    """What the runs hold."""
    names = runs[0].steps
    columns = {name: np.concatenate([run.steps[name] for run in runs]) for name in names}
    strategies = {
        (str(run.manifest["strategy"]["scheduler"]), int(run.manifest["config"]["scheduler"]["max_num_batched_tokens"]))
        for run in runs
    }
    schedulers = [f"{name} {budget}" for name, budget in sorted(strategies)]
    return FittedRange.of(columns, schedulers, sorted({str(run.manifest["workload"]["name"]) for run in runs}))


def _source(runs: Sequence[RecordedRun]) -> str:
    """Machine, commit and runs in one line."""
    manifest = runs[0].manifest
    gpu = manifest["machine"]["gpu"]
    machine = gpu["name"] if gpu else f"{manifest['machine']['cores']} cores of {manifest['machine']['cpu']}"
    commit = (manifest["git"]["commit"] or "no commit")[:12]
    seeds = sorted({run.manifest["workload"]["seed"] for run in runs})
    return f"{machine}, commit {commit}, {len(runs)} runs, seed {', '.join(map(str, seeds))}"
