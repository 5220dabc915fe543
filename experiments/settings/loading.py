"""What is said or refused before anything is loaded that takes time. Imports nothing that does."""

from __future__ import annotations

import sys

from kvarena.engine.errors import ConfigError
from kvarena.reports.reading.packages import missing_extra


def say_loading(*, enabled: bool) -> None:
    """Say, before torch is imported, what takes seconds from here on (on a slow disk many)."""
    if enabled and "torch" not in sys.modules:
        print("loading PyTorch ...", file=sys.stderr, flush=True)


def need_extra(extra: str) -> None:
    """Raises ConfigError, with what to type, where a package of kvarena[extra] is not installed."""
    if (reason := missing_extra(extra)) is not None:
        raise ConfigError(reason)
