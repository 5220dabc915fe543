"""The words for what answered a run in place of this process's engine, and for the state of its prefix cache."""

from __future__ import annotations

from typing import Any

from reports.format import DASH, count


def simulated(simulation: dict[str, Any]) -> str:
    """What stood in for the device."""
    source = (simulation.get("figures") or simulation).get("source", DASH)
    return (
        f"no device computed this run: all times are a virtual clock's, by the {simulation['kind']} profile "
        f"{simulation['profile']} ({source})"
    )


def target(facts: dict[str, Any]) -> str:
    """What was driven, and what of the request it did not take."""
    text = f"{facts['url']}, model {facts['model']!r}, POST /v1/completions, streamed"
    if facts["extensions_refused"]:
        text += f"; it refused {', '.join(facts['extensions_refused'])}, so outputs may end early"
    if facts["num_other_prompt_lens"]:
        text += f"; it counted other prompt lengths than were sent in {count(facts['num_other_prompt_lens'])} requests"
    return text


def cache_state(summary: dict[str, Any]) -> str:
    """What the prefix cache had seen when the clock started."""
    if summary["cache"] == "warm":
        return "warm: every prompt ran once before the clock started"
    if summary["target"]:
        return "as the server had it: a target's cache is not emptied"
    return "cold: the run began with an empty cache"
