"""Runs one cell on one engine of this process."""

from __future__ import annotations

import gc
import sys
import time
from contextlib import nullcontext

from kvarena.engine.pool.gpu_memory import NO_GPU
from kvarena.experiments.building.build import build
from kvarena.experiments.building.shared import SharedParts
from kvarena.experiments.building.warm_up import Reach, WarmUp, tell_step_times, warm_cache, warm_up
from kvarena.experiments.caching.accesses import watch
from kvarena.experiments.folders.provenance import peak_rss_bytes, utc_now
from kvarena.experiments.folders.run_folder import Measured
from kvarena.experiments.jobs.cell_facts import (
    engine_facts,
    eviction_facts,
    interrupted_facts,
    model_facts,
    on_gpu,
    simulation_facts,
)
from kvarena.experiments.jobs.output import Progress
from kvarena.experiments.load.driver import drive
from kvarena.experiments.recording.contention import Contention
from kvarena.experiments.recording.interruption import Interrupted, Signals
from kvarena.experiments.recording.recording import Recording, recording_warning
from kvarena.experiments.settings.config import RunConfig


def run_engine(config: RunConfig, name: str, shared: SharedParts | None, signals: Signals) -> Measured:
    """Run the cell to its end, or until a signal comes.

    Args:
        config: of the cell.
        name: how it is called.
        shared: model and runner of the cells that run in this process; None: its own.
        signals: end the run between two steps.

    Raises:
        KvarenaError: a bad setting, or a run that failed before a request had ended.
    """
    setup = build(config, shared)
    simulator, load = setup.parts.simulator, setup.load
    # A simulated run may have a million requests; in one that computes nothing is made while it is measured.
    requests = list(load.requests) if simulator is None else load.requests
    warm = WarmUp(0.0)
    if setup.driver.warmup and isinstance(requests, list):
        users = None if load.closed_loop is None else len(load.closed_loop.first)
        warm = warm_up(config, setup.parts, [requests[0].sampling], Reach.of(config, setup.parts, requests, users))
    begin = time.perf_counter()
    tell_step_times(config, setup.parts)
    warm = warm._replace(seconds=warm.seconds + time.perf_counter() - begin) if simulator is None else warm
    accesses = None
    if setup.driver.cache == "warm":
        accesses = watch(setup.parts.engine.allocator, setup.parts.engine.clock.now)
        if accesses is not None:
            accesses.counts = False
        warm = warm._replace(seconds=warm.seconds + warm_cache(config, setup.parts, load.requests))
    load.prepare(setup.parts.engine, setup.driver.scores)
    contention = None if setup.parts.simulator is not None else Contention(setup.driver.probe, on_gpu(config))
    if contention is not None:
        contention.before()
    progress = Progress(name, len(setup.load.requests), config.report.progress)
    recording = Recording(
        setup.parts.engine, level=setup.driver.record, kv_map=config.report.kv_map,
        scores=setup.driver.scores > 0, measured=simulator is None, accesses=accesses,
    )  # fmt: skip
    gpu, model = setup.parts.gpu_memory, setup.parts.model
    if gpu is not None and model is not None:
        gpu.begin(model.modules, model.image_cache_bytes)
    # The host's garbage collector would show as pauses of single steps: collect now, then only by reference counts.
    gc.collect()
    gc.freeze()
    error: BaseException | None = None
    try:
        setup.parts.clock.reset()
        signals.hold()  # until the files are written: nothing of what is measured from here on is to be lost
        with contention or nullcontext(), recording:
            drive(
                setup.parts.engine, requests, recording, closed_loop=setup.load.closed_loop, on_progress=progress,
                after_step=None if simulator is None else simulator.after_step, signals=signals,
            )  # fmt: skip
    except (Exception, Interrupted) as broken:
        if not recording.num_finished:
            raise
        error = broken
    finally:
        signals.hold(sealed=True)
        gc.unfreeze()
        progress.finish(recording)
    ended = utc_now()
    interrupted = interrupted_facts(recording, len(setup.load.requests), signals, error)
    memory = NO_GPU if gpu is None or error is not None else gpu.parts()
    # After the memory, for the probe has some of its own; before the files, whose writing is no part of the run.
    found = None if contention is None or interrupted is not None else contention.after()
    run = recording.facts()
    # A run that served nobody took no time of which a share would say anything.
    if simulator is None and run["num_steps"] and (slow := recording_warning(run)) is not None:
        print(f"warning: {name}: {slow}", file=sys.stderr)
    facts = setup.load.manifest() | {
        "model": model_facts(setup.parts),
        "engine": engine_facts(setup.parts),
        "pool": setup.parts.pool_facts | eviction_facts(setup.parts),
        "simulation": simulation_facts(setup.parts, recording, name),
        "memory": memory,
        "contention": found,
        "run": run
        | {
            "ended": ended,
            "peak_rss_bytes": peak_rss_bytes(),
            # A virtual clock waits for its driver: nothing is late.
            "lateness_bound": setup.driver.max_lateness if simulator is None else None,
            "interrupted": interrupted,
        }
        | warm.facts,
    }
    return Measured(facts, recording.write, error)
