"""The Hydra entry behind run.py, with errors that a person can read.

Hydra prints its own errors over several lines and hides the cause of a failed instantiation. Here every mistake in
the config or its values becomes one line on stderr and exit code 2; a bug keeps its stack trace.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from contextvars import ContextVar
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.plugins.plugin import Plugin
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from kvarena.engine.errors import ConfigError, NotDefined
from kvarena.experiments.building.model_files import check_model
from kvarena.experiments.folders.failures import record_failure
from kvarena.experiments.folders.place import EXPERIMENT, RUN
from kvarena.experiments.jobs.outcomes import outcome
from kvarena.experiments.jobs.unserved import Unserved
from kvarena.experiments.recording.interruption import Interrupted, Signals
from kvarena.experiments.settings.compose import CONF_DIR
from kvarena.experiments.settings.config import RunConfig
from kvarena.experiments.settings.explain import explain, own_error
from kvarena.experiments.settings.loading import need_extra, say_loading
from kvarena.experiments.settings.near import did_you_mean
from kvarena.experiments.settings.outside import offer_installed
from kvarena.experiments.sweeps.ray_launcher import RayLauncher
from kvarena.experiments.sweeps.sweep import ENDED_SWEEP, EndedSweep
from kvarena.experiments.sweeps.sweeper import KvarenaSweeper
from kvarena.reports.drawing.plain_text import write_any_text

if TYPE_CHECKING:  # torch
    from kvarena.experiments.building.shared import SharedParts

USER_ERROR = 2
# Of a launcher's process: what ended the cell that it ran before. There is no other way from one cell to the next.
ENDED_BY: ContextVar[int | None] = ContextVar("ENDED_BY", default=None)


def main() -> int:
    """Run the job, or the sweep with -m, that the command line describes; returns the exit code."""
    write_any_text()
    # Hydra then raises its errors instead of printing them and exiting (hydra/_internal/utils.py).
    os.environ["HYDRA_FULL_ERROR"] = "1"
    ENDED_SWEEP.set(None)
    _register(KvarenaSweeper, RayLauncher)
    invocation = Invocation()

    @hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name="config")
    def job(cfg: DictConfig) -> dict[str, Any]:
        return invocation.job(cfg)

    try:
        _check_options(sys.argv[1:])
        offer_installed(sys.argv[1:])
        with invocation.signals, invocation:
            job()
    except Exception as error:
        message = invocation.line_of(error)
        if message is None:
            raise
        invocation.failures.append(message)
    except KeyboardInterrupt as error:
        stopped = error if isinstance(error, Interrupted) else Interrupted(signal.SIGINT)
        with suppress(OSError):  # of SIGHUP the terminal may be gone
            print(f"error: {stopped.line()}", file=sys.stderr)
        return 128 + stopped.number
    if (ended := ENDED_SWEEP.get()) is not None:
        invocation.take_over(ended)
    return invocation.end()


def _check_options(args: Sequence[str]) -> None:
    """Read the options as Hydra will, whose parser says what is wrong over several lines. Raises ConfigError."""

    def error(message: str) -> NoReturn:
        given = message.partition("unrecognized arguments: ")[2].partition(" ")[0]
        meant = (
            did_you_mean(given, [name for name in parser._option_string_actions if name[:2] == "--"]) if given else ""
        )
        raise ConfigError(f"{message}{meant}; settings are key=value (--hydra-help lists the options)")

    parser = get_args_parser()
    parser.error = error  # type: ignore[method-assign]
    parser.parse_args(args)


class Invocation:
    """What one command line came to, over all jobs that Hydra makes of it.

    Errors are taken in here where they can be: one that leaves a job makes Hydra print lines of its own.

    Attributes:
        signals: what ends a run after its step.
        failures: lines of what failed.
    """

    def __init__(self) -> None:
        self.signals = Signals()
        self.failures: list[str] = []
        self._undefined: list[str] = []
        self._num_finished = 0
        self._exit_code = 0
        self._started = False
        self._process = os.getpid()
        self._shared: SharedParts | None = None

    def __enter__(self) -> Invocation:
        return self

    def __exit__(self, *_error: object) -> None:
        """Let go of what the cells of a sweep shared."""
        if self._shared is not None:
            self._shared.clear()

    def job(self, cfg: DictConfig) -> dict[str, Any]:
        """One job of Hydra's, here or in a launcher's process; its outcome."""
        self._started = True
        folder = Path(HydraConfig.get().runtime.output_dir)
        if os.getpid() == self._process:
            return self._run(cfg, folder)
        # A launcher's process runs one cell after another, and a signal to it is meant for all of them.
        if (number := ENDED_BY.get()) is not None:
            return outcome(folder, interrupted=number)
        try:
            with Signals():
                return self._run(cfg, folder)
        except Interrupted as stopped:
            ENDED_BY.set(stopped.number)
            return outcome(folder, interrupted=stopped.number)

    def _run(self, cfg: DictConfig, folder: Path) -> dict[str, Any]:
        say = _announcer(cfg)
        say("")
        try:
            folder = self._carry_out(cfg, folder)
        except Interrupted as stopped:
            if HydraConfig.get().mode is RunMode.RUN:
                stopped.setting, stopped.folder = "hydra.run.dir", folder
            raise
        except Unserved as error:
            self.failures.append(str(error))
            return outcome(error.folder, unserved=str(error))
        except Exception as error:
            message = explain(error)
            if message is None:
                raise
            not_defined = isinstance(own_error(error), NotDefined)
            record_failure(message, RUN if cfg.study is None else EXPERIMENT, not_defined=not_defined)
            say(f": {'not defined' if not_defined else 'failed'}: {message}")
            (self._undefined if not_defined else self.failures).append(message)
            return outcome(folder, message, not_defined=not_defined)
        self._num_finished += 1
        return outcome(folder)

    def _carry_out(self, cfg: DictConfig, folder: Path) -> Path:
        """Serve, make an experiment or run a cell; the folder with what it left."""
        config = RunConfig.of(cfg)
        _check_baseline(config)
        if config.target is None:
            check_model(config, tokenizer=config.mode == "serve")
        if config.mode == "serve":
            with self.signals.released():
                self._exit_code = max(self._exit_code, _serve(config))
            return folder
        # Imported here: what is wrong with the command line or the model is answered without loading torch.
        say_loading(enabled=config.report.progress)
        from kvarena.experiments.folders.run_folder import write_hydra

        on_start = functools.partial(write_hydra, cfg=cfg)
        if config.study is None:
            return self._run_cell(config, on_start)
        from kvarena.experiments.studies.run import run_study

        run_study(config, on_start)
        return folder

    def _run_cell(self, config: RunConfig, on_start: Callable[[Path], None]) -> Path:
        """Run a cell. Those of a sweep that run in this process share model, pool and graphs while these are alike."""
        from kvarena.experiments.building.shared import SharedParts
        from kvarena.experiments.jobs.job import run_job

        if HydraConfig.get().mode is RunMode.RUN or os.getpid() != self._process:
            return run_job(config, on_start)
        if self._shared is None:
            self._shared = SharedParts()
        try:
            return run_job(config, on_start, self._shared)
        except (Unserved, NotDefined):
            raise
        except BaseException:
            self._shared.clear()  # its runner may hold what the cell left undone
            raise

    def line_of(self, error: Exception) -> str | None:
        """The line for an error that left Hydra; None for a bug."""
        # Hydra makes the folder before the job.
        if isinstance(error, OSError) and error.errno is not None and not self._started:
            return (
                f"cannot make the run's folder {error.filename} ({error.strerror}); set hydra.run.dir, or "
                "hydra.sweep.dir with -m, to one that can be made"
            )
        return explain(error, sys.argv[1:])

    def take_over(self, ended: EndedSweep) -> None:
        """Count a sweep's cells by its record: they may have run in other processes."""
        if ended.record:
            self.failures = [entry["error"] for entry in (*ended.record["failed"], *ended.record["unserved"])]
            self._undefined = [entry["error"] for entry in ended.record["not_defined"]]
            self._num_finished = len(ended.record["runs"])
        if ended.error is not None:
            message = explain(ended.error)
            if message is None:
                raise ended.error
            self.failures.append(f"no comparison: {message}")

    def end(self) -> int:
        """Say what failed; returns the exit code."""
        # A grid may cross settings that mean nothing together: its comparison says so. To run nothing is an error.
        failures = self.failures + (self._undefined if not self._num_finished else [])
        for message in failures:
            print(f"error: {message}", file=sys.stderr)
        return USER_ERROR if failures else self._exit_code


