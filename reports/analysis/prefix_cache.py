"""What the prefix cache found, beside the most that any could have found, in tokens and in seconds of prompts.

    hits / bound      of the run, of each client (a session is a client), of each replica
    seconds saved     what the found tokens would have taken to compute, by a fit to the run's own steps

The bound is one of tokens: which tokens save most seconds it does not ask, so for seconds there is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from kvarena.reports.analysis.memory import Spans
from kvarena.reports.drawing.document import Section, Table
from kvarena.reports.drawing.format import count, percent, seconds, size_bytes
from kvarena.reports.reading.files import RunFiles, has_columns, read_table
from kvarena.reports.reading.names import STEPS_FILE

MOST_CLIENTS = 20
PAIRS = "num_attention_pairs"
MIN_STEPS = 20  # for a fit


class PromptTime(NamedTuple):
    """Seconds of a prompt's token, and of a pair of query and key in it."""

    token: float
    pair: float

    def seconds(self, num_tokens: np.ndarray) -> np.ndarray:
        """Of so many tokens at the head of a prompt."""
        lengths = num_tokens.astype(float)
        return np.asarray(self.token * lengths + self.pair * lengths * (lengths + 1) / 2)


def summarize_prefix_cache(run: RunFiles, spans: Spans) -> dict[str, Any]:
    """The keys of a run's summary; None where nothing is known.

    Args:
        run: its files.
        spans: of its steps.
    """
    optimal = optimal_tokens(run)
    result: dict[str, Any] = {
        "num_optimal_cached_tokens": None, "optimal_prompt_share": None, "cache_share_of_optimum": None,
        "prompt_seconds": None, "prompt_seconds_saved": None, "cache_by_client": [],
    }  # fmt: skip
    if optimal is None:
        return result
    known = ~np.isnan(optimal)
    result |= _shares(run, optimal, known)
    if (time := prompt_time(run, spans)) is not None:
        req = run.requests
        result["prompt_seconds"] = float(time.seconds(req["num_prompt_tokens"][known]).sum())
        result["prompt_seconds_saved"] = float(time.seconds(req["num_cached_tokens"][known]).sum())
    result["cache_by_client"] = _by_client(run, optimal, known)
    return result


def optimal_tokens(run: RunFiles) -> np.ndarray | None:
    """What MIN finds for each request, NaN where nobody knows; None without a prefix cache, or of an older run."""
    found = run.requests.get("num_optimal_cached_tokens")
    return None if found is None or bool(np.isnan(found).all()) else found


def _shares(run: RunFiles, optimal: np.ndarray, rows: np.ndarray) -> dict[str, Any]:
    most, found = int(optimal[rows].sum()), int(run.requests["num_cached_tokens"][rows].sum())
    prompt = int(run.requests["num_prompt_tokens"][rows].sum())
    return {
        "num_optimal_cached_tokens": most,
        "optimal_prompt_share": most / prompt if prompt else None,
        "cache_share_of_optimum": share_of(found, most),
    }


def share_of(found: int, most: int) -> float | None:
    """Hits over their bound; None where there is nothing to find."""
    return found / most if most else None


def _by_client(run: RunFiles, optimal: np.ndarray, known: np.ndarray) -> list[dict[str, Any]]:
    """The clients with the longest prompts in all, and the rest together; nothing where there is one client."""
    names, places = np.unique(run.requests["client_id"][known].astype(str), return_inverse=True)
    if len(names) < 2:
        return []
    columns = {
        "num_requests": np.ones(int(known.sum())),
        "num_prompt_tokens": run.requests["num_prompt_tokens"][known],
        "num_cached_tokens": run.requests["num_cached_tokens"][known],
        "num_optimal_cached_tokens": optimal[known],
    }
    sums = {key: np.bincount(places, column, minlength=len(names)) for key, column in columns.items()}
    order = np.argsort(-sums["num_prompt_tokens"], kind="stable")
    groups = [(str(names[i]) or "-", np.array([i])) for i in order[:MOST_CLIENTS]]
    if len(names) > MOST_CLIENTS:
        groups.append((f"{len(names) - MOST_CLIENTS} others", order[MOST_CLIENTS:]))
    rows = []
    for name, members in groups:
        row: dict[str, Any] = {"client": name} | {key: int(column[members].sum()) for key, column in sums.items()}
        row["cached_prompt_share"] = share_of(row["num_cached_tokens"], row["num_prompt_tokens"])
        row["cache_share_of_optimum"] = share_of(row["num_cached_tokens"], row["num_optimal_cached_tokens"])
        rows.append(row)
    return rows


