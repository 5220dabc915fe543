"""How often identical cells are told apart on a machine that is busy on purpose: `experiment=aa_test`, many times.

    kvarena check aa_under_load --tries 20 --out DIR  # 20 tries with load, then one without
    kvarena check aa_under_load --jobs 4 --processes 8   # on many cores: four tries at once

Load: processes that compute for a while and pause for a while, both drawn anew each time, so that the machine's speed
changes within runs, between them and between rounds; tries that run at once load the machine for each other, too.
Prints one line of JSON for each try and one for all; exits with 1 where more than --allowed tries hold a false verdict.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kvarena.experiments.folders.sources import PROJECT_ROOT
from kvarena.experiments.studies.aa_test import FALSE_VERDICTS, SMALLEST
from kvarena.experiments.tools import tool_parser
from kvarena.reports.reading.names import STUDY_FILE

SECONDS = (0.2, 12.0)  # of work and of a pause


def _compute(seed: int) -> None:
    """Work and pause in turn until the process is ended, or the one that started it is gone."""
    drawn, parent = random.Random(seed), multiprocessing.parent_process()
    while parent is None or parent.is_alive():
        until = time.monotonic() + drawn.uniform(*SECONDS)
        while time.monotonic() < until:
            sum(range(10_000))
        time.sleep(drawn.uniform(*SECONDS))


@contextmanager
def load(num_processes: int, seed: int) -> Iterator[None]:
    """Keep the machine busy, now more and now less.

    Args:
        num_processes: that work and pause in turn.
        seed: of how long.
    """
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=_compute, args=(seed * 1000 + number,), daemon=True) for number in range(num_processes)
    ]
    for worker in workers:
        worker.start()
    try:
        yield
    finally:
        for worker in workers:
            worker.terminate()
            worker.join()


def one_try(out: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Run the experiment once; what it found.

    Raises:
        RuntimeError: it failed.
    """
    start = time.monotonic()
    command = [sys.executable, str(PROJECT_ROOT / "run.py"), "experiment=aa_test", f"hydra.run.dir={out}", *overrides]
    done = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"experiment=aa_test ended with {done.returncode}: {done.stderr.strip()}")
    study = json.loads((out / STUDY_FILE).read_text())
    claims = {claim["quantity"]: claim for claim in study["claims"]}
    effects = {name.removeprefix(f"{SMALLEST}: "): claim["ours"] for name, claim in claims.items() if SMALLEST in name}
    return {
        "false_verdicts": int(claims[FALSE_VERDICTS]["ours"]),
        "of": claims[FALSE_VERDICTS]["note"],
        "smallest_percent": effects,
        "processor": study["notes"][-1],
        "seconds": round(time.monotonic() - start, 1),
    }


def _loaded(out: Path, number: int, args: argparse.Namespace) -> dict[str, Any]:
    with load(args.processes, number):
        return one_try(out, args.overrides)


def main(argv: Sequence[str]) -> int:
    """Run the tries; returns the exit code."""
    parser = tool_parser(__name__, __doc__)
    parser.add_argument("--tries", type=int, default=20, help="tries under load")
    parser.add_argument("--processes", type=int, default=2 * (os.cpu_count() or 1), help="that make a try's load")
    parser.add_argument("--jobs", type=int, default=1, help="tries at once")
    parser.add_argument("--allowed", type=int, default=2, help="tries that may hold a false verdict")
    parser.add_argument("--out", type=Path, help="keep the tries' folders here")
    parser.add_argument("overrides", nargs="*", help="of the experiment, such as study.rounds=4")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        out = args.out or Path(scratch)
        tries = []
        with ThreadPoolExecutor(args.jobs) as pool:
            jobs = [pool.submit(_loaded, out / f"loaded-{number:02d}", number, args) for number in range(args.tries)]
            for number, job in enumerate(jobs):
                tries.append(job.result())
                print(json.dumps({"try": number} | tries[-1]), flush=True)
        quiet = one_try(out / "quiet", args.overrides)
    wrong = sum(bool(one["false_verdicts"]) for one in tries)
    print(json.dumps({"tries": len(tries), "tries_with_a_false_verdict": wrong, "allowed": args.allowed,
                      "load_processes": args.processes, "jobs": args.jobs, "cores": os.cpu_count(),
                      "quiet": quiet}))  # fmt: skip
    return int(wrong > args.allowed)
