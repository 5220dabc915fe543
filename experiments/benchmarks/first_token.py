"""Seconds from a fresh process to its first token, and where they go. One JSON line.

    kvarena benchmark first_token --shape llama-3.1-8b

`imports` end when every module is there, `load` with the weights, `fuse` with pool and fused decoder, `token` with the
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
from kvarena.experiments.gpu.floors import MAX_MODEL_LEN, SHAPES, fixed_batch
from kvarena.experiments.tools import tool_parser

NUM_SLOTS = 320 * MAX_MODEL_LEN // 8
PROMPT_LEN = 64


def first_token(shape: str, num_slots: int, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Start an engine, and have it make one token."""
    with importing():
        from kvarena.experiments.gpu.engines import Engines, drive
    imported = time.time()
    engines = Engines(shape, "scheduler.max_num_seqs=256", f"kv_cache.num_slots={num_slots}", *overrides)
    engines.load()
    loaded = time.time()
    parts = engines.build()
    fused = time.time()
    drive(parts.engine, fixed_batch(1, PROMPT_LEN, 1, vocab_size=parts.spec.vocab_size))
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
    parser.add_argument("--shape", default="llama-3.1-8b", choices=("demo", *SHAPES), help="of the model")
    parser.add_argument("--slots", type=int, default=NUM_SLOTS, help="of the KV pool")
    parser.add_argument("overrides", nargs="*", help="further settings of the engine, as of run.py")
    args = parser.parse_args(argv)
    print(json.dumps(first_token(args.shape, args.slots, args.overrides)))
    return 0
