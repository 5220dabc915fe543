"""Which cells a sweep has, where each one lies, and in which order they run.

overrides --> product of the swept values --> cells, each composed and given its folder
for each seed: for each round: every cell once, in an order that changes --> batches of jobs
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_loader import ConfigLoader
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override, Quote, QuotedString
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from kvarena.engine.errors import ConfigError
from kvarena.experiments.folders.cell_folders import CellFolders, stem_of, whole_key
from kvarena.experiments.folders.cell_state import key_of
from kvarena.experiments.folders.sources import digest
from kvarena.experiments.jobs.outcomes import outcome
from kvarena.experiments.settings.command_line import command_of
from kvarena.experiments.settings.compose import named_choices
from kvarena.experiments.settings.config import SweepConfig, plain_values, read
from kvarena.experiments.settings.run_order import order
from kvarena.reports.comparing.cells import STRATEGY, is_seed
from kvarena.reports.reading.errors import NotWritten

MOST_TITLE = 300  # characters
OURS = ("hydra.sweep.subdir", "sweep.round")  # what a sweep sets for each of its cells


@dataclass(eq=False)
class Job:
    """One cell in one round.

    Attributes:
        round: from 0; None where it is not repeated.
        overrides: of the grid's cell.
        name: the swept settings, as a person gave them.
        stem: its folder's name without digits and round.
        folder: where it runs.
        title: what is said when it begins: `[3/12] allocator=paged workload.seed=2`, by its place in the order.
        outcome: what it came to, once it has run; at once where its folder cannot be made.
    """

    round: int | None
    overrides: list[str]
    name: str
    stem: str
    folder: Path
    title: str = ""
    outcome: dict[str, Any] = field(default_factory=dict)

    def command(self) -> list[str]:
        """The overrides that make a launcher run it."""
        repeat = [] if self.round is None else [f"sweep.round={self.round}"]
        title = QuotedString(self.title.replace("${", "$ {"), Quote.single).with_quotes()
        return [*self.overrides, *repeat, f"hydra.sweep.subdir={self.folder.name}", f"hydra.job.name={title}"]


@dataclass(frozen=True)
class Plan:
    """A sweep's jobs.

    Attributes:
        jobs: as the grid has them: cell by cell, and of a cell round by round.
        batches: the same jobs in the order in which they run; one batch ends before the next begins.
        rounds: how often a measured cell runs.
        num_single: simulated cells that rounds would only repeat to the digit, and that run once.
        command: the words of the command line.
    """

    jobs: list[Job]
    batches: list[list[Job]]
    rounds: int
    num_single: int
    command: list[str]


def make_plan(config: DictConfig, loader: ConfigLoader, overrides: list[Override]) -> Plan:
    """Compose every cell of a sweep and give it its folder.

    Args:
        config: the sweep's own config, with its hydra node.
        loader: composes a cell's config.
        overrides: of the command line.

    Raises:
        ConfigError: a setting of section `sweep` is out of range or swept, or the folders cannot be made.
        hydra.errors.HydraException: a cell cannot be composed.
    """
    sweep = read(SweepConfig, plain_values(config.sweep))
    last = {override.get_key_element(): override.is_sweep_override() for override in overrides}
    swept = [key for key, is_swept in last.items() if is_swept]
    for name in swept:
        if name.lstrip("+").split(".")[0] in ("sweep", "hydra"):
            raise ConfigError(f"{name} holds for a whole sweep; give it one value")
    for given in (*config.hydra.overrides.hydra, *config.hydra.overrides.task):
        if (name := given.lstrip("+").partition("=")[0]) in OURS:
            raise ConfigError(f"{name} is what a sweep sets for each of its cells; leave it out")
    [grid] = BasicSweeper.split_arguments(overrides, None)
    folders = CellFolders(Path(config.hydra.sweep.dir))
    jobs: list[Job] = []
    seeds: list[tuple[str, ...]] = []
    num_single = 0
    for number, cell in enumerate(grid):
        settings = {key: value for key, _, value in (item.partition("=") for item in cell) if key in swept}
        composed = loader.load_sweep_config(config, list(cell))
        single = sweep.rounds == 1 or _repeats_to_the_digit(composed)
        num_single += single and sweep.rounds > 1
        name = ", ".join(f"{key}={value}" for key, value in settings.items()) or ", ".join(cell) or "the defaults"
        stem = stem_of(_names(composed), {key: value for key, value in settings.items() if key not in STRATEGY})
        for repeat in [None] if single else range(sweep.rounds):
            key = _key(composed, number, repeat, cell)
            folder, refused = _claim(folders, stem, key, sweep)
            if any(job.folder == folder for job in jobs):
                continue  # the grid names this cell twice
            words = [f"{key}={value}" for key, value in settings.items()] or [name]
            jobs.append(Job(repeat, list(cell), name, stem, folder, " ".join(words), refused))
            seeds.append(tuple(value for key, value in settings.items() if is_seed(key)))
    batches = _batches(jobs, seeds, sweep.rounds)
    _number(batches)
    return Plan(jobs, batches, sweep.rounds, num_single, command_of(config.hydra))


def _number(batches: Sequence[Sequence[Job]]) -> None:
    """Put the place of each job in the order before its title, and its round behind it."""
    jobs = [job for batch in batches for job in batch]
    for place, job in enumerate(jobs, 1):
        repeat = "" if job.round is None else f" round {job.round}"
        job.title = f"[{place}/{len(jobs)}] {job.title[:MOST_TITLE]}{repeat}"


def _claim(
    folders: CellFolders, stem: str, key: dict[str, Any], sweep: SweepConfig
) -> tuple[Path, dict[str, Any]]:  # fmt: skip
    """The cell's folder; where it cannot be made, the one that it would have, and what the cell came to."""
    try:
        return folders.claim(stem, key, allow_mixed=sweep.allow_mixed), {}
    except NotWritten as error:
        folder = folders.parent / f"{stem}-{whole_key(key)}"
        return folder, outcome(folder, str(error))


