"""The words for what answered a run in place of this process's engine, and for the state of its prefix cache."""

from __future__ import annotations

from typing import Any

from kvarena.reports.drawing.format import DASH, count


def profile_name(simulation: dict[str, Any]) -> str:
    """`card profile h200`: figures of a card, or coefficients that were measured."""
    return f"{'card' if simulation['kind'] == 'analytic' else simulation['kind']} profile {simulation['profile']}"


def headline_prefix(simulation: dict[str, Any] | None) -> str:
    """How the headline of a run begins: by what it was simulated, nothing if it was measured."""
    return f"Simulated by the {profile_name(simulation)}: " if simulation else ""


def simulated(simulation: dict[str, Any]) -> str:
    """What stood in for the device, and how far it is from one."""
    figures = simulation.get("figures") or simulation
    error = figures.get("error")
    told = f"its error: {str(error).rstrip('.')}" if error else "it states no error of its times"
    return (
        f"no device computed this; all times are a virtual clock's, by the {profile_name(simulation)} "
        f"({figures.get('source') or DASH}); {told}"
    )


def simulated_machine(simulation: dict[str, Any], computer: str) -> str:
    """The machine that the times are of, and the one that worked them out."""
    figures = simulation.get("figures") or simulation
    return f"{figures.get('source') or simulation['profile']}; simulated on {computer}"


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
