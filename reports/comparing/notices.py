"""What a reader must know before believing a headline, one sentence each, in order of weight.

`summary["notices"]` of a run and of a comparison holds them; pages and the terminal show them right below the headline.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvarena.reports.analysis.engines import simulated
from kvarena.reports.comparing.cells import Cell
from kvarena.reports.comparing.contention import cells_had_company, run_had_company
from kvarena.reports.comparing.differences import hidden_differences
from kvarena.reports.drawing.format import count, percent, seconds, size_bytes

RECORDING_SHARE = 0.01  # of wall time; above it a measured run says so


def run_notices(summary: dict[str, Any]) -> list[str]:
    """The notices of one run.

    Args:
        summary: of the run, all but its headline and notices.
    """
    notices = [] if summary["valid"] else [_invalid(summary)]
    if summary.get("interrupted"):
        notices = [_interrupted(summary["interrupted"]), *notices]
    if summary["simulation"]:
        notices = [*summary["simulation"].get("outside", []), *notices]
        notices.append(f"Simulated: {simulated(summary['simulation'])}.")
    if summary["recorded"] == "none":
        notices.append(
            "Nothing was recorded (driver.record=none): this run has no latencies, tokens, steps or KV ledger, and its "
            "throughput is all that can be compared."
        )
    if ((summary["pool"].get("eviction") or {}).get("num_kinds") or 2) < 2:
        notices.append(
            "The workload names one kind of request at most, by which the eviction policy goes: here it is LRU."
        )
    notices += _kv_surplus([summary["model"]])
    notices += _answers(summary)
    if summary["num_steps"] and not summary["simulation"]:
        notices += _recording(summary["recording"] or {})
    return notices + run_had_company(summary)


def _interrupted(came: dict[str, Any]) -> str:
    """How far a run came that did not come to its end."""
    return (
        f"Not a whole run: interrupted ({came['by']}) when {count(came['num_ended'])} of its "
        f"{count(came['num_requests'])} requests had ended. Its numbers are of those; comparisons leave it out."
    )


def _kv_surplus(models: Sequence[dict[str, Any]]) -> list[str]:
    """By how much the pool holds more than a model needs; each model once."""
    lines = [
        f"KV bytes of {model['name']} are overstated: of its longest request ({count(found['num_tokens'])} tokens) the "
        f"pool holds {size_bytes(found['stored_bytes'])}, {found['stored_bytes'] / found['bytes']:.3g} times the "
        f"{size_bytes(found['bytes'])} that the model needs ({'; '.join(found['why'])})."
        for model in models
        if (found := model.get("kv_needed"))
    ]
    return list(dict.fromkeys(lines))


def _answers(summary: dict[str, Any]) -> list[str]:
    """What a server's answers leave open of their tokens and their times."""
    done, missing = summary["num_finished"], summary["num_without_first_token"]
    counts = (summary["target"] or {}).get("token_counts") or {}
    notices = []
    if missing:
        notices.append(
            f"{count(missing)} of {count(done)} finished requests brought no token that was timed: they have no TTFT "
            "and no TPOT, and keep no limit of an objective."
        )
    if number := counts.get("other_than_shown"):
        notices.append(
            f"In {count(number)} of {count(done)} answers the server counted (usage) another number of tokens than its "
            "chunks showed: its count is taken for rates, the chunks for times."
        )
    if number := counts.get("merged"):
        notices.append(
            f"In {count(number)} of {count(done)} answers tokens and chunks are not one for one: ITL is the gap "
            "between chunks, not between tokens, and an answer that came in one chunk has no TPOT."
        )
    if number := counts.get("not_stated"):
        notices.append(
            f"Of {count(number)} of {count(done)} answers the server did not count the tokens (usage): token ids are "
            "counted, or else chunks."
        )
    return notices


def _recording(recording: dict[str, Any]) -> list[str]:
    """What the recording took of a measured run, where that is much; and whether it showed."""
    share, delaying = recording.get("share"), recording.get("delaying_share")
    if share is None or share <= RECORDING_SHARE:
        return []
    took = f"Recording took {percent(share)} of the run's wall time, more than {percent(RECORDING_SHARE)}"
    if delaying is not None and delaying <= RECORDING_SHARE:
        return [f"{took}, nearly all of it while the device computed: it held the device up for {percent(delaying)}."]
    return [f"{took}: without it the run may be faster; driver.record=summary records less."]


def _invalid(summary: dict[str, Any]) -> str:
    """Why the run's latencies must not be trusted."""
    return (
        f"Invalid run: the driver handed a request over {seconds(summary['lateness_seconds']['max'])} after its "
        f"scheduled arrival, more than driver.max_lateness={summary['lateness_bound_seconds']:g} s allows."
    )


def comparison_notices(cells: Sequence[Cell], summary: dict[str, Any]) -> list[str]:
    """The notices of a comparison.

    Args:
        cells: its cells, labelled.
        summary: of the comparison, all but its headline and notices.
    """
    notices = [
        f"{cell['label']}: {line[:1].lower()}{line[1:]}" for cell in summary["cells"] for line in cell["outside"]
    ]
    notices += _simulated(cells)
    notices += _kv_surplus([cell.run.manifest["model"] for cell in cells])
    invalid = [cell["label"] for cell in summary["cells"] if not cell["valid"]]
    if invalid:
        notices.append(f"Invalid, because the driver fell behind its bound: {', '.join(invalid)}.")
    if summary["measured_together"]:
        notices.append(
            "Measured at the same time on one machine, so that each slowed the others down: "
            f"{', '.join(summary['measured_together'])}."
        )
    for kind in ("decode", "prefill"):
        if kernels := summary[f"{kind}_kernels"]:
            ran = "; ".join(f"{kernel}: {', '.join(labels)}" for kernel, labels in kernels.items())
            notices.append(
                f"{kind.title()} attention ran in different kernels ({ran}), so part of a difference may be theirs; "
                "runner.attention=triton gives all cells the same one."
            )
    return notices + hidden_differences(cells) + cells_had_company(cells)


def simulated_prefix(cells: Sequence[Cell]) -> str:
    """How a comparison's headline begins where cells were simulated; empty where none was."""
    number = sum(cell.is_simulated for cell in cells)
    if not number:
        return ""
    return "Simulated: " if number == len(cells) else f"{number} of {len(cells)} cells simulated: "


def _simulated(cells: Sequence[Cell]) -> list[str]:
    """By what profile cells were simulated, and which ones where others were measured."""
    by_profile: dict[str, list[str]] = {}
    for cell in cells:
        if cell.is_simulated:
            by_profile.setdefault(simulated(cell.run.manifest["simulation"]), []).append(cell.label)
    notices = []
    for words, labels in by_profile.items():
        who = "" if len(labels) == len(cells) else f" ({', '.join(labels)})"
        notices.append(f"Simulated{who}: {words}.")
    number = sum(map(len, by_profile.values()))
    if 0 < number < len(cells):
        notices.append(
            "Simulated beside measured, so that a ratio between the two is also the simulator's distance from the "
            "machine."
        )
    return notices
