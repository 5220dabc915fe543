"""`kvarena.run` and `kvarena.sweep`: the main job and its sweeps, called from Python.

They compose the config that the command line would and go through the same `execute`; nothing of the process is taken
over: no arguments are read, no logging is set up, nothing is printed but warnings on stderr.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.singleton import Singleton
from hydra.initialize import initialize_config_dir
from hydra.types import RunMode
from omegaconf import DictConfig, open_dict

from kvarena.engine.errors import ConfigError, KvarenaError, NotDefined
from kvarena.experiments.building.model_files import check_model
from kvarena.experiments.folders.failures import write_failure
from kvarena.experiments.folders.place import RUN, SWEEP, check_place
from kvarena.experiments.jobs.outcomes import outcome
from kvarena.experiments.jobs.unserved import Unserved, why_unserved
from kvarena.experiments.settings.compose import CONF_DIR, compose_cell, named_choices
from kvarena.experiments.settings.config import RunConfig
from kvarena.experiments.settings.explain import explain, own_error
from kvarena.experiments.settings.outside import offer_installed
from kvarena.reports.reading.names import cell_name
from kvarena.settings import Strategy, as_overrides

if TYPE_CHECKING:
    from kvarena.experiments.building.shared import SharedParts
    from kvarena.experiments.sweeps.sweep_plan import Job, Plan
    from kvarena.results import Comparison, Result

QUIET = "report.progress=false"  # a bar of progress is for a terminal; report={"progress": True} brings it back


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Every mistake in settings, files or requests leaves as a KvarenaError of one line; a bug as it is."""
    try:
        yield
    except KvarenaError:
        raise
    except Exception as error:
        message = explain(error)
        if message is None:
            raise
        raise own_error(error) or ConfigError(message) from None


def run(
    allocator: Strategy = "paged",
    scheduler: Strategy = "continuous",
    *,
    folder: str | Path | None = None,
    overrides: Sequence[str] = (),
    **settings: Any,
) -> Result:
    """Run one cell in this process and read its result: `python run.py`, from Python.

    Args:
        allocator: a registered allocator's name, or a class of your own (or a function that makes one's instance);
            reports call it by its own name.
        scheduler: the same of a scheduler.
        folder: where the run's files go; None: a new folder `outputs/DATE/TIME` below the working directory. One that
            holds the finished result of the same cell is read and not run again.
        overrides: more settings, as on run.py's command line (`"workload.num_requests=8"`).
        settings: by section (`workload={"num_requests": 8}`), with dots (`**{"workload.num_requests": 8}`), or a
            group by the name of its choice (`workload="lognormal"`).

    Raises:
        Unserved: none of the requests finished; its `folder` has the run's files.
        KvarenaError: a bad setting or a failed run, in one line.
    """
    with one_line_errors():
        made = [*as_overrides({"allocator": allocator, "scheduler": scheduler, **settings}), *_listed(overrides)]
        check_ours(made)
        config, choices = compose_cell([QUIET, *made])
        _check_one(config)
        return _run(config, choices, _place(folder, "outputs"))


def sweep(
    allocator: Strategy | Sequence[Strategy] = "paged",
    scheduler: Strategy | Sequence[Strategy] = "continuous",
    *,
    folder: str | Path | None = None,
    overrides: Sequence[str] = (),
    **settings: Any,
) -> Comparison:
    """Run the product of all swept values in this process, one cell after the other, and compare: `run.py -m`.

    Cells share the model, and the runner where nothing of it differs. A cell that fails is left out of the comparison
    with a warning; `Comparison.failed` has its error.

    Args:
        allocator: as of `run`, or several in a list.
        scheduler: as of `run`, or several in a list.
        folder: where the cells and the comparison go; None: a new folder `multirun/DATE/TIME` below the working
            directory. Cells that are finished there are not run again.
        overrides: more settings, as on the command line (`"workload.seed=0,1"`).
        settings: as of `run`; a list holds the values of the sweep (a setting that is a list itself: a list of lists).
            `sweep={"rounds": 5}` repeats measured cells, `report={"baseline": NAME}` names the cell that the others
            are compared with.

    Raises:
        KvarenaError: a bad setting, or no cell ran.
    """
    # Here, as below: torch and pandas are loaded where they are needed.
    from kvarena.experiments.building.shared import SharedParts
    from kvarena.experiments.sweeps.sweep_plan import make_plan

    with one_line_errors():
        given = {"allocator": allocator, "scheduler": scheduler, **settings}
        made = [*as_overrides(given, swept=True), *_listed(overrides)]
        check_ours(made)
        place = _place(folder, "multirun")
        check_place(place, SWEEP)
        made = [QUIET, *made, *as_overrides({"hydra.sweep.dir": str(place)})]
        offer_installed(made)
        before = Singleton.get_state()
        GlobalHydra.instance().clear()
        try:
            with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
                hydra = GlobalHydra.instance().hydra
                assert hydra is not None
                config = hydra.compose_config("config", made, RunMode.MULTIRUN, from_shell=False)
                loader = hydra.config_loader
                parser = OverridesParser.create(config_loader=loader)
                plan = make_plan(config, loader, parser.parse_overrides(list(config.hydra.overrides.task)))
                shared = SharedParts()
                for job in (job for batch in plan.batches for job in batch):
                    cell = loader.load_sweep_config(config, job.command())
                    job.outcome = _outcome(job, cell, str(place), shared)
        finally:
            Singleton.set_state(before)
        return _compare(plan, config, place)


