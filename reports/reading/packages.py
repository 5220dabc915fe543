"""Packages that are not installed: one line that says what to type, in place of a stack trace. Imports none itself."""

from __future__ import annotations

import sys
from importlib.util import find_spec

OURS = ("kvarena", "allocators", "engine", "experiments", "hydra_plugins", "reports", "routers", "schedulers")
# What only some commands need, by the extra of pyproject.toml that brings it along: modules by their own names.
EXTRAS = {
    "serve": ("fastapi", "httpcore", "llguidance", "msgpack", "starlette", "uvicorn", "uvloop"),
    "events": ("cbor2", "zmq"),
    "gpu": ("accelerate", "cuda"),
    "quantized": ("humming",),
    "modelscope": ("modelscope",),
    "sweep": ("joblib", "optuna", "submitit"),
    "ray": ("ray",),
    "tracking": ("alembic", "mlflow", "sqlalchemy", "wandb"),
    "tracing": ("opentelemetry",),
}


def missing_package(error: BaseException) -> str | None:
    """One line about the package that this Python has not; None where `error` says anything else."""
    if not isinstance(error, ModuleNotFoundError) or not error.name:
        return None
    package = error.name.partition(".")[0]
    if package in OURS or package in sys.stdlib_module_names:
        return None
    for extra, packages in EXTRAS.items():
        if package in packages:
            return _line(extra, package)
    return (
        f"{sys.executable} has no package {package}; type `make run`, which installs all that is needed into .venv, or "
        "install it here: python -m pip install -c constraints.txt -e ."
    )


def missing_extra(extra: str) -> str | None:
    """One line about a package of an extra that this Python has not; None where all of them are there."""
    missing = next((package for package in EXTRAS[extra] if find_spec(package) is None), None)
    return None if missing is None else _line(extra, missing)


def _line(extra: str, package: str) -> str:
    return (
        f"{sys.executable} has no package {package}, which comes with the extra `{extra}`; install kvarena[{extra}]: "
        f"python -m pip install 'kvarena[{extra}]' (in a checkout: -c constraints.txt -e '.[{extra}]')"
    )