def prompt_time(run: RunFiles, spans: Spans) -> PromptTime | None:
    """Fit what prompts take to the run's steps: seconds of a step, a prompt's token and pair, a decode and its context.

    None where the run has too few steps with prompts, or files without these columns.
    """
    from scipy.optimize import nnls  # late: most of a report's time without it

    names = (PAIRS, "num_kv_tokens")
    if run.is_unrecorded or not has_columns(run.path / STEPS_FILE, names):
        return None
    table = read_table(run.path / STEPS_FILE, names)
    pairs, context = (table.column(name).to_numpy().astype(float) for name in names)
    prompts, decodes = run.steps["num_prefill_tokens"].astype(float), run.steps["num_decode_tokens"].astype(float)
    if int((prompts > 0).sum()) < MIN_STEPS:
        return None
    rows = np.stack([np.ones(len(pairs)), prompts, pairs, decodes, context], axis=1)
    scale = np.maximum(rows.max(axis=0), 1e-30)
    fitted = nnls(rows / scale, spans.weight)[0] / scale
    return PromptTime(float(fitted[1]), float(fitted[2]))


def prefix_cache_section(summary: dict[str, Any], by_distance: Sequence[Table]) -> Section:
    """Hits beside their bound.

    Args:
        summary: of the run.
        by_distance: hits by reuse distance.
    """
    eviction, policy = summary["pool"].get("eviction") or {}, _policy(summary)
    rows = [
        ["found", count(summary["num_cached_tokens"]), percent(summary["cached_prompt_share"]), "of the prompt tokens"],
        ["at most", count(summary["num_optimal_cached_tokens"]), percent(summary["optimal_prompt_share"]),
         "Belady's MIN in this order of admissions, beside what requests owned meanwhile"],
        ["share of it", percent(summary["cache_share_of_optimum"]), "", "found, of what was to be found"],
        ["prompt seconds saved", seconds(summary["prompt_seconds_saved"]), "",
         f"of {seconds(summary['prompt_seconds'])} for all prompts, by a fit to this run's steps; no bound is known"],
        ["remembered beside the cache", count(eviction.get("num_remembered")), size_bytes(eviction.get("bytes")),
         f"blocks that {policy} counts and that are not cached, and their host memory"],
    ]  # fmt: skip
    if eviction.get("num_kinds") is not None:
        rows.append(["kinds of request", count(eviction["num_kinds"]), "", f"that the workload names, for {policy}"])
    if num_blocks := summary["pool"].get("host_blocks"):
        below = summary["num_loaded_tokens"]
        rows[1:1] = [
            ["in the pool", count(summary["num_cached_tokens"] - below), "", "of these"],
            ["in host memory", count(below), "", f"of these: they came up from its {count(num_blocks)} blocks"],
        ]
    tables = [Table(["", "tokens", "share", "what"], rows, text_columns=frozenset({3}))]
    if summary["cache_by_client"]:
        header = ["client", "requests", "prompt tokens", "found", "at most", "hit rate", "share of the bound"]
        tables.append(Table(header, [
            [row["client"], count(row["num_requests"]), count(row["num_prompt_tokens"]),
             count(row["num_cached_tokens"]), count(row["num_optimal_cached_tokens"]),
             percent(row["cached_prompt_share"]), percent(row["cache_share_of_optimum"])]
            for row in summary["cache_by_client"]
        ]))  # fmt: skip
    text = (
        f"Cached blocks go by {policy}. MIN knows the future: no policy finds more tokens in the order in which these "
        "requests were admitted. Another policy changes the order, and has a bound of its own. A client may find more "
        "than its part of the bound, which is one for all together."
    )
    return Section("Prefix cache", [text], [], [*tables, *by_distance])


def of_optimum(summary: dict[str, Any]) -> str:
    """`, 41 % of the most that was to be found`; nothing where that is not known."""
    share = summary.get("cache_share_of_optimum")
    return "" if share is None else f", {percent(share)} of the most that was to be found"


def from_below(summary: dict[str, Any]) -> str:
    """`, 1,024 of them from host memory`; nothing where there is none."""
    below = summary["pool"].get("host_blocks") and summary.get("num_loaded_tokens")
    return "" if below in (None, 0) else f", {count(below)} of them from host memory"


def _policy(summary: dict[str, Any]) -> str:
    return f"policy {(summary['pool'].get('eviction') or {}).get('policy') or 'lru'}"
