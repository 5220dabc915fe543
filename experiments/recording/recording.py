"""Everything that a run of the main job records, and how long that takes.

    driver --on_submit, on_step--> Recording --> requests, steps
    engine --on_launch----------->           --> ledger, KV map        while the step's slots are allocated

All of it runs on the step's thread. What it costs is measured where it is called, with two readings of a clock for
each call, and stands in the manifest (`run.recording`): a reader need not believe that it is little.
"""

from __future__ import annotations

import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from kvarena.engine.core import Engine, StepOutput
from kvarena.engine.ledger import MemoryLedger
from kvarena.engine.request import Request
from kvarena.experiments.caching.accesses import AccessLog, watch
from kvarena.experiments.recording.kv_map import MEASURED_SHARE, KVMapRecorder
from kvarena.experiments.recording.record import RunRecorder, write_steps
from kvarena.experiments.recording.reuse_file import write_reuse
from kvarena.experiments.recording.scores import ScoreLog
from kvarena.experiments.recording.totals import RunTotals
from kvarena.reports.reading.names import KV_MAP_FILE, REQUESTS_FILE, REUSE_FILE, SCORES_FILE, STEPS_FILE

WARN_ABOVE = 0.01  # of a measured run's wall time
# s: a host that waits longer than this for tokens had the next step launched before the device was done.
HAD_TO_WAIT = 5e-5


