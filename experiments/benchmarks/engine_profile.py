"""Where a step's device time goes, by kernel, with torch's profiler."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from kvarena.experiments.gpu.engines import PREFILLED, Engines, drive
from kvarena.experiments.gpu.floors import fixed_batch


def profile_steps(
    engines: Engines, batch: int, length: int, *, prefill: bool = False, sampling: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Device time per step by kernel, of decode steps (replayed graphs) or of one prefill.

    Returns:
        `busy_ms`: kernels' time per step; `span_ms`: from the first kernel's start to the last one's end; `idle_ms`: of
        these, without any on the device; `kernels`: the largest, as [name, calls per step, microseconds per step];
        `gaps`: where it has nothing to do, as [what ended, what begins, times per step, microseconds per step].
    """
    num_tokens = 1 if prefill else 9
    settings = (f"scheduler.max_num_seqs={batch}", "scheduler.max_num_batched_tokens=16384")

    def run(name: str) -> None:
        parts = engines.build(*settings, *(() if prefill else (PREFILLED,)))
        vocab_size = parts.spec.vocab_size
        drive(parts.engine, fixed_batch(batch, length, num_tokens, vocab_size=vocab_size, name=name, sampling=sampling))

    run("p")
    run("q")
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        run("r")
        torch.cuda.synchronize()
    totals: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    events = [event for event in trace.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    for event in events:
        total = totals[event.name[:60]]
        total[0] += 1
        total[1] += event.time_range.elapsed_us()
    gaps = find_gaps([(event.time_range.start, event.time_range.end, event.name[:40]) for event in events])
    begin = min(event.time_range.start for event in events)
    end = max(event.time_range.end for event in events)
    steps = max(1, num_tokens - 1)
    largest = sorted(totals.items(), key=lambda item: -item[1][1])[:14]
    return {
        "busy_ms": round(sum(us for _, us in totals.values()) / steps / 1e3, 4),
        "span_ms": round((end - begin) / steps / 1e3, 4),
        "idle_ms": round(sum(us for _, us in gaps.values()) / steps / 1e3, 4),
        "kernels": [[name, round(calls / steps, 1), round(us / steps, 1)] for name, (calls, us) in largest],
        "gaps": [
            [*names, round(times / steps, 1), round(us / steps, 1)]
            for names, (times, us) in sorted(gaps.items(), key=lambda item: -item[1][1])[:8]
        ],
    }


def find_gaps(events: Iterable[tuple[float, float, str]]) -> dict[tuple[str, str], tuple[int, float]]:
    """When nothing runs, by what ended last and what begins then: how often, and microseconds in all.

    Args:
        events: start and end, in microseconds, and name.
    """
    gaps: dict[tuple[str, str], tuple[int, float]] = {}
    last, ended = "", float("inf")
    for start, end, name in sorted(events):
        if start > ended:
            times, us = gaps.get((last, name), (0, 0.0))
            gaps[last, name] = times + 1, us + start - ended
        if not last or end > ended:
            last, ended = name, end
    return gaps