def _names(composed: DictConfig) -> list[str]:
    """What a cell's folder is called by."""
    choices = composed.hydra.runtime.choices
    if composed.study is not None:
        return [str(choices.get("experiment"))]
    if composed.target is not None:
        return [str(composed.http.name or str(composed.target).split("://")[-1])]
    strategy = named_choices(choices)
    return [strategy[group] for group in STRATEGY if group in strategy]


def _repeats_to_the_digit(composed: DictConfig) -> bool:
    """Whether a cell is simulated: a virtual clock has no noise that another round could show."""
    if composed.study is not None:
        raise ConfigError("sweep.rounds repeats cells, not experiments; leave it out with experiment=NAME")
    return composed.target is None and OmegaConf.select(composed, "runner.kind") == "simulated"


def _key(composed: DictConfig, number: int, repeat: int | None, cell: Sequence[str]) -> dict[str, Any]:
    """The cell's key, as the job itself will find it."""
    choices = named_choices(composed.hydra.runtime.choices)
    whole = composed.copy()  # Hydra locks the one that it is given
    with open_dict(whole):
        whole.hydra.job.id = whole.hydra.job.num = number
        whole.sweep.round = repeat
        cfg = whole.copy()
        del cfg["hydra"]
    before = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(whole)
    try:
        values = plain_values(cfg)
        key, study = key_of(values, choices), values["study"]
    except OmegaConfBaseException:  # the job says what cannot be resolved
        return {"config": digest(list(cell)), "code": None, "machine": None, "round": repeat}
    finally:
        HydraConfig.instance().cfg = before
    return key if study is None else key | {"config": digest([key["config"], study])}


def _batches(jobs: list[Job], seeds: list[tuple[str, ...]], rounds: int) -> list[list[Job]]:
    """Seed by seed and round by round, every cell once, in an order that changes from one to the next.

    With rounds each of them is a batch, so that no launcher runs two at the same time; without there is one batch.
    """
    batches: list[list[Job]] = []
    step = 0
    for seed in dict.fromkeys(seeds):
        ours = [job for job, own in zip(jobs, seeds, strict=True) if own == seed]
        for repeat in range(rounds):
            now = [job for job in ours if (job.round or 0) == repeat and not job.outcome]
            batches.append([now[place] for place in order(len(now), step)])
            step += 1
    batches = [batch for batch in batches if batch]
    return batches if rounds > 1 else [[job for batch in batches for job in batch]]
