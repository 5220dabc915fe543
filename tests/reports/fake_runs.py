"""Makes plausible run folders without an engine: a toy of one allocator x one scheduler on a virtual clock.

Only the files' schema (docs/files.md) and the ledger's sums are exact; the rest needs to look like a run.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

INT32, INT64 = pa.int32(), pa.int64()
REQUEST_SCHEMA = pa.schema(
    [
        ("request_id", pa.string()),
        ("client_id", pa.string()),
        ("prompt_token_ids", pa.list_(INT32)),
        ("output_token_ids", pa.list_(INT32)),
        ("num_prompt_tokens", INT32),
        ("num_output_tokens", INT32),
        ("max_tokens", INT32),
        ("arrival_time", pa.float64()),
        ("submit_time", pa.float64()),
        ("admission_time", pa.float64()),
        ("first_token_time", pa.float64()),
        ("finish_time", pa.float64()),
        ("token_times", pa.list_(pa.float64())),
        ("finish_reason", pa.string()),
        ("num_cached_tokens", INT32),
        ("num_preemptions", INT32),
        ("num_recomputed_tokens", INT32),
        ("error", pa.string()),
    ]
)
LEDGER = ("token_states", "reservation", "internal", "external", "shortage", "cached", "free")
COUNTS = ("running", "waiting", "scheduled", "new_tokens", "prefill_tokens", "decode_tokens", "sampled", "preempted")
STEP_SCHEMA = pa.schema(
    [
        ("step", INT32),
        ("start_time", pa.float64()),
        ("launch_time", pa.float64()),
        ("end_time", pa.float64()),
        ("copy_time", pa.float64()),
        *((f"num_{name}", INT32) for name in (*COUNTS, "recomputed_tokens", "copies", "swapped_out", "swapped_in")),
        *((name, INT64) for name in (*LEDGER, "total", "shared_saved", "held")),
    ]
)

KV_MAP_SCHEMA = pa.schema(
    [
        ("step", INT32),
        ("time", pa.float64()),
        ("owner", pa.list_(INT32)),
        ("filled", pa.list_(pa.int16())),
        ("stride", INT32),
    ]
)


@dataclass
class _Live:
    index: int
    prompt: int
    target: int
    arrival: float
    computed: int = 0
    produced: int = 0
    slots: int = 0
    blocks: list[int] = field(default_factory=list)


def fake_run(
    run_dir: Path,
    allocator: str = "paged",
    scheduler: str = "continuous",
    num_requests: int = 48,
    rate: float = 14.0,
    total: int = 7680,
    max_len: int = 1024,
    block_size: int = 16,
    seed: int = 0,
    num_rejected: int = 2,
    speed: float = 1.0,
    one_token: bool = False,
    wrong_token: int | None = None,
    config: dict | None = None,
    kv_map: bool = False,
) -> Path:
    """Write manifest.json, requests.parquet and steps.parquet of one made-up run."""
    rng = np.random.default_rng(seed)
    arrivals = np.cumsum(rng.exponential(1 / rate, num_requests))
    prompts = np.clip(rng.lognormal(4.6, 0.9, num_requests).astype(int), 4, max_len // 2)
    targets = (
        np.ones(num_requests, int) if one_token else np.clip(rng.lognormal(4.9, 0.7, num_requests), 2, max_len // 2)
    )
    waiting = [
        _Live(i, int(prompts[i]), int(targets[i]), float(arrivals[i])) for i in range(num_rejected, num_requests)
    ]
    rows = [_request_row(i, int(prompts[i]), int(targets[i]), float(arrivals[i]), seed) for i in range(num_requests)]
    for row in rows[:num_rejected]:
        row |= {"finish_reason": "rejected", "num_output_tokens": 0, "output_token_ids": [],
                "error": f"request '{row['request_id']}' needs {max_len + row['num_prompt_tokens']} tokens, more than "
                         f"engine.max_model_len={max_len}; shorten it or raise the limit"}  # fmt: skip
    if wrong_token is not None:
        rows[num_rejected + 3]["output_token_ids"][wrong_token] += 1
    snapshots: list[dict] = []
    steps = _simulate(waiting, rows, allocator, scheduler, total, max_len, block_size, speed, snapshots)
    for row in rows:
        if row["finish_reason"] == "rejected":
            row["token_times"] = []
    write_run(run_dir, rows, steps, allocator, scheduler, total, block_size, config, seed)
    if kv_map:
        pq.write_table(pa.Table.from_pylist(snapshots[:: max(1, len(snapshots) // 300)], KV_MAP_SCHEMA),
                       run_dir / "kv_map.parquet")  # fmt: skip
    return run_dir


def _place(live, done, running, block_size, total) -> None:
    """Give `live` the lowest free blocks for the slots that it owns; contiguous requests get one run by first fit."""
    missing = math.ceil(live.slots / block_size) - len(live.blocks)
    if missing <= 0:
        return
    taken = {block for other in running + done for block in other.blocks}
    free = [block for block in range(total // block_size) if block not in taken]
    start = 0
    if missing > 2:
        runs = [i for i in range(len(free) - missing + 1) if free[i + missing - 1] - free[i] == missing - 1]
        start = runs[0] if runs else 0
    live.blocks += free[start : start + missing]


def _snapshot(step, live_requests, num_blocks, block_size) -> dict:
    owner, filled = np.full(num_blocks, -1, np.int32), np.zeros(num_blocks, np.int16)
    for live in live_requests:
        for position, block in enumerate(live.blocks):
            owner[block] = live.index
            filled[block] = min(block_size, max(0, live.computed - position * block_size))
    return {"step": step["step"], "time": step["start_time"], "owner": owner.tolist(), "filled": filled.tolist(),
            "stride": 1}  # fmt: skip


def _request_row(index: int, prompt: int, target: int, arrival: float, seed: int) -> dict:
    rng = np.random.default_rng((seed, index))
    return {
        "request_id": f"r{index:04d}",
        "client_id": "",
        "prompt_token_ids": rng.integers(0, 4096, prompt).tolist(),
        "output_token_ids": rng.integers(0, 4096, target).tolist(),
        "num_prompt_tokens": prompt,
        "num_output_tokens": target,
        "max_tokens": target,
        "arrival_time": arrival,
        "submit_time": arrival + float(rng.exponential(2e-4)),
        "admission_time": None,
        "first_token_time": None,
        "finish_time": None,
        "token_times": [],
        "finish_reason": "length",
        "num_cached_tokens": 0,
        "num_preemptions": 0,
        "num_recomputed_tokens": 0,
        "error": "",
    }


def _simulate(waiting, rows, allocator, scheduler, total, max_len, block_size, speed, snapshots) -> list[dict]:
    now, running, done, steps = 0.0, [], [], []
    capacity = 16

    def need(live: _Live, tokens: int) -> int:
        return max_len if allocator == "contiguous" else math.ceil(tokens / block_size) * block_size

    while waiting or running:
        if not running:
            now = max(now, waiting[0].arrival)
        queue = [live for live in waiting if live.arrival <= now]
        used = sum(live.slots for live in running + done)
        preempted = 0
        if scheduler == "continuous" or not running:
            for live in queue:
                want = need(live, live.prompt + live.produced + 1)
                if used + want > total or len(running) >= capacity * (1 if allocator == "contiguous" else 4):
                    break
                live.slots, used = want, used + want
                waiting.remove(live)
                running.append(live)
        for live in running:
            want = need(live, live.computed + 1)
            if want > live.slots:
                if used + want - live.slots > total and len(running) > 1:
                    victim = running.pop()
                    rows[victim.index]["num_preemptions"] += 1
                    rows[victim.index]["num_recomputed_tokens"] += victim.computed
                    used -= victim.slots
                    victim.computed = victim.slots = 0
                    victim.blocks = []
                    waiting.insert(0, victim)
                    preempted += 1
                    if victim is live:
                        continue
                used += want - live.slots
                live.slots = want
        prefill = sum(live.prompt + live.produced - live.computed for live in running if live.computed < live.prompt)
        decode = sum(1 for live in running if live.computed >= live.prompt)
        duration = (0.012 + 2e-5 * prefill + 2e-4 * decode) / speed
        held = sum(live.slots for live in done)
        step = {
            "step": len(steps), "start_time": now, "launch_time": now + 3e-4, "end_time": now + duration,
            "num_running": len(running), "num_waiting": len([live for live in waiting if live.arrival <= now]),
            "num_scheduled": len(running), "num_new_tokens": prefill + decode, "num_prefill_tokens": prefill,
            "num_decode_tokens": decode, "num_sampled": len(running), "num_preempted": preempted, "num_copies": 0,
            "num_recomputed_tokens": 0, "num_swapped_out": 0, "num_swapped_in": 0, "copy_time": 0.0,
            "total": total, "shared_saved": 0, "held": held, "cached": 0,
        }  # fmt: skip
        split = dict.fromkeys(("token_states", "reservation", "internal"), 0)
        for live in running + done:
            if live in running:
                live.computed = live.prompt + live.produced
            final = live.prompt + live.target - 1
            split["token_states"] += live.computed
            split["reservation"] += max(0, min(final, live.slots) - live.computed)
            split["internal"] += max(0, live.slots - max(final, live.computed))
        left = total - sum(split.values())
        stuck = bool(step["num_waiting"]) and left < (max_len if allocator == "contiguous" else 0)
        step |= split | {"external": 0, "shortage": left if stuck else 0, "free": 0 if stuck else left}
        steps.append(step)
        for live in running:
            _place(live, done, running, block_size, total)
        snapshots.append(_snapshot(step, running + done, total // block_size, block_size))
        now = step["end_time"]
        for live in list(running):
            row = rows[live.index]
            if row["admission_time"] is None:
                row["admission_time"] = step["start_time"]
            if row["first_token_time"] is None:
                row["first_token_time"] = now
            row["token_times"].append(now)
            live.produced += 1
            if live.produced == live.target:
                row["finish_time"] = now
                running.remove(live)
                done.append(live)
        if scheduler == "continuous" or not running:
            done = []
    return steps


def write_run(run_dir, rows, steps, allocator, scheduler, total, block_size, config=None, seed=0) -> None:
    """Write the three files of a run."""
    run_dir.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, REQUEST_SCHEMA), run_dir / "requests.parquet")
    pq.write_table(pa.Table.from_pylist(steps, STEP_SCHEMA), run_dir / "steps.parquet")
    details = {"reservation": "max"} if allocator == "contiguous" else {"block_size": block_size}
    manifest = {
        "schema_version": 1,
        "name": f"{allocator} x {scheduler}",
        "created": "2026-11-24T10:00:00+00:00",
        "strategy": {
            "allocator": allocator,
            "scheduler": scheduler,
            "details": details | {"retire": "hold" if scheduler == "static" else None},
        },
        "config": {
            "allocator": {"_target_": allocator} | details,
            "scheduler": {"_target_": scheduler, "max_num_seqs": 64},
            "workload": {"name": "sharegpt", "seed": seed, "num_requests": len(rows)},
            "engine": {"dtype": "float32", "max_model_len": 1024},
        }
        | (config or {}),
        "git": {"commit": "0123456789abcdef0123456789abcdef01234567", "dirty": False},
        "machine": {
            "cpu": "Intel Xeon Processor",
            "cores": 2,
            "memory_bytes": 24 * 2**30,
            "gpu": None,
            "platform": "Linux-6.1-x86_64",
        },
        "versions": {"python": "3.11.7", "torch": "2.13.0+cpu", "transformers": "5.17.0"},
        "model": {"name": "demo", "num_parameters": 1_063_296, "kv_bytes_per_token": 2048, "dtype": "float32"},
        "pool": {
            "num_blocks": total // block_size,
            "block_size": block_size,
            "num_slots": total,
            "bytes": total * 2048,
        },
        "workload": {
            "name": "sharegpt",
            "seed": seed,
            "num_requests": len(rows),
            "description": "lengths like ShareGPT: mean prompt 161.31, output 337.99 tokens (PagedAttention, Fig. 11)",
        },
        "run": {
            "wall_time": 20.1,
            "num_steps": len(steps),
            "peak_rss_bytes": 900 * 2**20,
            "max_lateness": 0.001,
            "warmup_time": 0.4,
        },
        "contention": {
            "processor_share": 0.99,
            "steal_share": 0.0,
            "load_average": [1.0, 1.0],
            "gpu_clock_mhz": None,
            "probe": {"before": 1000.0, "after": 1000.0},
        },
    }
    (run_dir / "manifest.json").write_text(json.dumps(manifest, indent=1))
