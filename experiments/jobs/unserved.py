"""A run that served nobody: why, in one line, and what to change. It is an error, however whole the run's files are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvarena.engine.errors import KvarenaError

REMEDIES = {
    "rejected": "make the workload's requests shorter, or raise engine.max_model_len or the pool (kv_cache.num_slots)",
    "failed": "mend what the messages name",
    "aborted": "find what ended them: the server's log, or its time limit",
}
SERVER_REMEDIES = REMEDIES | {
    "rejected": "make the workload's requests shorter, or start the server with more room",
    "failed": "look into the server's log",
}
COUNTED_AS = {"rejected": "rejected", "error": "failed"}  # how an example's finish_reason is called


class Unserved(KvarenaError):
    """None of a run's requests finished.

    Attributes:
        folder: of the run, which is complete.
    """

    def __init__(self, message: str, folder: Path) -> None:
        super().__init__(message)
        self.folder = folder


def why_unserved(summary: dict[str, Any]) -> str | None:
    """Why none of a run's requests finished, with an example of each kind and what to do; None where one did.

    Args:
        summary: of the run (summary.json).
    """
    if summary["num_finished"]:
        return None
    if not summary["num_requests"]:
        return f"{summary['name']} was given no request; set workload.num_requests"
    kinds, ways = [], []
    for kind in summary["rejections"]:
        way = COUNTED_AS[kind["finish_reason"]]
        kinds.append(f"{kind['count']} {way} ({_one_line(kind['example'])})")
        ways.append(way)
    for way in REMEDIES:  # of aborted ones, and of a run that recorded nothing, there is no example
        if way not in ways and summary[f"num_{way}"]:
            kinds.append(f"{summary[f'num_{way}']} {way}")
            ways.append(way)
    remedies = SERVER_REMEDIES if summary.get("target") else REMEDIES
    advice = "; ".join(remedies[way] for way in dict.fromkeys(ways))
    asked = f"{summary['name']} finished none of {summary['num_requests']} requests"
    return f"{asked}: {', '.join(kinds)}. To serve any: {advice}"


def _one_line(text: str) -> str:
    return " ".join(text.split())
