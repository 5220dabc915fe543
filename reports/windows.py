"""Over which steps KV memory is averaged.

Empty memory costs something only while a request wants it. So beside all steps there are two windows of steps in
which requests wait, and each report names the one that a number comes from.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from reports.files import RunFiles


class Window(NamedTuple):
    """A set of steps.

    Attributes:
        suffix: ends the keys of summary.json.
        label: its name in tables and figures.
        phrase: its name in a sentence.
    """

    suffix: str
    label: str
    phrase: str


ROOM = Window("_while_waiting_for_room", "waiting for room", "while requests waited for room")
WAITING = Window("_while_waiting", "any waiting", "while any request waited")
ALL = Window("", "all steps", "over all steps")
WINDOWS = (ROOM, WAITING, ALL)

DEFINITION = (
    "“all steps”: every step of the run. “any waiting”: at least one request is in the queue. “waiting for room”: of "
    "these, the steps with token budget and sequences to spare, so that only memory (or a static batch that is not "
    "over) kept the queue out. Means over steps are weighted by step time; idle time is in no window."
)


def window_masks(run: RunFiles) -> dict[str, np.ndarray]:
    """Bool per step, by suffix. Limits that the manifest does not name are taken as never reached."""
    steps = run.steps
    waiting = steps["num_waiting"] > 0
    room = waiting.copy()
    for limit, column in (("max_num_batched_tokens", "num_new_tokens"), ("max_num_seqs", "num_running")):
        most = _limit(run.manifest, limit)
        if most is not None:
            room &= steps[column] < most
    return {ROOM.suffix: room, WAITING.suffix: waiting, ALL.suffix: np.ones(run.num_steps, dtype=bool)}


def _limit(manifest: dict[str, Any], name: str) -> int | None:
    scheduler = (manifest.get("config") or {}).get("scheduler") or {}
    details = (manifest.get("strategy") or {}).get("details") or {}
    value = scheduler.get(name, details.get(name)) if isinstance(scheduler, dict) else details.get(name)
    return value if isinstance(value, int) else None


def telling(summary: dict[str, Any]) -> tuple[Window, dict[str, float] | None]:
    """The window in which memory was scarce and its mean split; all steps when it never was.

    Requests that wait for the token budget say nothing about memory, so that window is never the answer.
    """
    split = summary[f"kv_share_mean{ROOM.suffix}"]
    return (ROOM, split) if split is not None else (ALL, summary[f"kv_share_mean{ALL.suffix}"])
