"""Many random traces through the registered strategies, against the oracle:

    kvarena check traces --traces 10000 --seed 0

Each trace goes through every allocator, with the scheduler and overlap changing from trace to trace. Failures name
the trace and the pair; the last line of stdout is JSON. Exit code 1 when anything failed.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from collections.abc import Iterator, Sequence

from kvarena.experiments.fuzzing.matrix import PATHS, Coverage, MatrixFailure, cells_of_round, run_cell
from kvarena.experiments.fuzzing.random_traces import make_trace
from kvarena.experiments.jobs.output import tracked
from kvarena.experiments.tools import tool_parser


def fuzz_trace(seed: int) -> tuple[int, Coverage, list[str]]:
    """Run one trace; returns (cells run, what happened in them, failures)."""
    trace, coverage, failures = make_trace(seed), Coverage(), []
    cells = cells_of_round(seed)
    for cell in cells:
        try:
            coverage += run_cell(trace, cell).coverage
        except MatrixFailure as failure:
            failures.append(str(failure))
    return len(cells), coverage, failures


def _run_all(seeds: Sequence[int], jobs: int) -> Iterator[tuple[int, Coverage, list[str]]]:
    if jobs == 1:
        yield from map(fuzz_trace, seeds)
        return
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        yield from pool.imap_unordered(fuzz_trace, seeds, chunksize=8)


def main(argv: Sequence[str]) -> int:
    """Run the traces; see the module's docstring."""
    parser = tool_parser(__name__, __doc__)
    parser.add_argument("--traces", type=int, default=1000, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="of the first; trace i has seed SEED + i")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--max-failures", type=int, default=10, help="stop after so many")
    args = parser.parse_args(argv)
    if args.traces < 1 or args.jobs < 1:
        parser.error("--traces and --jobs must be at least 1")
    started, num_runs, num_traces = time.perf_counter(), 0, 0
    coverage, failures = Coverage(), list[str]()
    seeds = range(args.seed, args.seed + args.traces)
    for num_cells, happened, failed in tracked(_run_all(seeds, args.jobs), "traces", args.traces, "traces"):
        num_traces, num_runs = num_traces + 1, num_runs + num_cells
        coverage += happened
        failures += failed
        for failure in failed:
            print(failure, file=sys.stderr, flush=True)
        if len(failures) >= args.max_failures:
            break
    print(
        json.dumps(
            {
                "traces": num_traces,
                "runs": num_runs,
                "failures": len(failures),
                "first_failure": failures[0] if failures else None,
                "seconds": round(time.perf_counter() - started, 1),
                "steps": coverage["steps"],
                "happened": {path: coverage[path] for path in PATHS},
            }
        )
    )
    return 1 if failures else 0
