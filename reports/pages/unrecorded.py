"""The report of a run that recorded nothing (`driver.record=none`): its throughput, and that this is all.

Such a run measures what recording costs the others. It has a manifest and no other file.
"""

from __future__ import annotations

import json
from typing import Any

from kvarena.reports.analysis.engines import headline_prefix
from kvarena.reports.comparing.notices import run_notices
from kvarena.reports.drawing.device_memory import device_memory_table
from kvarena.reports.drawing.document import Document, Section, Table, commands
from kvarena.reports.drawing.format import count, rate, seconds
from kvarena.reports.pages.run_sections import commit, facts, run_title
from kvarena.reports.reading.files import RunFiles


def summarize_unrecorded(run: RunFiles, empty: dict[str, Any]) -> dict[str, Any]:
    """The summary of such a run: every key that others have, null where nothing is known.

    Args:
        run: its files.
        empty: the summary of a run of the same manifest without requests and steps.
    """
    info = run.manifest["run"]
    totals = info["totals"]
    duration = totals["duration"]

    def per_second(number: float) -> float | None:
        return number / duration if duration > 0 else None

    known = {key: empty[key] for key in KNOWN}
    known |= {key: value for key, value in totals.items() if key != "duration"}
    output, prompt = totals["num_finished_output_tokens"], totals["num_finished_prompt_tokens"]
    bound = info.get("lateness_bound")
    summary = {key: blank(value) for key, value in empty.items()} | known
    summary |= {
        "duration_seconds": duration,
        "num_steps": info["num_steps"],
        "output_tokens_per_second": per_second(output),
        "total_tokens_per_second": per_second(output + prompt),
        "requests_per_second": per_second(totals["num_finished"]),
        "valid": bound is None or info["max_lateness"] <= bound,
        "lateness_seconds": blank(empty["lateness_seconds"]) | {"max": info["max_lateness"]},
        "rejections": [],
        "headline": (
            f"{headline_prefix(known['simulation'])}{run.manifest['name']} served {count(totals['num_finished'])} of "
            f"{count(totals['num_requests'])} requests at {rate(per_second(output))} output tokens/s; "
            "nothing else was recorded."
        ),
    }
    return summary | {"notices": run_notices(summary)}


# What the manifest says of any run.
KNOWN = (
    "schema_version", "kind", "name", "created", "strategy", "git", "machine", "versions", "model", "pool", "workload",
    "arrival", "command", "simulation", "target", "cache", "wall_time_seconds", "warmup_seconds", "processor_seconds",
    "peak_rss_bytes", "peak_gpu_bytes", "memory", "recorded", "recording", "kv_pool_slots", "kv_pool_bytes",
    "lateness_bound_seconds", "interrupted",
)  # fmt: skip


def blank(value: Any) -> Any:
    """The same shape with null for every number."""
    return {key: blank(inner) for key, inner in value.items()} if isinstance(value, dict) else None


def unrecorded_document(summary: dict[str, Any], config: Any) -> Document:
    """The report as a document."""
    rows = [
        ["output tokens/s", rate(summary["output_tokens_per_second"]),
         f"{count(summary['num_finished_output_tokens'])} output tokens of finished requests / duration"],
        ["duration", seconds(summary["duration_seconds"]), "first scheduled arrival to last finish"],
        ["processor time", seconds(summary["processor_seconds"]), "of all threads, while requests ran"],
        ["steps", count(summary["num_steps"]), ""],
        *([f"requests {key}", count(summary[f"num_{key}"]), ""]
          for key in ("finished", "rejected", "aborted", "failed")),
    ]  # fmt: skip
    table = Table(["", "value", "how"], rows, text_columns=frozenset({2}))
    return Document(
        kicker=f"kvarena · report of a {'simulated ' if summary['simulation'] else ''}run",
        title=run_title(summary),
        headline=summary["headline"].replace(" x ", " × "),
        notices=summary["notices"],
        verdict=None,
        facts=facts(summary),
        commands=commands(summary["command"]),
        tiles=[
            ("Output throughput", f"{rate(summary['output_tokens_per_second'])} tok/s",
             f"{rate(summary['requests_per_second'])} requests/s"),
        ],
        sections=[
            Section("Throughput", [], [], [table]),
            *([Section("Device memory", [], [], [device_memory_table(summary)])] if summary["peak_gpu_bytes"] else []),
        ],
        definitions=[],
        config=json.dumps(config, indent=2, ensure_ascii=False),
        footer=f"Made by kvarena from manifest.json of the run of {summary['created'] or 'unknown date'}, commit "
               f"{commit(summary)}.",
    )  # fmt: skip
