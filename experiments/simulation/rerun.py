"""Runs a recorded run's workload again under a profile: what the simulator would have said of it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np

from kvarena.engine.clock import VirtualClock
from kvarena.engine.ledger import MemoryLedger
from kvarena.engine.request import Request
from kvarena.experiments.load.driver import ClosedLoop, Recorder, drive
from kvarena.experiments.recording.record import RunRecorder
from kvarena.experiments.recording.totals import RunTotals
from kvarena.experiments.simulation.profiles import MeasuredProfile
from kvarena.experiments.simulation.recorded import RecordedRun
from kvarena.experiments.simulation.runner import SimulatedRunner
from kvarena.experiments.simulation.step_time import HostTime, StepTime
from kvarena.reports.reading.names import MANIFEST_FILE, REQUESTS_FILE, STEPS_FILE


def simulate_again(
    run: RecordedRun, profile: MeasuredProfile, profile_name: str, run_dir: Path
) -> dict[str, np.ndarray]:
    """Simulate the same requests on the same strategy, and leave a run folder.

    A request that ended by a stop token runs to the length that it had.

    Args:
        run: the recording.
        profile: times the steps.
        profile_name: for the manifest.
        run_dir: made if need be.

    Returns:
        The columns of its steps, without the ledger.

    Raises:
        ConfigError: the profile is of the other loop (with or without overlap).
    """
    profile.check_overlap(run.overlap)
    ledger, recorder = MemoryLedger(), RunRecorder()
    _drive(run, profile.device, profile.host, recorder, ledger)
    run_dir.mkdir(parents=True, exist_ok=True)
    recorder.write_requests(run_dir / REQUESTS_FILE)
    recorder.write_steps(run_dir / STEPS_FILE, ledger)
    columns = recorder.step_columns()
    facts = {"profile": profile_name, "kind": "measured", "outside": profile.fitted.outside(columns)}
    manifest = run.manifest | {
        "simulation": facts | asdict(profile),
        "run": {"wall_time": recorder.wall_time, "num_steps": recorder.num_steps, "max_lateness": 0.0},
    }
    (run_dir / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n")
    return columns


def throughput_again(run: RecordedRun, step_time: StepTime, host: HostTime) -> float:
    """Output tokens per second, from the first arrival to the last end, of the same requests simulated.

    Args:
        run: the recording.
        step_time: of the device.
        host: around each step.
    """
    totals = RunTotals()
    _drive(run, step_time, host, totals)
    facts = totals.facts()
    return float(facts["num_finished_output_tokens"] / facts["duration"])


def _drive(
    run: RecordedRun, step_time: StepTime, host: HostTime, recorder: Recorder, ledger: MemoryLedger | None = None
) -> None:
    """Simulate a recorded run's requests on its strategy."""
    clock = VirtualClock()
    shares = bool((run.manifest["pool"].get("runner") or {}).get("share_reads", False))
    runner = SimulatedRunner(step_time, clock, host=host, shares=shares)
    engine = run.strategy().engine(runner, clock, overlap=run.overlap, ledger=ledger)
    requests = run.make_requests(as_long_as_recorded=True)
    drive(engine, requests, recorder, closed_loop=_closed_loop(run, requests), after_step=runner.after_step)


def _closed_loop(run: RecordedRun, requests: list[Request]) -> ClosedLoop | None:
    """The users of a closed loop, who send when they were answered; None for an open loop."""
    arrival = run.manifest["arrival"]
    if arrival["name"] != "closed_loop":
        return None
    return ClosedLoop(requests, arrival["num_users"], arrival["think_time"])
