"""summary.json of one run: every number that the report shows, under stable keys with units in their names."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from kvarena.engine.classes import CLASSES, OWNED
from kvarena.reports.analysis.engines import headline_prefix
from kvarena.reports.analysis.experts import ExpertLoad, measured_skew
from kvarena.reports.analysis.gauges import read_gauges, summarize_gauges
from kvarena.reports.analysis.latency import TokenGaps, describe, request_latencies, token_gaps
from kvarena.reports.analysis.memory import Spans, mean_shares, step_spans, weighted_mean
from kvarena.reports.analysis.prefix_cache import summarize_prefix_cache
from kvarena.reports.analysis.replicas import routing_text, summarize_replicas
from kvarena.reports.analysis.reuse import summarize_reuse
from kvarena.reports.analysis.slo import summarize_slo
from kvarena.reports.analysis.steady import steady_window, summarize_steady
from kvarena.reports.analysis.windows import kv_use_text, window_masks
from kvarena.reports.comparing.notices import run_notices
from kvarena.reports.drawing.format import count, rate, seconds
from kvarena.reports.reading.files import UNRECORDED, RunFiles

SCHEMA_VERSION = 1
NUM_REJECTION_KINDS = 8
FACTS = ("name", "created", "strategy", "replicas", "git", "machine", "versions", "model", "engine", "pool", "workload",
         "arrival", "command", "simulation", "target", "cache", "round", "contention")  # fmt: skip
# What the manifest says of any run.
KNOWN = (
    "schema_version", "kind", *FACTS, "wall_time_seconds", "warmup_seconds", "processor_seconds", "peak_rss_bytes",
    "peak_gpu_bytes", "memory", "recorded", "recording", "kv_pool_slots", "kv_pool_bytes", "lateness_bound_seconds",
    "interrupted",
)  # fmt: skip


def summarize(run: RunFiles, gaps: TokenGaps | None = None) -> dict[str, Any]:
    """The summary of a run.

    Args:
        run: its files.
        gaps: what `token_gaps` answers for the run, where it is known already.

    KV memory is averaged over three windows of steps (analysis/windows.py), weighted by step time (analysis/memory.py).

    A run that recorded nothing (`driver.record=none`) has every key, and null where nothing is known: its totals are
    in its manifest.

    Duration: from the first scheduled arrival to the last finish. Throughput counts requests that finished by
    themselves (`stop`, `length`) and their tokens; recomputed tokens are not counted again.
    """
    spans = step_spans(run.steps)
    summary: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "kind": "run"}
    summary |= {key: run.manifest.get(key) for key in FACTS}
    summary["interrupted"] = run.manifest["run"].get("interrupted")
    summary |= _requests(run)
    summary |= _throughput(run, spans, summary)
    summary |= {name: describe(values) for name, values in request_latencies(run).items()}
    gaps = gaps or token_gaps(run)
    summary["itl_seconds"] = describe(gaps.values)
    summary["itl_request_stride"] = gaps.stride
    lateness = run.requests["submit_time"] - run.requests["arrival_time"]
    summary["lateness_seconds"] = describe(lateness)
    bound = run.manifest["run"].get("lateness_bound")
    summary["lateness_bound_seconds"] = bound
    summary["valid"] = bound is None or not run.num_requests or bool(np.nanmax(lateness) <= bound)
    window = steady_window(run)
    summary["steady"] = summarize_steady(run, window)
    summary["slo"] = summarize_slo(run, summary["duration_seconds"], window)
    summary |= _load(run, spans)
    summary |= summarize_prefix_cache(run, spans)
    summary["reuse"] = summarize_reuse(run)
    summary |= _memory(run, spans)
    summary["routing"] = summarize_replicas(run, spans)
    summary["imbalance"] = summary["routing"] and summary["routing"]["imbalance"]
    summary["gauges"] = summarize_gauges(read_gauges(run))
    if run.is_unrecorded:
        summary = _of_totals(summary, run.manifest["run"])
    summary["notices"] = run_notices(summary)
    summary["headline"] = headline_prefix(summary["simulation"]) + headline(summary)
    return summary


def _of_totals(empty: dict[str, Any], info: dict[str, Any]) -> dict[str, Any]:
    """The summary of a run that recorded nothing.

    Args:
        empty: of its manifest, without requests and steps.
        info: section `run` of the manifest.
    """
    totals, bound = dict(info["totals"]), info.get("lateness_bound")
    known = {key: empty[key] for key in KNOWN} | _rates(totals, totals.pop("duration")) | totals
    return {key: blank(value) for key, value in empty.items()} | known | {
        "num_steps": info["num_steps"],
        "valid": bound is None or info["max_lateness"] <= bound,
        "lateness_seconds": blank(empty["lateness_seconds"]) | {"max": info["max_lateness"]},
        "rejections": [],
    }  # fmt: skip


def blank(value: Any) -> Any:
    """The same shape with null for every number."""
    return {key: blank(inner) for key, inner in value.items()} if isinstance(value, dict) else None


def _requests(run: RunFiles) -> dict[str, Any]:
    req, reason = run.requests, run.requests["finish_reason"]
    prompt = int(req["num_prompt_tokens"].sum())
    computed = run.finished | (req["num_output_tokens"] > 0)
    loaded = req.get("num_loaded_tokens")
    cached, seen = int(req["num_cached_tokens"].sum()), int(req["num_prompt_tokens"][computed].sum())
    return {
        "num_requests": run.num_requests,
        "num_finished": int(run.finished.sum()),
        "num_rejected": int((reason == "rejected").sum()),
        "num_aborted": int((reason == "abort").sum()),
        "num_failed": int((reason == "error").sum()),
        "num_without_first_token": int((run.finished & np.isnan(req["first_token_time"])).sum()),
        "rejections": _rejections(req, reason),
        "num_prompt_tokens": prompt,
        "num_output_tokens": int(req["num_output_tokens"].sum()),
        "num_finished_prompt_tokens": int(req["num_prompt_tokens"][run.finished].sum()),
        "num_finished_output_tokens": int(req["num_output_tokens"][run.finished].sum()),
        "num_preemptions": int(req["num_preemptions"].sum()),
        "num_preempted_requests": int((req["num_preemptions"] > 0).sum()),
        "num_recomputed_tokens": int(req["num_recomputed_tokens"].sum()),
        "num_cached_tokens": cached,
        "num_loaded_tokens": 0 if loaded is None else int(loaded.sum()),
        "cached_prompt_share": cached / seen if seen else None,
    }


def _rejections(req: dict[str, np.ndarray], reason: np.ndarray) -> list[dict[str, Any]]:
    """Rejected and failed requests by kind: messages that differ only in numbers and quoted names are one kind."""
    kinds: dict[str, dict[str, Any]] = {}
    for index in np.flatnonzero(np.isin(reason, ("rejected", "error"))):
        message = req["error"][index] or f"no message ({reason[index]})"
        kind = re.sub(r"\d+", "#", re.sub(r"'[^']*'|\"[^\"]*\"", "'…'", message))
        entry = kinds.setdefault(kind, {"count": 0, "finish_reason": str(reason[index]), "example": message})
        entry["count"] += 1
        entry.setdefault("example_request_id", str(req["request_id"][index]))
    return sorted(kinds.values(), key=lambda entry: -entry["count"])[:NUM_REJECTION_KINDS]


def _throughput(run: RunFiles, spans: Spans, counts: dict[str, Any]) -> dict[str, Any]:
    req = run.requests
    ends = req["finish_time"][~np.isnan(req["finish_time"]) & (req["finish_reason"] != "rejected")]
    duration = float(ends.max() - req["arrival_time"].min()) if len(ends) else 0.0
    info = run.manifest["run"]
    memory = run.manifest.get("memory") or {}
    busy = float(spans.weight.sum())
    return {
        **_rates(counts, duration),
        "wall_time_seconds": info.get("wall_time"),
        "warmup_seconds": info.get("warmup_time"),
        "busy_seconds": busy,
        "busy_share": min(1.0, busy / duration / run.num_replicas) if duration > 0 else None,
        "processor_seconds": info.get("processor_seconds"),
        "recorded": info.get("recorded"),
        "recording": info.get("recording"),
        "peak_rss_bytes": info.get("peak_rss_bytes"),
        "peak_gpu_bytes": memory.get("peak_gpu_bytes"),
        "memory": memory or None,
    }


def _rates(counts: dict[str, Any], duration: float) -> dict[str, float | None]:
    output, prompt = counts["num_finished_output_tokens"], counts["num_finished_prompt_tokens"]
    numbers = {"output_tokens": output, "total_tokens": output + prompt, "requests": counts["num_finished"]}
    rates = {f"{name}_per_second": number / duration if duration > 0 else None for name, number in numbers.items()}
    return {"duration_seconds": duration} | rates


def _load(run: RunFiles, spans: Spans) -> dict[str, Any]:
    steps, weight = run.steps, spans.weight
    result: dict[str, Any] = {"num_steps": run.num_steps}
    for key, column in (("batch_size", "num_scheduled"), ("num_running", "num_running"), ("queue", "num_waiting")):
        result[f"{key}_mean"] = weighted_mean(steps[column], weight)
        result[f"{key}_max"] = int(steps[column].max()) if run.num_steps else None
    result["step_seconds"] = describe(steps["end_time"] - steps["start_time"])
    result["scheduling_seconds"] = describe(steps["launch_time"] - steps["start_time"])
    for column in ("num_new_tokens", "num_prefill_tokens", "num_decode_tokens"):
        result[f"computed_{column.removeprefix('num_')}"] = int(steps[column].sum())
    result["experts"] = _experts_read(run, weight)
    result["kv_read"] = _kv_read(run, weight)
    return result | _preemption_cost(run, weight)


def _experts_read(run: RunFiles, weight: np.ndarray) -> dict[str, float | None] | None:
    """Experts that a layer reads in steps that only decode, and the skew of their use; None where nothing is known."""
    sizes, steps = run.manifest["model"].get("experts"), run.steps
    if not sizes:
        return None
    load = ExpertLoad(sizes["num_layers"], sizes["num_experts"], sizes["top_k"])
    read = steps["num_experts_read"] / load.num_layers
    told = (steps["num_new_tokens"] == steps["num_decode_tokens"]) & (read > 0)
    if not told.any():
        return None
    tokens = steps["num_new_tokens"][told]
    return {
        "num_experts": load.num_experts,
        "read_mean": weighted_mean(read[told], weight[told]),
        "read_mean_balanced": weighted_mean(np.array([load.read(int(n)) for n in tokens]), weight[told]),
        "skew": measured_skew(tokens, read[told], load),
    }


def _kv_read(run: RunFiles, weight: np.ndarray) -> dict[str, float | None] | None:
    """Bytes of KV that steps read which only decode, and the share of all reads that was saved; None where unknown."""
    steps, token_bytes = run.steps, run.manifest["model"].get("kv_bytes_per_token")
    read = steps["num_distinct_kv_tokens"]
    told = (steps["num_new_tokens"] == steps["num_decode_tokens"]) & (read > 0)
    if not told.any() or not token_bytes:
        return None
    attended = steps["num_kv_tokens"][told]
    return {
        "bytes_mean": weighted_mean(read[told] * float(token_bytes), weight[told]),
        "saved_share": float(1 - read[told].sum() / attended.sum()),
    }


def _preemption_cost(run: RunFiles, step_time: np.ndarray) -> dict[str, Any]:
    """What preemptions cost: tokens computed again and bytes swapped, each with its time.

    A step's time is shared over its new tokens alike, so recomputed tokens are charged their part of it.
    """
    steps, pool = run.steps, run.manifest["pool"]
    block_bytes = (run.manifest["model"].get("kv_bytes_per_token") or 0) * (pool.get("block_size") or 0)
    share = steps["num_recomputed_tokens"] / np.maximum(steps["num_new_tokens"], 1)
    return {
        "recompute_seconds": float((share * step_time).sum()),
        "swapped_out_bytes": int(steps["num_swapped_out"].sum()) * block_bytes,
        "swapped_in_bytes": int(steps["num_swapped_in"].sum()) * block_bytes,
        "num_block_copies": int(steps["num_copies"].sum()),
        "block_copy_seconds": float(steps["copy_time"].sum()),
    }


def _memory(run: RunFiles, spans: Spans) -> dict[str, Any]:
    """Shares of the pool. Waste is what holds neither a running request's tokens nor a reusable cached prefix."""
    steps, pool = run.steps, run.manifest["pool"]
    masks = window_masks(run)
    busy = spans.weight.sum()
    total = np.maximum(steps["total"], 1).astype(float)
    result: dict[str, Any] = {
        "kv_pool_slots": int(steps["total"].max()) if run.num_steps else pool.get("num_slots"),
        "kv_pool_bytes": pool.get("bytes"),
    }
    for suffix, mask in masks.items():
        shares = mean_shares(steps, spans, mask)
        result[f"num_steps{suffix}"] = int(mask.sum())
        result[f"step_time_share{suffix}"] = float(spans.weight[mask].sum() / busy) if busy > 0 else None
        result[f"kv_share_mean{suffix}"] = shares
        result[f"waste_beyond_token_states{suffix}"] = (
            None if shares is None else max(0.0, 1.0 - shares["token_states"] - shares["cached"])
        )
        for name in ("held", "shared_saved"):
            share = weighted_mean((steps[name] / total)[mask], spans.weight[mask])
            result[f"{name}_share_mean{suffix}"] = share
    owned = sum(steps[name] for name in OWNED)
    result["kv_peak_owned_slots"] = int(np.max(owned)) if run.num_steps else 0
    result["kv_peak_share"] = {
        name: float((steps[name] / total).max()) if run.num_steps else None for name in CLASSES
    }  # each class at its own peak: these do not add up to 1
    return result


