"""The Hydra entry behind run.py, with errors that a person can read.

Hydra prints its own errors over several lines and hides the cause of a failed instantiation. Here every mistake in
the config or its values becomes one line on stderr and exit code 2; a bug keeps its stack trace.
"""

from __future__ import annotations

import difflib
import os
import re
import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from engine.errors import ConfigError, KvarenaError, NotDefined
from experiments.compose import CONF_DIR, load_config

USER_ERROR = 2


def main() -> int:
    """Run the job, or the sweep with -m, that the command line describes; returns the exit code."""
    # Hydra then raises its errors instead of printing them and exiting (hydra/_internal/utils.py).
    os.environ["HYDRA_FULL_ERROR"] = "1"
    failures: list[str] = []
    undefined: list[str] = []
    finished: list[bool] = []
    exit_codes: list[int] = []

    # Errors are taken in here where they can be: one that leaves the job makes Hydra print lines of its own.
    @hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name="config")
    def job(cfg: DictConfig) -> None:
        # Imported here: a typing error in the command line is answered without loading torch.
        from experiments.job import record_failure, run_job

        try:
            if cfg.mode == "serve":
                exit_codes.append(_serve(cfg))
            elif cfg.mode == "run" and cfg.study is not None:
                from experiments.studies.run import run_study

                run_study(cfg)
            elif cfg.mode == "run":
                run_job(cfg)
            else:
                raise ConfigError(f"mode={cfg.mode} must be run or serve")
        except Exception as error:
            message = explain(error)
            if message is None:
                raise
            not_defined = isinstance(_own_error(error), NotDefined)
            record_failure(message, not_defined=not_defined)
            (undefined if not_defined else failures).append(message)
        else:
            finished.append(True)

    try:
        job()
    except (KvarenaError, HydraException, OmegaConfBaseException) as error:
        message = explain(error)
        if message is None:
            raise
        failures.append(message)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130
    # A grid may cross settings that mean nothing together: its comparison says so. To run nothing at all is an error.
    if not finished:
        failures += undefined
    for message in failures:
        print(f"error: {message}", file=sys.stderr)
    return USER_ERROR if failures else max(exit_codes, default=0)


def _serve(cfg: DictConfig) -> int:
    """Serve until the process is told to stop; returns its exit code."""
    if HydraConfig.get().mode is RunMode.MULTIRUN:
        raise ConfigError("mode=serve serves one strategy; leave -m out")
    from experiments.serve import serve

    return serve(cfg)


def explain(error: BaseException) -> str | None:
    """One line for a person, or None when `error` is not the user's doing but a bug."""
    own = _own_error(error)
    if own is not None:
        return str(own)
    if isinstance(error, InstantiationException):
        return _explain_instantiation(error, _causes(error))
    if not isinstance(error, (HydraException, OmegaConfBaseException)):
        return None
    text = " ".join(str(error).split())
    key = re.search(r"Could not override '([^']+)'", text) or re.search(r"Key '([^']+)' is not in struct", text)
    if key:
        return f"unknown config key {key[1]!r}{_suggestion(key[1])}"
    return text


def _own_error(error: BaseException) -> KvarenaError | None:
    """The error that kvarena raised, if there is one behind `error`."""
    return next((cause for cause in _causes(error) if isinstance(cause, KvarenaError)), None)


def _causes(error: BaseException) -> list[BaseException]:
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return chain


def _explain_instantiation(error: InstantiationException, chain: list[BaseException]) -> str | None:
    """A constructor refused its arguments: a wrong type in the config, else a bug."""
    section = re.search(r"full_key: (\S+)", str(error))
    where = f"config section {section[1]!r}: " if section else ""
    cause = chain[-1]
    return f"{where}{cause}" if isinstance(cause, (TypeError, ValueError)) else None


def _suggestion(key: str) -> str:
    """The config keys most like `key`, for the error line."""
    known: list[str] = []

    def walk(node: object, prefix: str) -> None:
        if isinstance(node, dict):
            for name, child in node.items():
                known.append(f"{prefix}{name}")
                walk(child, f"{prefix}{name}.")

    walk(OmegaConf.to_container(load_config()), "")
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.6)
    if not near:
        section = key.rsplit(".", 1)[0]
        near = [name for name in known if name.startswith(f"{section}.")] or [n for n in known if "." not in n]
        return f"; known: {', '.join(near)}"
    return f"; did you mean {' or '.join(near)}?"
