"""The founding claim on a GPU: {contiguous/max, paged} x {static, continuous} on one model, one pool, one runner.

    python -m experiments.gpu.claims measure --out DIR       # on the GPU machine: one file per cell
    python -m experiments.gpu.claims report DIR              # anywhere: run folders and the comparison

The pool is cut to 16,384 slots, so that memory is what binds, as in PagedAttention (SOSP'23), section 6.2; all requests
are there at once. The cells share the model, the fused forward, the graphs, overlap and the pool's memory; allocator
and scheduler are all that differs. `measure` imports torch, transformers, Triton and numpy and nothing else.
"""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path
from typing import Any

from allocators.contiguous import ContiguousAllocator
from allocators.paged import PagedAllocator
from engine.errors import KvarenaError
from experiments.gpu.cells import GpuCell, Strategy, make_runner, requests_from, run_cell, write_run_folder
from experiments.gpu.engines import Levers
from experiments.recording.files import SWEEP_FILE
from experiments.workloads.published import ShareGPTWorkload
from schedulers.continuous import ContinuousScheduler
from schedulers.static import StaticScheduler

MAX_MODEL_LEN = 2048
NUM_SLOTS = 16_384
MAX_NUM_SEQS = 256
SEED = 0
SUFFIX = ".json.gz"

REGIONS: dict[str, Any] = {
    "allocator": "contiguous", "make_allocator": ContiguousAllocator, "allocator_options": {"reservation": "max"},
}  # fmt: skip
PAGES: dict[str, Any] = {"allocator": "paged", "make_allocator": PagedAllocator}
# The quick ones first, so that a cut-off run leaves the most; the report has an order of its own.
STRATEGIES = [
    Strategy(
        **allocator,
        scheduler=scheduler,
        make_scheduler=make_scheduler,
        scheduler_options={"max_num_seqs": MAX_NUM_SEQS},
    )
    for allocator in (PAGES, REGIONS)
    for scheduler, make_scheduler in (("continuous", ContinuousScheduler), ("static", StaticScheduler))
]
REPORT_ORDER = ("contiguous x static", "contiguous x continuous", "paged x static", "paged x continuous")


def make_cell(strategy: Strategy, num_requests: int, vocab_size: int) -> GpuCell:
    """A cell with the same requests whatever the strategy, all there at time 0."""
    source = ShareGPTWorkload(
        num_requests=num_requests, seed=SEED, vocab_size=vocab_size, max_total_len=MAX_MODEL_LEN, on_exceed="drop"
    )
    return GpuCell(
        name=strategy.name,
        strategy=strategy,
        max_model_len=MAX_MODEL_LEN,
        requests=requests_from(source.items()),
        workload={"name": "sharegpt", "seed": SEED, "description": source.description},
        arrival={"name": "all_at_once"},
    )


def measure(out: Path, shape: str, num_requests: int, num_slots: int, device: str) -> None:
    """Run all cells, one file each. On a CPU with the plain runner, to try the command out."""
    bed, runner, levers = make_runner(shape, num_slots, MAX_NUM_SEQS, device, Levers())
    vocab_size = bed.model.spec.vocab_size
    run_cell(make_cell(STRATEGIES[0], 4, vocab_size), bed, runner, levers)  # what prompts need is compiled here
    out.mkdir(parents=True, exist_ok=True)
    for strategy in STRATEGIES:
        found = run_cell(make_cell(strategy, num_requests, vocab_size), bed, runner, levers)
        path = out / (strategy.name.replace(" ", "") + SUFFIX)
        with gzip.open(path, "wt") as file:
            json.dump(found, file)
        run = found["manifest"]["run"]
        tokens = sum(row["num_output_tokens"] for row in found["requests"])
        line = {"section": "claim", "cell": strategy.name, "output_tokens": tokens, **run}
        print(json.dumps(line | {"output_tokens_per_s": tokens / run["wall_time"]}), flush=True)


def report(folder: Path, commit: str | None) -> dict[str, Any]:
    """Turn the cells' files into run folders and write the comparison beside them; its summary.

    Args:
        folder: with the files of `measure`.
        commit: of the checkout that was measured, where it was a copy without git.
    """
    from reports.comparison import write_comparison
    from reports.run_report import write_run_report

    cells = [json.loads(gzip.decompress(path.read_bytes())) for path in sorted(folder.glob(f"*{SUFFIX}"))]
    if not cells:
        raise KvarenaError(f"{folder} holds no cells (*{SUFFIX}); run `measure --out {folder}` on a GPU machine first")
    cells.sort(key=lambda cell: REPORT_ORDER.index(cell["manifest"]["name"]))
    for number, cell in enumerate(cells):
        write_run_folder(cell, folder / str(number), commit)
        write_run_report(folder / str(number))
    sweep = {"runs": [str(n) for n in range(len(cells))], "baseline": None, "failed": [], "not_defined": []}
    (folder / SWEEP_FILE).write_text(json.dumps(sweep, indent=2) + "\n")
    return write_comparison(folder)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure", help="run the cells on this machine")
    measuring.add_argument("--out", type=Path, required=True)
    measuring.add_argument("--shape", default="llama-3.1-8b")
    measuring.add_argument("--requests", type=int, default=120)
    measuring.add_argument("--slots", type=int, default=NUM_SLOTS)
    measuring.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    reporting = commands.add_parser("report", help="make run folders and the comparison of measured cells")
    reporting.add_argument("folder", type=Path)
    reporting.add_argument("--commit", help="that was measured, where the machine had a copy without its history")
    args = parser.parse_args()
    try:
        if args.command == "measure":
            measure(args.out, args.shape, args.requests, args.slots, args.device)
        else:
            report(args.folder, args.commit)
            print(f"report: {args.folder / 'report.html'}")
    except KvarenaError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
