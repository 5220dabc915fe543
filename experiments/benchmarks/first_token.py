"""Seconds from a fresh process to its first token, and where they go. One JSON line.

    kvarena benchmark first_token --shape llama-3.1-8b

`imports` end when every module is there, `load` with weights and pool, `fuse` with the fused decoder, `token` with the
first token of a prompt of 64. `modules` were imported; without `bytecode` of torch Python compiles it at every start.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvarena.engine.importing import importing
from kvarena.experiments.gpu.shapes import MAX_MODEL_LEN, SHAPES, fixed_batch
from kvarena.experiments.tools import tool_parser

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


def main(argv: Sequence[str]) -> int:
    """The command line."""
    parser = tool_parser(__name__, __doc__)
    parser.add_argument("--shape", default="llama-3.1-8b", choices=sorted(SHAPES), help="of the model")
    parser.add_argument("--slots", type=int, default=NUM_SLOTS, help="of the KV pool")
    parser.add_argument("--gemm", type=Path, help="a table that kvarena benchmark gemm made")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: kernels are interpreted")
    args = parser.parse_args(argv)
    print(json.dumps(first_token(args.shape, args.slots, args.gemm, args.device)))
    return 0