def _listed(overrides: Sequence[str]) -> Sequence[str]:
    """The same. Raises ConfigError where they are no list of settings: a string is one of letters."""
    if isinstance(overrides, str) or not all(isinstance(one, str) for one in overrides):
        raise ConfigError(f"overrides={overrides!r} must be a list of strings, such as ['workload.num_requests=8']")
    return overrides


def check_ours(overrides: Sequence[str]) -> None:
    """See that nothing is asked of Hydra's command line, which is not there. Raises ConfigError."""
    for override in overrides:
        key = override.lstrip("+~").partition("=")[0]
        if key.startswith(("hydra.", "hydra/")) and key != "hydra.searchpath":
            raise ConfigError(
                f"{key} is the command line's (run.py); from Python give folder=..., and cells run in this process"
            )


def _check_one(config: RunConfig) -> None:
    """See that a config is one run's."""
    if config.mode != "run":
        raise ConfigError(
            f"mode={config.mode} is the command line's (kvarena serve); kvarena.LLM generates in this process"
        )
    if config.study is not None:
        raise ConfigError("experiment=NAME runs several cells: python run.py experiment=NAME, then kvarena.load(DIR)")
    if config.target is None:
        check_model(config)


def _run(
    config: RunConfig, choices: dict[str, str], place: Path, group: str | None = None, shared: SharedParts | None = None
) -> Result:
    from kvarena.experiments.jobs.job import execute
    from kvarena.results import Result

    name = cell_name(choices["allocator"], choices["scheduler"], choices.get("router"))
    if group is None and config.sweep.rounds != 1:
        raise ConfigError(f"sweep.rounds={config.sweep.rounds} repeats the cells of a sweep; use kvarena.sweep")
    if group is None and config.report.baseline is not None:
        raise ConfigError(f"report.baseline={config.report.baseline} names a cell of a sweep; use kvarena.sweep")
    summary = execute(config, place, name, choices, group, shared)
    if (reason := why_unserved(summary)) is not None:
        raise Unserved(reason, place)
    return Result(place)


def _outcome(job: Job, cell: DictConfig, group: str, shared: SharedParts) -> dict[str, Any]:
    """Run a sweep's cell; what it came to. Raises what is a bug."""
    choices = named_choices(cell.hydra.runtime.choices)
    with open_dict(cell):
        del cell["hydra"]
    try:
        config = RunConfig.of(cell)
        _check_one(config)
        _run(config, choices, job.folder, group, shared)
    except Unserved as error:
        return outcome(job.folder, unserved=str(error))
    except Exception as error:
        shared.clear()  # its runner may hold what the cell left undone
        message = explain(error)
        if message is None:
            raise
        not_defined = isinstance(own_error(error), NotDefined)
        write_failure(job.folder, job.command(), message, RUN, not_defined=not_defined)
        return outcome(job.folder, message, not_defined=not_defined)
    return outcome(job.folder)


def _compare(plan: Plan, config: DictConfig, place: Path) -> Comparison:
    """Write the sweep's record and its comparison, and read them."""
    from kvarena.experiments.folders.lock import only_writer
    from kvarena.experiments.sweeps.sweep import collect, save_sweep
    from kvarena.reports.pages.comparison import write_comparison
    from kvarena.results import Comparison

    with only_writer(place):
        record = collect(place, plan, config.report.baseline)
        left_out = [*record["failed"], *record["unserved"]]
        if not record["runs"]:
            reasons = [entry["error"] for entry in (*left_out, *record["not_defined"])]
            raise KvarenaError(f"no cell of the sweep ran: {reasons[0]}")
        save_sweep(place, record, config)
        write_comparison(place)
    for entry in left_out:
        warnings.warn(f"{entry['name']}: {entry['error']}", stacklevel=3)
    return Comparison(place)


def _place(folder: str | Path | None, kind: str) -> Path:
    """The folder for the files, made. Raises ConfigError."""
    now = datetime.now()
    place = Path(kind) / f"{now:%Y-%m-%d}" / f"{now:%H-%M-%S}" if folder is None else Path(folder)
    number, stem = 1, place.name
    try:
        while True:
            try:
                place.mkdir(parents=True, exist_ok=folder is not None)
            except FileExistsError:
                if folder is not None:
                    raise
                number += 1  # two runs within a second
                place = place.with_name(f"{stem}-{number}")
            else:
                return place
    except OSError as error:
        raise ConfigError(
            f"cannot make the folder {place} ({error.strerror}); give another one (folder=...)"
        ) from error
