"""Fits a profile to recorded runs: device and host seconds per step, by non-negative least squares.

    recorded     start ---- launch -------- launched ------ end ........ next start
                 |  before  |   device (after the one before)  |  after   |

The device's time of a step is `end - max(launch, end of the step before)`: without overlap that is all that follows the
launch, preparing on the host included; with it, what the step added to the queue of the device. With overlap the end
of a step is seen late where the host was still launching the next one: such steps are left out, and what follows a
decode step that was seen late begins when the fitted function says that it ended.

Steps that only decode and steps with prompts run other code: each kind has a table over its tokens. All else is fitted
to both kinds at once, with what physics ties: a token whose KV is read costs the same in both, no coefficient is
negative, no table falls. A step's weight is one over its time, so that relative errors count. Pauses of the machine are
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

from engine.errors import ConfigError
from engine.runner.step_time import HostTime, StepFeatures, TableStepTime
from experiments.simulation.fitted_range import FittedRange
from experiments.simulation.profiles import MeasuredProfile
from experiments.simulation.recorded import RecordedRun

FloatArray = NDArray[np.float64]

# Where the table over tokens may bend: finer where batches are padded in steps of 8, and where decodes are.
KNOTS = np.array(
    [1, 2, 4, *range(8, 65, 8), *range(80, 257, 16), 320, 384, 512, 768, 1024, 1536, 2048, 4096, 8192, 16384, 32768]
)
MIN_STEPS = 20  # to fit a phase, and to keep a knot
HUBER = 3.0  # robust standard deviations
PAUSE = 8.0  # times the fit: what takes longer was a pause of the machine
LATE = 2e-4  # seconds after a launch: tokens that come sooner had been waiting for the host
ROUNDS = 10


class Samples(NamedTuple):
    """The steps of runs, as columns of one length.

    Attributes:
        features: as of StepFeatures, in its order; float64 [steps, 7].
        device: seconds; NaN where the host saw the beginning or the end too late.
        launch: seconds from the launch until it was done.
        before: seconds from scheduling to launch.
        after: seconds from the end of the step to the start of the next one; NaN where the engine had no work.
    """

    features: FloatArray
    device: FloatArray
    launch: FloatArray
    before: FloatArray
    after: FloatArray

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


def samples(run: RecordedRun, decode: TableStepTime | None = None) -> Samples:
    """The steps of one run.

    Args:
        run: the recording.
        decode: of steps that only decode. With it the device time is also known of steps that follow one of those whose
            end was seen late.
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
        ],
        axis=1,
    ).astype(np.float64)
    start, launch, launched = steps["start_time"], steps["launch_time"], steps["launched_time"]
    end = steps["end_time"]
    late = _seen_late(launched, end) if run.overlap else np.zeros(len(end), dtype=np.bool_)
    free = np.concatenate([[-np.inf], np.where(late, np.nan, end)[:-1]])
    if decode is not None:
        for i in np.flatnonzero(late[:-1] & (features[:-1, 5] == 0)).tolist():
            # A beginning that is not known makes the end NaN too.
            expected = np.maximum(launch[i], free[i]) + decode(StepFeatures(*features[i].tolist()))
            free[i + 1] = np.minimum(end[i], expected)
    device = np.where(late, np.nan, end - np.maximum(launch, free))
    # With overlap the call that plans step N + 2 follows the one that ended step N.
    lag = 2 if run.overlap else 1
    after = np.full(len(end), np.nan)
    after[:-lag] = start[lag:] - end[:-lag]
    after[~(_has_work(run, end) & (after >= 0))] = np.nan
    return Samples(features, device, launched - launch, launch - start, after)


