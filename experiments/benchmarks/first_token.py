"""Seconds from a fresh process to its first token, and where they go. One JSON line.

    python -m kvarena.experiments.benchmarks.first_token --shape llama-3.1-8b

`imports` end when every module is there, `load` with weights and pool, `fuse` with the fused decoder, `token` with the
first token of a prompt of 64. `modules` were imported; without `bytecode` of torch Python compiles it at every start.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from kvarena.engine.errors import KvarenaError
from kvarena.engine.importing import importing
from kvarena.experiments.gpu.shapes import MAX_MODEL_LEN, SHAPES, fixed_batch

NUM_SLOTS = 320 * MAX_MODEL_LEN // 8
PROMPT_LEN = 64


def first_token(shape: str, num_slots: int, gemm: Path | None, device: str) -> dict[str, Any]:
    """Start an engine, and have it make one token."""
    with importing():
        from kvarena.experiments.gpu.engines import Levers, drive, make_bed
        from kvarena.experiments.gpu.timing import require_cuda

        if device == "cuda":
            require_cuda()
    imported = time.time()
    dtype = "bfloat16" if device == "cuda" else "float32"
    bed = make_bed(shape, num_slots, gemm, dtype=dtype, device=device)
    loaded = time.time()
    runner = bed.runner(Levers(), max_num_seqs=256)
    fused = time.time()
    engine = bed.engine(runner, overlap=True, max_num_seqs=256)
    drive(engine, fixed_batch(1, PROMPT_LEN, 1, vocab_size=bed.model.spec.vocab_size))
    done = time.time()
    start = _process_start()
    return {
        "since_process_start": round(done - start, 2), "imports": round(imported - start, 2),
        "load": round(loaded - imported, 2), "fuse": round(fused - loaded, 2), "token": round(done - fused, 2),
        "modules": len(sys.modules), "bytecode": _has_bytecode("torch"),
    }  # fmt: skip


def _process_start() -> float:
    """Unix time at which this process started."""
    ticks = float(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    return time.time() - (uptime - ticks / os.sysconf("SC_CLK_TCK"))


def _has_bytecode(package: str) -> bool:
    """Whether Python finds an imported package's modules compiled."""
    return Path(importlib.util.cache_from_source(str(sys.modules[package].__file__))).is_file()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", default="llama-3.1-8b", choices=sorted(SHAPES))
    parser.add_argument("--slots", type=int, default=NUM_SLOTS, help="of the KV pool")
    parser.add_argument("--gemm", type=Path, help="a table of kvarena.experiments.benchmarks.kernels.gemm")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: kernels are interpreted")
    args = parser.parse_args()
    try:
        print(json.dumps(first_token(args.shape, args.slots, args.gemm, args.device)))
    except KvarenaError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
