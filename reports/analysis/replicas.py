"""What a router made of its replicas: how evenly they were loaded, and what each found in its own prefix cache.

Imbalance = tokens that the busiest replica computed / the mean over the replicas; 1 is even. Computed are the prompt
tokens that the prefix cache did not serve, output tokens, and what a preemption dropped.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kvarena.reports.analysis.memory import Spans
from kvarena.reports.analysis.prefix_cache import of_optimum, optimal_tokens, share_of
from kvarena.reports.drawing.document import Section, Table
from kvarena.reports.drawing.format import count, percent, ratio, seconds
from kvarena.reports.reading.files import RunFiles

DEFINITION = (
    "Imbalance: tokens that the busiest replica computed, over the mean of the replicas; 1 is even. Hit rate: prompt "
    "tokens found in the replica's own prefix cache at a request's first admission, over all prompt tokens of the "
    "requests that it admitted."
)


def summarize_replicas(run: RunFiles, spans: Spans) -> dict[str, Any] | None:
    """How the load was spread; None of a run without a router.

    Args:
        run: its files; without rows (`driver.record=none`) nothing but the number is known.
        spans: of its steps.
    """
    if not run.manifest.get("replicas"):
        return None
    replicas = [] if run.is_unrecorded else [_replica(run, spans, number) for number in range(run.num_replicas)]
    computed = [one["num_computed_tokens"] for one in replicas]
    mean = float(np.mean(computed)) if computed else 0.0
    return {
        "router": run.manifest["strategy"].get("router"),
        "num_replicas": run.num_replicas,
        "imbalance": max(computed) / mean if mean else None,
        "replicas": replicas,
    }


def _replica(run: RunFiles, spans: Spans, number: int) -> dict[str, Any]:
    req, mine = run.requests, run.requests["replica"] == number
    steps = run.steps["replica"] == number
    admitted = mine & (run.finished | (req["num_output_tokens"] > 0))
    optimal = optimal_tokens(run)
    cached, seen = int(req["num_cached_tokens"][mine].sum()), int(req["num_prompt_tokens"][admitted].sum())
    return {
        "num_requests": int(mine.sum()),
        "num_finished": int((mine & run.finished).sum()),
        "num_output_tokens": int(req["num_output_tokens"][mine].sum()),
        "num_computed_tokens": int(run.steps["num_new_tokens"][steps].sum()),
        "cached_prompt_share": cached / seen if seen else None,
        "cache_share_of_optimum": None if optimal is None else share_of(cached, int(np.nansum(optimal[mine]))),
        "busy_seconds": float(spans.weight[steps].sum()),
        "num_preemptions": int(req["num_preemptions"][mine].sum()),
    }


def routing_text(summary: dict[str, Any]) -> str:
    """What came of it, in half a sentence."""
    routing, hits = summary["routing"], summary["cached_prompt_share"]
    text = f"on {count(routing['num_replicas'])} replicas"
    if routing["imbalance"] is not None:
        text += f" the busiest computed {ratio(routing['imbalance'])} times the mean"
    return f"{text}, and prefix caches served {percent(hits)} of the prompt tokens" if hits else text


def replicas_section(summary: dict[str, Any]) -> Section:
    """A row a replica."""
    routing = summary["routing"]
    duration = summary["duration_seconds"]
    rows = [
        [str(number), count(one["num_requests"]), count(one["num_finished"]), percent(one["cached_prompt_share"]),
         percent(one.get("cache_share_of_optimum")), count(one["num_computed_tokens"]), count(one["num_output_tokens"]),
         seconds(one["busy_seconds"]),
         percent(one["busy_seconds"] / duration if duration else None), count(one["num_preemptions"])]
        for number, one in enumerate(routing["replicas"])
    ]  # fmt: skip
    header = ["replica", "requests", "finished", "hit rate", "of the most", "tokens computed", "output tokens", "busy",
              "of the duration", "preemptions"]  # fmt: skip
    text = (
        f"{routing['router']} over {count(routing['num_replicas'])} replicas, each with its own allocator, scheduler "
        f"and pool. Imbalance {ratio(routing['imbalance'])}; hit rate {percent(summary['cached_prompt_share'])}"
        f"{of_optimum(summary)}. "
        "Shares of the pool, batches and queues in this report are means over the replicas, weighted by step time; "
        "rates and counts are of all together."
    )
    return Section("Replicas", [text], [], [Table(header, rows)], [DEFINITION])
