"""How fast the simulator is, and how much memory it takes, end to end:

    kvarena benchmark simulator --trace AzureLLMInferenceTrace_conv.csv --requests 100000

One cell of the main job from config to report: the trace, repeated and replayed faster, on one simulated H200 with the
Llama-3.1-8B shape, `paged x chunked`, with a summary of each request. Prints one JSON line: seconds of a wall clock and
of processors (all threads, imports included), requests per minute of one core, peak memory.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from kvarena.experiments.folders.provenance import git_state, machine, peak_rss_bytes
from kvarena.experiments.jobs.job import execute
from kvarena.experiments.settings.compose import compose_cell
from kvarena.experiments.tools import tool_parser

CELL = (
    "runner=simulated",
    "runner.profile=h200",
    "model=llama-3.1-8b-shape",
    "engine.dtype=auto",
    "engine.max_model_len=8192",
    "allocator=paged",
    "scheduler=chunked",
    "scheduler.max_num_batched_tokens=2048",
    "kv_cache.num_slots=null",
    "workload=azure_trace",
    "workload.repeat=true",
    "arrival=trace",
    "driver.record=summary",
)


def measure(trace: Path, num_requests: int, speed: float, out: Path, *overrides: str) -> dict[str, object]:
    """Run the cell into `out`; what the benchmark prints."""
    begin, begin_cpu = time.perf_counter(), time.process_time()
    config, choices = compose_cell(
        [*CELL, f"workload.path={trace}", f"workload.num_requests={num_requests}", f"arrival.speed={speed}", *overrides]
    )
    summary = execute(config, out, "paged x chunked", choices)
    cpu = time.process_time()
    return {
        "bench": "simulator",
        "requests": summary["num_requests"],
        "finished": summary["num_finished"],
        "output_tokens": summary["num_output_tokens"],
        "steps": summary["num_steps"],
        "simulated_seconds": round(summary["duration_seconds"], 1),
        "mean_batch": round(summary["batch_size_mean"], 1),
        "wall_seconds": round(time.perf_counter() - begin, 2),
        "cpu_seconds": round(cpu - begin_cpu, 2),
        "cpu_seconds_with_imports": round(cpu, 2),
        "requests_per_core_minute": round(60 * num_requests / cpu),
        "peak_rss_mib": round(peak_rss_bytes() / 2**20),
        "commit": git_state()["commit"],
        "cpu": machine()["cpu"],
    }


def main(argv: Sequence[str]) -> int:
    """The command line; see the module's docstring."""
    parser = tool_parser(__name__, __doc__)
    parser.add_argument("--trace", type=Path, required=True, help="an Azure LLM inference trace (CSV)")
    parser.add_argument("--requests", type=int, default=100_000, help="how many")
    parser.add_argument("--speed", type=float, default=3.5, help="replay so many times as fast as recorded")
    parser.add_argument("--out", type=Path, help="keep the run folder here")
    parser.add_argument("overrides", nargs="*", help="further settings, as of run.py")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        out = args.out or Path(folder)
        out.mkdir(parents=True, exist_ok=True)
        print(json.dumps(measure(args.trace, args.requests, args.speed, out, *args.overrides)), flush=True)
    return 0
