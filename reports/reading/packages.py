"""Packages that are not installed: one line that says what to type, in place of a stack trace. Imports none itself."""

from __future__ import annotations

import sys

OURS = ("allocators", "engine", "experiments", "hydra_plugins", "reports", "schedulers")
LEAST_PYTHON = (3, 11)


def missing_package(error: BaseException) -> str | None:
    """One line about the package that this Python has not; None where `error` says anything else."""
    if not isinstance(error, ModuleNotFoundError) or not error.name:
        return None
    package = error.name.partition(".")[0]
    if package in OURS or package in sys.stdlib_module_names:
        return None
    return (
        f"{sys.executable} has no package {package}; type `make run`, which installs all that is needed into .venv, or "
        "install it here: python -m pip install -c constraints.txt -e ."
    )