class Recording:
    """What is recorded of one run. A context around the measured part, and the driver's recorder in it.

    Args:
        engine: whose run; the recording takes its ledger over, so that the ledger's time counts as well.
        level: `full`; `summary`: without token ids, the time of each token and the KV map; `none`: totals alone.
        kv_map: whether a full recording holds the KV map.
        scores: whether the scores of sampled tokens are kept.
        measured: times are a wall clock's; False where a virtual clock moves while the host works.
        accesses: what the engine's prefix cache was asked for before, where it is not empty; None: it is.
    """

    def __init__(
        self, engine: Engine, *, level: str, kv_map: bool, measured: bool, scores: bool = False,
        accesses: AccessLog | None = None,
    ) -> None:  # fmt: skip
        self._level = level
        self._measured = measured
        ledger = engine.ledger
        assert ledger is None or isinstance(ledger, MemoryLedger)
        self._ledger = None if level == "none" else ledger
        self._rows = None if level == "none" else RunRecorder(tokens=level == "full")
        self._accesses = accesses
        if accesses is not None:
            accesses.counts = True
        elif level != "none":
            self._accesses = watch(engine.allocator, engine.clock.now)
        self._kv_map: KVMapRecorder | None = None
        if level == "full" and kv_map:
            assert self._rows is not None
            share = MEASURED_SHARE if measured else None
            self._kv_map = KVMapRecorder(engine.allocator, self._rows.row, max_share=share)
        self._scores = ScoreLog() if scores else None
        self._settled: dict[str, np.ndarray] | None = None
        self._run: RunRecorder | RunTotals = self._rows or RunTotals()
        engine.ledger = None
        engine.on_launch = None if level == "none" else self.on_launch
        self._seconds = 0.0  # of a wall clock
        # Of these: spent where the device stood still, as far as can be told; and those since the last wait for tokens.
        self._delaying = self._since_wait = 0.0
        self._overlap = engine.overlap
        self._began = self._ended = (0.0, 0.0)  # a wall clock, and the process's time on all processors

    def __enter__(self) -> Self:
        self._began = _clocks()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._ended = _clocks()

    def step_columns(self) -> dict[str, np.ndarray] | None:
        """The steps as columns, without the ledger; None where they were not recorded."""
        return None if self._rows is None else self._rows.step_columns()

    @property
    def rows(self) -> tuple[RunRecorder, MemoryLedger] | None:
        """Requests and steps, and the ledger beside these, for who merges them with others'; None under `none`."""
        self._find_reuse()
        return None if self._rows is None or self._ledger is None else (self._rows, self._ledger)

    # ---- the driver's recorder

    def on_submit(self, req: Request, now: float) -> None:
        """`req` was handed to the engine at `now`."""
        start = time.perf_counter()
        self._run.on_submit(req, now)
        self._since_wait += time.perf_counter() - start

    def on_rejected(self, req: Request, now: float, error: str) -> None:
        """The engine refused `req`, which was handed over at `now`."""
        self._run.on_rejected(req, now, error)

    def on_launch(self, step: StepOutput) -> None:
        """A step is about to be launched. Raises EngineError when the ledger does not add up."""
        start = time.perf_counter()
        if self._ledger is not None:
            self._ledger.observe(step.plan, step.usage)
        if self._kv_map is not None:
            self._kv_map.on_launch(step)
        self._since_wait += time.perf_counter() - start

    def on_step(self, step: StepOutput) -> None:
        """Take one finished step in."""
        start = time.perf_counter()
        # All that was recorded since the last wait came before this one. Where the host still had to wait, the device
        # had work all the while, and without the recording the host would only have waited longer.
        self._seconds += self._since_wait
        if not self._overlap or step.wait_time < HAD_TO_WAIT:
            self._delaying += self._since_wait
        self._run.on_step(step)
        if self._scores is not None:
            self._scores.on_step(step)
        self._since_wait = time.perf_counter() - start

    @property
    def num_finished(self) -> int:
        """Requests that ended, for whatever reason."""
        return self._run.num_finished

    @property
    def num_output_tokens(self) -> int:
        """Tokens sampled; under `none` of the requests that ended."""
        return self._run.num_output_tokens

    @property
    def wall_time(self) -> float:
        """End of the last step, in seconds since the run's start."""
        return self._run.wall_time

    # ---- after the run

    def interrupt(self, by: str, num_requests: int) -> dict[str, Any]:
        """The run ended before its requests had.

        Args:
            by: a signal's name, or what went wrong.
            num_requests: of the workload.

        Returns:
            How far it came, for the manifest (`run.interrupted`).
        """
        run = self._run
        came = {"num_requests": num_requests, "num_submitted": run.num_submitted, "num_ended": run.num_finished}
        run.interrupt(f"the run was interrupted ({by})")
        return {"by": by} | came

    def write(self, run_dir: Path) -> None:
        """Write the Parquet files; none under `none`. May be called again for another folder."""
        if self._rows is None:
            return
        assert self._ledger is not None
        self._find_reuse()
        self._rows.write_requests(run_dir / REQUESTS_FILE)
        if self._settled is None:  # the books close once, and another folder may have to take the files
            # A step that was launched and never ended is in the ledger alone.
            settled = self._ledger.settle().items()
            self._settled = {name: column[: self._rows.num_steps] for name, column in settled}
        write_steps(run_dir / STEPS_FILE, self._rows.step_columns() | self._settled)
        if self._kv_map is not None:
            self._kv_map.write(run_dir / KV_MAP_FILE, self._rows.num_steps)
        if self._scores is not None:
            self._scores.write(run_dir / SCORES_FILE)
        if (reuse := self._rows.reuse_columns()) is not None:
            write_reuse(run_dir / REUSE_FILE, reuse)

    def _find_reuse(self) -> None:
        """Once: what the best prefix cache would have found of what was asked, and how long ago that was held."""
        if self._rows is not None and self._accesses is not None:
            self._rows.set_reuse(self._accesses.reuse())
            self._accesses = None

    def facts(self) -> dict[str, Any]:
        """What the manifest's section `run` says of it (docs/files.md)."""
        wall, processor = (end - begin for begin, end in zip(self._began, self._ended, strict=True))
        seconds = 0.0 if self._level == "none" else self._seconds + self._since_wait
        delaying = 0.0 if self._level == "none" else self._delaying + self._since_wait
        share = seconds / wall if wall > 0 else 0.0
        facts: dict[str, Any] = {
            "recorded": self._level,
            "wall_time": self._run.wall_time,
            "num_steps": self._run.num_steps,
            "processor_seconds": processor,
            "max_lateness": self._run.max_lateness,
            # A simulation's wall time depends on what else the machine does, its processor time does not.
            "recording": {"seconds": seconds if self._measured else share * processor, "share": share},
        }
        if self._measured:
            facts["recording"]["delaying_share"] = delaying / wall if wall > 0 else 0.0
        if isinstance(self._run, RunTotals):
            facts["totals"] = self._run.facts()
        return facts


def recording_warning(facts: dict[str, Any]) -> str | None:
    """What to say of a measured run that its recording slowed down; None of the others.

    Args:
        facts: of `Recording.facts`.
    """
    share, delaying = (facts["recording"][key] for key in ("share", "delaying_share"))
    if share <= WARN_ABOVE:
        return None
    took = f"recording took {100 * share:.1f} % of the run's wall time"
    if delaying <= WARN_ABOVE:
        return f"{took}, nearly all of it while the device computed: it held the device up for {100 * delaying:.2f} %"
    return f"{took} and held the device up for up to {100 * delaying:.1f} %; driver.record=summary records less"


def _clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()
