"""Runs one cell on several replicas behind a router: `router=NAME`, simulated or on a CPU."""

from __future__ import annotations

import gc
import sys
from contextlib import nullcontext

from kvarena.experiments.building.build import build_load, refuse_future
from kvarena.experiments.building.replicas import ReplicaSet, build_replicas
from kvarena.experiments.building.warm_up import tell_step_times, warm_up
from kvarena.experiments.folders.provenance import peak_rss_bytes, utc_now
from kvarena.experiments.folders.run_folder import Measured
from kvarena.experiments.jobs.cell_facts import (
    engine_facts,
    eviction_facts,
    interrupted_facts,
    model_facts,
    simulation_facts,
)
from kvarena.experiments.jobs.output import Progress
from kvarena.experiments.load.replicas import Replica, RoutingLog, YieldingRunner, drive_replicas
from kvarena.experiments.recording.contention import Contention
from kvarena.experiments.recording.interruption import Interrupted, Signals
from kvarena.experiments.recording.merged import MergedRecording
from kvarena.experiments.recording.recording import Recording, recording_warning
from kvarena.experiments.settings.config import RunConfig


def run_replicas(config: RunConfig, name: str, signals: Signals) -> Measured:
    """Run the cell to its end, or until a signal comes.

    Args:
        config: of the cell.
        name: how it is called.
        signals: end the run between two steps.

    Raises:
        KvarenaError: a bad setting, or a run that failed before a request had ended.
    """
    driver = config.driver
    built = build_replicas(config)
    refuse_future(built.parts[0].engine.allocator, "a replica is sent a part of the requests, and nobody knows which")
    first, is_simulated = built.parts[0], built.parts[0].simulator is not None
    blank = is_simulated and driver.record != "full" and not first.engine.allocator.reads_tokens
    load = build_load(config, first.spec, first.special_token_ids, blank=blank)
    warmup_time = 0.0
    if driver.warmup and not is_simulated:
        sampling = next(iter(load.requests)).sampling
        warmup_time = sum(warm_up(config, parts, [sampling]).seconds for parts in built.parts)
    # Replicas are alike, and plan alike.
    times = tell_step_times(config, first)
    for parts in built.parts[1:]:
        if times is not None and parts.engine.scheduler.wants_step_times:
            parts.engine.scheduler.set_step_times(times)
    for parts in built.parts:
        load.prepare(parts.engine, driver.scores)
    contention = None if is_simulated else Contention(driver.probe, cuda=False)
    if contention is not None:
        contention.before()
    progress = Progress(name, len(load.requests), config.report.progress)
    requests = load.requests if is_simulated else list(load.requests)
    merged = MergedRecording(
        [Recording(parts.engine, level=driver.record, kv_map=False, measured=not is_simulated) for parts in built.parts]
    )
    replicas = _replicas(built, merged)
    log = RoutingLog()
    gc.collect()
    gc.freeze()
    error: BaseException | None = None
    try:
        built.turns.reset()
        signals.hold()
        with contention or nullcontext(), merged:
            drive_replicas(
                built.router, replicas, built.turns, requests, log, closed_loop=load.closed_loop,
                on_progress=lambda: progress(merged), signals=signals,
            )  # fmt: skip
    except (Exception, Interrupted) as broken:
        if not merged.num_finished:
            raise
        error = broken
    finally:
        signals.hold(sealed=True)
        gc.unfreeze()
        progress.finish(merged)
    ended = utc_now()
    interrupted = interrupted_facts(merged, len(load.requests), signals, error)
    found = None if contention is None or interrupted is not None else contention.after()
    run = merged.facts()
    if not is_simulated and run["num_steps"] and (slow := recording_warning(run)) is not None:
        print(f"warning: {name}: {slow}", file=sys.stderr)
    facts = load.manifest() | {
        "model": model_facts(first),
        "engine": engine_facts(first),
        "pool": first.pool_facts | eviction_facts(*built.parts),
        "replicas": len(replicas),
        "simulation": simulation_facts(first, merged, name),
        "memory": None,
        "contention": found,
        "run": run
        | {
            "ended": ended,
            "peak_rss_bytes": peak_rss_bytes(),
            "lateness_bound": None if is_simulated else driver.max_lateness,
            "warmup_time": warmup_time,
            "interrupted": interrupted,
        },
    }
    return Measured(facts, merged.writer(log), error)


def _replicas(built: ReplicaSet, merged: MergedRecording) -> list[Replica]:
    """The replicas as the driver takes them: on one clock, and each with its own recording."""
    built.take_clock()
    made = []
    for parts, recording in zip(built.parts, merged.recordings, strict=True):
        if parts.simulator is None:
            parts.engine.runner = YieldingRunner(parts.engine.runner, built.turns)
        made.append(Replica(parts.engine, recording, None if parts.simulator is None else parts.simulator.after_step))
    return made
