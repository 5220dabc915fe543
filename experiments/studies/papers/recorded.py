"""Lines that a benchmark recorded on a GPU, for studies that run without one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvarena.engine.errors import ConfigError

RECORDED = Path(__file__).parent / "h100_figure18"
KERNEL_LINES = RECORDED / "kernels.jsonl"
SWAP_LINES = RECORDED / "swaps.jsonl"


def read_lines(path: str | None, recorded: Path) -> list[dict[str, Any]]:
    """The JSON lines of a file.

    Args:
        path: a user's own; None takes `recorded`.

    Raises:
        ConfigError: `path` cannot be read, or a line is not a JSON object.
    """
    source = Path(path) if path is not None else recorded
    try:
        lines = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise ConfigError(f"{source} cannot be read as JSON lines: {error}") from error
    if not all(isinstance(line, dict) for line in lines):
        raise ConfigError(f"{source} must hold one JSON object a line, as the benchmark prints them")
    return lines


def device_of(lines: Sequence[Mapping[str, Any]]) -> str | None:
    """The GPU that the lines name."""
    return next((line["device"] for line in lines if "device" in line), None)