def headline(summary: dict[str, Any]) -> str:
    """One sentence that says what came out."""
    name, done, asked = summary["name"], summary["num_finished"], summary["num_requests"]
    if not asked:
        return f"{name} was given no request."
    if not done and summary["recorded"] != UNRECORDED:
        lost = _lost(summary)
        return f"{name} finished none of {count(asked)} requests{': ' + lost if lost else ''}."
    parts = [f"{name} served {count(done)} of {count(asked)} requests at "
             f"{rate(summary['output_tokens_per_second'])} output tokens/s"]  # fmt: skip
    if summary["recorded"] == UNRECORDED:
        return f"{parts[0]}; nothing else was recorded."
    if lost := _lost(summary):
        parts.append(lost)
    if summary["routing"]:
        parts.append(routing_text(summary))
    if used := kv_use_text(summary):
        parts.append(used)
    ttft = summary["ttft_seconds"]
    if ttft["count"]:
        parts.append(f"the first token came after {seconds(ttft['p50'])} (median; p99 {seconds(ttft['p99'])})")
    return "; ".join(parts) + "."


def _lost(summary: dict[str, Any]) -> str:
    """How many requests were rejected and failed, and nothing of those that were not."""
    kinds = ((summary["num_rejected"], "rejected"), (summary["num_failed"], "failed"))
    return ", ".join(f"{count(number)} {kind}" for number, kind in kinds if number)
