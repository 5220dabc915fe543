"""kvarena: compare KV-cache strategies for LLM inference on one engine, and serve the winner.

    kvarena.run(...), kvarena.sweep(...)     measure strategies, registered ones and your own (docs/python.md)
    kvarena.load(DIR)                        what a run, a sweep or an experiment left, as data frames
    kvarena.LLM(MODEL).generate(...)         texts, by any of the strategies

Importing it takes a moment and loads nothing heavy; each name loads what it needs when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvarena.engine.errors import KvarenaError
    from kvarena.llm import LLM
    from kvarena.results import Comparison, Experiment, Result, load
    from kvarena.running import run, sweep
    from kvarena.texts import CompletionOutput, RequestOutput, SamplingParams

__version__ = "0.1.0"
__all__ = [
    "LLM", "Comparison", "CompletionOutput", "Experiment", "KvarenaError", "RequestOutput", "Result", "SamplingParams",
    "__version__", "load", "run", "sweep",
]  # fmt: skip
_HOMES = {
    "kvarena.engine.errors": ("KvarenaError",),
    "kvarena.llm": ("LLM",),
    "kvarena.texts": ("CompletionOutput", "RequestOutput", "SamplingParams"),
    "kvarena.results": ("Comparison", "Experiment", "Result", "load"),
    "kvarena.running": ("run", "sweep"),
}


def __getattr__(name: str) -> Any:
    """A name of `__all__`, loaded when it is first used."""
    for home, names in _HOMES.items():
        if name in names:
            value = getattr(_loaded(home), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _loaded(home: str) -> Any:
    """A module of ours. Raises KvarenaError where a package is missing: `LLM` needs those of the extra `serve`."""
    try:
        return import_module(home)
    except ModuleNotFoundError as error:
        from kvarena.engine.errors import KvarenaError
        from kvarena.reports.reading.packages import missing_package

        if (reason := missing_package(error)) is None:
            raise
        raise KvarenaError(reason) from None


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