def _seen_late(launched: FloatArray, ends: FloatArray) -> NDArray[np.bool_]:
    """Whether each step's tokens were there before the next step had been launched, and so the host came late.

    A host that mostly comes late sets the pace, and its time is what a step takes.
    """
    late = np.zeros(len(ends), dtype=np.bool_)
    late[:-1] = (launched[1:] <= ends[:-1]) & (ends[:-1] < launched[1:] + LATE)
    return late & (late.mean() < 0.5)


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
    decode, _ = _fit_device(pooled([samples(run) for run in runs]).timed(), name)
    steps = pooled([samples(run, decode) for run in runs])
    decode, prefill = _fit_device(steps.timed(), name)
    profile = MeasuredProfile(
        source=_source(runs),
        error="",
        model=name,
        kv_bytes_per_token=kv_bytes,
        overlap=overlap,
        fitted=_range(runs),
        decode=decode,
        prefill=prefill,
        host=_fit_host(steps, overlap),
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
    others = [
        np.where(prompts, steps.num_requests, 0.0),  # of steps that only decode, requests and tokens are one number
        steps.features[:, 2],
        steps.features[:, 3],
        steps.features[:, 4],
        steps.features[:, 6],
    ]
    found = _non_negative(np.concatenate([*tables, np.stack(others, axis=1)], axis=1), steps.device)
    first, second, rest = np.split(found, np.cumsum([len(entries) for entries in knots]))
    per_request, per_kv_token, per_pair, per_copy, per_longest = rest.tolist()
    return (
        TableStepTime(knots[0], np.cumsum(first).tolist(), 0.0, per_kv_token, 0.0, per_copy),
        TableStepTime(knots[1], np.cumsum(second).tolist(), per_request, per_kv_token, per_pair, per_copy, per_longest),
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
        if ((tokens > knots[-1]) & (tokens <= knot)).sum() >= MIN_STEPS:
            knots.append(float(knot))
    return [*knots, high]


def _fit_host(steps: Samples, overlap: bool) -> HostTime:
    """Host time before and after a step, each as base + share per request; with overlap also that of launches."""
    requests = np.stack([np.ones(len(steps.device)), steps.num_requests], axis=1)
    known = ~np.isnan(steps.after)
    before = _non_negative(requests, steps.before)
    after = _non_negative(requests[known], steps.after[known]) if known.sum() >= MIN_STEPS else np.zeros(2)
    return HostTime(*before.tolist(), *after.tolist(), *(_fit_launch(steps) if overlap else ()))


def _fit_launch(steps: Samples) -> tuple[float, ...]:
    """Launches by kind, where the kinds part, and what a request and a prompt's token add, as HostTime has them.

    Kinds of steps with prompts are told apart where the logarithms of their launch times have the largest variance
    between the two groups.
    """
    prompts = steps.take(~steps.only_decode)
    order = np.argsort(prompts.num_tokens, kind="stable")
    tokens, seconds = prompts.num_tokens[order], np.maximum(prompts.launch[order], 1e-6)
    log = np.log(seconds)
    left = np.arange(1, len(log))
    between = (np.cumsum(log)[:-1] - left * log.mean()) ** 2 / (left * (len(log) - left))
    most = float(tokens[int(np.argmax(np.where(tokens[:-1] < tokens[1:], between, -1.0)))])
    replayed = ~steps.only_decode & (steps.num_tokens <= most)
    kinds = [steps.only_decode, replayed, ~(steps.only_decode | replayed)]
    columns = np.stack([*kinds, steps.num_requests, steps.features[:, 0]], axis=1).astype(np.float64)
    decode, first, second, per_request, per_token = _non_negative(columns, steps.launch).tolist()
    return decode, first, second, most, per_request, per_token


def _non_negative(columns: FloatArray, seconds: FloatArray) -> FloatArray:
    """Coefficients of at least 0 with `columns @ coefficients` near `seconds`: relative errors, without pauses."""
    # Far below a microsecond nothing is measured: such times must not get all the weight.
    relative = 1 / np.maximum(seconds, 1e-6)
    scale = np.maximum(np.abs(columns).max(axis=0), 1e-300)

    def solve(weight: FloatArray) -> FloatArray:
        rows = np.sqrt(weight) * relative
        return np.asarray(nnls(columns / scale * rows[:, None], seconds * rows)[0] / scale)

    weight = np.ones(len(seconds))
    for _ in range(ROUNDS):
        residual = np.abs(columns @ solve(weight) - seconds) * relative
        spread = 1.4826 * np.median(residual) + 1e-9
        weight = np.minimum(1.0, HUBER * spread / np.maximum(residual, 1e-12))
    fitted = columns @ solve(weight)
    return solve((seconds <= PAUSE * fitted).astype(np.float64))


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
    return (
        f"{machine}, commit {commit}, {manifest['strategy']['allocator']} x {manifest['strategy']['scheduler']}, "
        + (f"{len(runs)} runs of workload {manifest['workload']['name']}, seed {', '.join(map(str, seeds))}")
    )
