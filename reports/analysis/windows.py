"""Over which steps KV memory is averaged.

Headlines, tiles, grids and the terminal take all steps, the one window that every run has. Empty memory costs something
only while a request wants it, so beside it there are two windows of steps in which requests wait. But a pool that
wastes nothing is full by construction while requests wait for room: such a share never stands alone, and with it stands
how much of the step time its window covers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from kvarena.reports.drawing.format import percent
from kvarena.reports.reading.files import RunFiles


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
WINDOWS = (ALL, WAITING, ROOM)

DEFINITION = (
    "“all steps”: every step of the run. “any waiting”: at least one request is in the queue. “waiting for room”: of "
    "these, the steps with token budget and sequences to spare, so that only memory (or a static batch that is not "
    "over) kept the queue out; an allocator that wastes nothing is full in those steps by construction, whatever it "
    "does in the others. Means over steps are weighted by step time; idle time is in no window."
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


def kv_use(summary: dict[str, Any], name: str = "token_states") -> float | None:
    """Mean share of the pool in a ledger class over all steps: the one window that every run has.

    Args:
        summary: of a run, or of a comparison's cell.
        name: of the class.
    """
    split = summary[f"kv_share_mean{ALL.suffix}"]
    return split[name] if split else None


def kv_use_text(summary: dict[str, Any]) -> str:
    """What filled the pool, in which windows and how much of the run these cover; empty where no step ran."""
    tokens, cached = kv_use(summary), kv_use(summary, "cached")
    if tokens is None:
        return ""
    text = f"token states filled {percent(tokens)} of the KV pool {ALL.phrase}"
    if cached:
        text += f" and cached prefixes {percent(cached)}"
    return f"{text}, {room_text(summary)}"


def room_text(summary: dict[str, Any]) -> str:
    """The share of token states while requests waited for room, with what that window covers."""
    split = summary[f"kv_share_mean{ROOM.suffix}"]
    if split is None:
        return "and no request waited for room"
    covered = percent(summary[f"step_time_share{ROOM.suffix}"])
    return f"{percent(split['token_states'])} {ROOM.phrase} ({covered} of the step time)"