def _announcer(cfg: DictConfig) -> Callable[[str], None]:
    """What says on stderr which cell of a sweep begins (`[3/12] allocator=paged workload.seed=2`), and what became of
    it; outside of a sweep, and without report.progress, it says nothing.
    """
    hydra = HydraConfig.get()
    wanted = hydra.mode is RunMode.MULTIRUN and OmegaConf.select(cfg, "report.progress") is True

    def say(text: str) -> None:
        if wanted:
            print(f"{hydra.job.name}{text}", file=sys.stderr, flush=True)

    return say


def _register(*plugins: type[Plugin]) -> None:
    """Make our plugins known to Hydra, which looks their classes up by the names that the config gives them."""
    module = ModuleType(KvarenaSweeper.__module__)
    known = Plugins.instance()  # imports `hydra_plugins` where there is one
    for plugin in plugins:
        setattr(module, plugin.__name__, plugin)
        known.register(plugin)
    sys.modules.setdefault(module.__name__.partition(".")[0], ModuleType("hydra_plugins"))
    sys.modules[module.__name__] = module


def _check_baseline(config: RunConfig) -> None:
    """Only a sweep has other cells to compare with."""
    baseline = config.report.baseline
    if baseline is not None and HydraConfig.get().mode is not RunMode.MULTIRUN:
        raise ConfigError(
            f"report.baseline={baseline} names a cell of a sweep, and this is none; leave it out, sweep with -m, or "
            "compare finished runs with kvarena report DIR DIR --baseline NAME"
        )


def _serve(config: RunConfig) -> int:
    """Serve until the process is told to stop; returns its exit code."""
    if HydraConfig.get().mode is RunMode.MULTIRUN:
        raise ConfigError("mode=serve serves one strategy; leave -m out")
    need_extra("serve")
    from kvarena.experiments.serving.serve import serve

    return serve(config, HydraConfig.get().runtime.choices)
