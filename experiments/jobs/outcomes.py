"""What a cell of a sweep came to, as its launcher hands it on. Imports nothing heavy."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def outcome(
    folder: Path,
    error: str | None = None,
    *,
    not_defined: bool = False,
    unserved: str | None = None,
    interrupted: int | None = None,
) -> dict[str, Any]:
    """What a job returns through its launcher, as plain values.

    Args:
        folder: where its files are.
        error: why it did not run; None where it did.
        not_defined: its settings mean nothing together.
        unserved: why none of its requests finished; None where one did.
        interrupted: the signal that ended it, in another process; None: none did.
    """
    return {"folder": str(folder), "error": error, "not_defined": not_defined, "unserved": unserved,
            "interrupted": interrupted}  # fmt: skip
