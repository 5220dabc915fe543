"""Which settings are best, by Optuna: a trial is one cell per seed, and the winner is tried again on fresh seeds.

    ask settings -> cells, one per seed of `seeds` -> mean objective -> tell -> ... -> best trial
    best and default settings, each on every seed of `confirm_seeds` -> ratio seed by seed, with its interval

The best of many noisy trials looks better than it is, so the gain is taken from seeds that chose nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvarena.engine.checks import check_choice, check_int
from kvarena.engine.errors import ConfigError, KvarenaError
from kvarena.experiments.studies.base import Chart, Findings, Series
from kvarena.experiments.studies.cells import CellRunner
from kvarena.experiments.studies.claims import Claim, Mean, compared, measured
from kvarena.reports.drawing.format import interval
from kvarena.reports.reading.writing import write_csv

if TYPE_CHECKING:
    import optuna

TRIALS_FILE = "trials.csv"
CELL = ("report.pages=false", "report.kv_map=false")
DIRECTIONS = ("maximize", "minimize")


@dataclass(frozen=True)
class Setting:
    """One dimension of the search.

    Args:
        key: of the config, or a config group.
        choices: its values; or else
        low, high: its range, both ends in it; integers where both are.
        log: draw from the range by its logarithm.

    Raises:
        ConfigError: neither choices nor a range, or an empty one.
    """

    key: str
    choices: Sequence[Any] | None = None
    low: float | None = None
    high: float | None = None
    log: bool = False

    def __post_init__(self) -> None:
        ranged = self.low is not None and self.high is not None
        if (self.choices is not None) == ranged or (self.choices is not None and not self.choices):
            raise ConfigError(f"study.space: {self.key} needs either choices or low and high")
        if self.low is None or self.high is None:
            return
        if self.low >= self.high or (self.log and self.low <= 0):
            raise ConfigError(
                f"study.space: {self.key} needs low={self.low} below high={self.high}, and above 0 where log is set"
            )

    def suggest(self, trial: optuna.Trial) -> Any:
        """A value for `trial`."""
        if self.choices is not None:
            return trial.suggest_categorical(self.key, list(self.choices))
        assert self.low is not None
        assert self.high is not None
        if isinstance(self.low, int) and isinstance(self.high, int):
            return trial.suggest_int(self.key, self.low, self.high, log=self.log)
        return trial.suggest_float(self.key, self.low, self.high, log=self.log)


@dataclass(frozen=True)
class SearchStudy:
    """Args:
    space: what is searched; each entry as `Setting` takes it.
    objective: a number of the cells' summary.json, by its path (`ttft_seconds.p99`).
    direction: maximize | minimize.
    num_trials: how many settings are tried.
    seeds: of the workload; a trial's value is the mean over them.
    confirm_seeds: of the workload, for the winner beside the config's own settings; none of `seeds`.
    sampler_seed: of Optuna's TPE sampler.

    Raises:
        ConfigError: an option out of range, or Optuna is missing.
    """

    space: Sequence[Mapping[str, Any]]
    objective: str
    direction: str
    num_trials: int
    seeds: Sequence[int]
    confirm_seeds: Sequence[int]
    sampler_seed: int

    def __post_init__(self) -> None:
        try:
            import optuna  # noqa: F401
        except ImportError:
            raise ConfigError("experiment=search needs Optuna: pip install 'kvarena[sweep]'") from None
        check_choice("study.direction", self.direction, DIRECTIONS)
        check_int("study.num_trials", self.num_trials, 1)
        every = [*self.seeds, *self.confirm_seeds]
        if not self.seeds or not self.confirm_seeds or len(set(every)) < len(every):
            raise ConfigError("study.seeds and study.confirm_seeds must name at least one seed each, and none twice")
        if not self._settings():
            raise ConfigError("study.space must hold at least one setting")

    def _settings(self) -> list[Setting]:
        try:
            return [Setting(**entry) for entry in self.space]
        except TypeError as error:
            raise ConfigError(f"study.space: {str(error).removeprefix('Setting.__init__() ')}") from None

    def run(self, cells: CellRunner) -> Findings:
        """See `Study.run`."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        # In memory: with the same seed and the same cells it asks the same, so a search that was cut off goes on.
        search = optuna.create_study(
            direction="maximize" if self.direction == "maximize" else "minimize",
            sampler=optuna.samplers.TPESampler(seed=self.sampler_seed),
        )
        refused: dict[int, str] = {}
        for number in range(self.num_trials):
            trial = search.ask()
            overrides = self._overrides({setting.key: setting.suggest(trial) for setting in self._settings()})
            try:
                search.tell(trial, float(np.mean(self._values(cells, f"trial-{number:03d}", overrides, self.seeds))))
            except KvarenaError as error:  # these settings cannot run together; others can
                refused[number] = str(error)
                # The sampler forgets what failed and would ask it again; what was pruned counts as worst.
                search.tell(trial, state=optuna.trial.TrialState.PRUNED)
        self._write_trials(search, refused, cells.out_dir / TRIALS_FILE)
        if len(refused) == self.num_trials:
            raise ConfigError(f"study.space: no settings could run; the last error: {list(refused.values())[-1]}")
        best = search.best_trial
        ours = self._values(cells, "best", self._overrides(best.params), self.confirm_seeds)
        default = self._values(cells, "default", [], self.confirm_seeds)
        return self._findings(search, refused, ours, default)

    @staticmethod
    def _overrides(params: Mapping[str, Any]) -> list[str]:
        # A config group goes first: chosen after its own options, it would undo them.
        return [f"{key}={value}" for key, value in sorted(params.items(), key=lambda item: item[0].count("."))]

    def _values(self, cells: CellRunner, name: str, overrides: list[str], seeds: Sequence[int]) -> list[float]:
        """The objective of one cell per seed.

        Raises:
            ConfigError: the summary has no such number.
        """
        values: list[float] = []
        for seed in seeds:
            summary = cells.run(f"{name}-seed{seed}", [*CELL, *overrides, f"workload.seed={seed}"])
            value = _number_at(summary, self.objective)
            if value is None:
                raise ConfigError(
                    f"study.objective={self.objective} is no number of the cell's summary.json ({cells.folders[-1]}); "
                    f"it has {', '.join(key for key, one in summary.items() if isinstance(one, int | float | dict))}"
                )
            values.append(value)
        return values

    def _write_trials(self, search: optuna.Study, refused: dict[int, str], path: Path) -> None:
        keys = [setting.key for setting in self._settings()]
        rows = [
            [trial.number, *(trial.params.get(key) for key in keys), trial.value, refused.get(trial.number)]
            for trial in search.trials
        ]
        write_csv(path, rows, ["trial", *keys, self.objective, "error"])

    def _findings(
        self, search: optuna.Study, refused: dict[int, str], ours: list[float], default: list[float]
    ) -> Findings:
        best = search.best_trial
        settings = " ".join(self._overrides(best.params))
        ratio = Mean.of_ratios(ours, default) if all(default) else None
        means = {"best settings": Mean.of(ours), "the config's own settings": Mean.of(default)}
        claims: list[Claim] = [measured(name, "", mean) for name, mean in means.items()]
        gain = compared("best / own", ratio, note="fresh seeds") if ratio is not None else None
        if gain is not None:
            claims.append(gain)
        notes = [
            f"A trial's value is the mean of {self.objective} over workload seeds {', '.join(map(str, self.seeds))}; "
            f"{self.num_trials} trials by Optuna's TPE sampler (Bergstra et al., 2011), seed {self.sampler_seed}; all "
            f"of them are in {TRIALS_FILE}.",
            f"The best trial's own value, {best.value:,.4g}, was chosen as the best of many and flatters it. The table "
            f"has cells of seeds {', '.join(map(str, self.confirm_seeds))}, which chose nothing; interval: 95 %, "
            "Student's t over seeds, ratios seed by seed.",
        ]
        if refused:
            number, error = next(iter(refused.items()))
            notes.append(f"{len(refused)} trials could not run, the first of them ({number}): {error}")
        return Findings(
            title="Search: the settings that suit this load best",
            headline=f"{self.direction} {self.objective}: {settings}. {_gain(gain)}",
            source="this project's own measurement",
            claims=claims,
            charts=self._charts(search),
            notes=notes,
        )

    def _charts(self, search: optuna.Study) -> list[Chart]:
        from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

        done = [trial for trial in search.trials if trial.value is not None]
        values = [float(trial.value) for trial in done if trial.value is not None]
        better = np.maximum if self.direction == "maximize" else np.minimum
        numbers = [float(trial.number) for trial in done]
        series = [
            Series("trial", numbers, values),
            Series("best so far", numbers, [float(one) for one in better.accumulate(values)]),
        ]
        charts = [Chart("trials", "lines", "trial", self.objective, "Every trial, and the best until then.", series)]
        if len(self._settings()) > 1 and len(set(values)) > 1:
            shares = get_param_importances(search, evaluator=PedAnovaImportanceEvaluator())
            bars = Series("importance", list(shares), [100 * share for share in shares.values()])
            charts.append(
                Chart("importance", "bars", "setting", "share of importance (%)",
                      "How much each setting separates the best tenth of the trials from the rest (PED-ANOVA, Watanabe "
                      "et al., 2023).", [bars])
            )  # fmt: skip
        return charts


def _gain(claim: Claim | None) -> str:
    """What the winner gained on fresh seeds, as its table says."""
    if claim is None or claim.ours is None:
        return "The config's own settings give 0, so there is no ratio to them."
    ends = "" if claim.low is None else f" {interval((claim.low, claim.high), '{:.3f}'.format)}"
    return f"On fresh seeds that is {claim.ours:.3f}{ends} times the config's own settings: {claim.verdict}."


def _number_at(summary: Mapping[str, Any], path: str) -> float | None:
    """The finite number at `path` (keys, joined by dots); None where there is none."""
    node: Any = summary
    for key in path.split("."):
        node = node.get(key) if isinstance(node, Mapping) else None
    return float(node) if isinstance(node, int | float) and math.isfinite(node) else None
