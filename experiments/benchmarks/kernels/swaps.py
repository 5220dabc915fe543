"""What it costs on this GPU to move a request's KV to the host and back, by block size.

    kvarena benchmark swaps --tokens 512

The engine's own copies (`engine/pool/host_blocks.py`): blocks are gathered, and each moves with all its layers in one
transfer. Every line is JSON: medians of wall microseconds, waited for, of both ways for so many tokens of the model
with OPT-13B's KV. The last line fits `microseconds = transfers * per_transfer + bytes / bandwidth` to them, both ways.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from kvarena.engine.contract import BlockCopy, CopyKind
from kvarena.engine.pool.kv_pool import KVPool
from kvarena.experiments.gpu.timing import require_cuda
from kvarena.experiments.tools import tool_parser

BLOCK_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
OPT_13B: dict[str, Any] = {"num_layers": 40, "num_kv_heads": 40, "head_dim": 128}
REPEATS = 15
WARMUP = 3

Line = dict[str, Any]


def median_us(call: Callable[[], object]) -> float:
    """Median microseconds of a call and the work that it queues."""
    times = []
    for _ in range(WARMUP + REPEATS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e6)
    return statistics.median(times[WARMUP:])


def swap_line(block_size: int, num_tokens: int) -> Line:
    """Times to swap `num_tokens` out and in again, in blocks scattered over the pool."""
    num_blocks = -(-num_tokens // block_size)
    pool = KVPool(
        num_blocks=2 * num_blocks, block_size=block_size, num_swap_blocks=num_blocks, device="cuda",
        dtype=torch.float16, **OPT_13B,
    )  # fmt: skip
    ids = np.random.default_rng(0).permutation(2 * num_blocks)[:num_blocks] + 1
    host = range(1, num_blocks + 1)
    out = [BlockCopy(CopyKind.SWAP_OUT, int(block), there) for block, there in zip(ids, host, strict=True)]
    back = [BlockCopy(CopyKind.SWAP_IN, there, int(block)) for block, there in zip(ids, host, strict=True)]
    line = {"block_size": block_size, "num_tokens": num_tokens, "num_transfers": num_blocks}
    line["bytes"] = num_blocks * pool.num_bytes // (pool.num_blocks + 1)
    return line | {
        "swap_out_us": round(median_us(lambda: pool.apply_copies(out)), 1),
        "swap_in_us": round(median_us(lambda: pool.apply_copies(back)), 1),
    }


def fit(lines: Sequence[Line]) -> Line:
    """Seconds per transfer and bytes per second that explain both ways together: least squares of the relative error.

    Args:
        lines: of `swap_line`, of at least two block sizes.
    """
    times = np.array([(line["swap_out_us"] + line["swap_in_us"]) / 2 * 1e-6 for line in lines])
    features = np.array([(line["num_transfers"], line["bytes"]) for line in lines], dtype=float)
    (per_transfer, per_byte), *_ = np.linalg.lstsq(features / times[:, None], np.ones(len(times)))
    errors = features @ (per_transfer, per_byte) / times - 1
    return {
        "us_per_transfer": round(per_transfer * 1e6, 2),
        "gb_per_second": round(1e-9 / per_byte, 2),
        "largest_error": round(float(np.abs(errors).max()), 3),
    }


def main(argv: Sequence[str]) -> int:
    """Measure every block size."""
    parser = tool_parser(__name__, __doc__)
    parser.add_argument("--tokens", type=int, default=512, help="tokens whose KV moves")
    args = parser.parse_args(argv)
    if args.tokens < 1:
        parser.error("--tokens must be at least 1")
    require_cuda()
    print(json.dumps({"device": torch.cuda.get_device_name(), "torch": torch.__version__}), flush=True)
    lines = []
    for block_size in BLOCK_SIZES:
        lines.append(swap_line(block_size, args.tokens))
        print(json.dumps(lines[-1]), flush=True)
    print(json.dumps(fit(lines)))
    return 0
