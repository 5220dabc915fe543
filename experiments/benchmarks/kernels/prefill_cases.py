"""Prompts in the kernel benchmark: behind a context, of unequal lengths, and cuDNN's rate for the same work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from kvarena.engine.errors import KvarenaError
from kvarena.engine.kernels.attention.base import AttentionCall
from kvarena.engine.kernels.attention.config import PrefillConfig, decode_config, prefill_config
from kvarena.engine.kernels.attention.plan import Shape, plan_step
from kvarena.engine.kernels.attention.prefill import prefill_attention
from kvarena.engine.kernels.attention.wide_prefill import ROWS, PrefillTile, WidePrefill
from kvarena.engine.kernels.hopper import load_hopper_kernels
from kvarena.experiments.benchmarks.kernels.attention_cases import (
    LLAMA_8B,
    QWEN3_06B,
    Batch,
    make_batch,
    relative_error,
)
from kvarena.experiments.gpu.timing import time_launches

Line = dict[str, Any]
Launches = tuple[list[Callable[[], None]], Tensor]

# (context before the step, new tokens) of each request.
CHUNK_CASES: dict[str, list[tuple[int, int]]] = {
    "4 x 4096": [(0, 4096)] * 4,
    "1 x 32000": [(0, 32000)],
    **{
        f"{chunk} after {context}": [(context, chunk)] for chunk, context in product((2048, 8192), (8192, 16384, 32768))
    },
    "8 x 1000 after 16000": [(16000, 1000)] * 8,
    "128 after 32768": [(32768, 128)],
    "512 after 8192": [(8192, 512)],
    "1100 after 16384": [(16384, 1100)],
    "8 unequal prompts": [(0, length) for length in (338, 350, 500, 700, 1500, 2900, 4096, 6000)],
    "12 short prompts": [(0, length) for length in range(100, 1024, 77)],
}
# Of so few new tokens the items may be shared out.
SHARED_TOKENS = 2000
TILES = (
    PrefillTile(), PrefillTile(160), PrefillTile(128), PrefillTile(128, 3), PrefillTile(144),
    PrefillTile(176, 2, turns=False), PrefillTile(128, 2, turns=False),
)  # fmt: skip


def attention_calls(batch: Batch, *, contiguous: bool) -> tuple[list[AttentionCall], Tensor]:
    """One per layer of the pool, and the output that they share."""
    loc, lens = (
        torch.from_numpy(ints).to(batch.q.device) for ints in (batch.query_start_loc, batch.seq_lens.astype(np.int32))
    )
    out = torch.full_like(batch.q, torch.nan)
    scale = batch.shape.head_dim**-0.5
    return [
        AttentionCall(
            batch.q, keys, values, out, loc, lens, batch.block_table, batch.block_size, scale, contiguous=contiguous
        )
        for keys, values in zip(batch.keys, batch.values, strict=True)
    ], out


def prefill_launches(
    batch: Batch, config: PrefillConfig | WidePrefill, *, contiguous: bool = False, cut: bool = True
) -> Launches:
    """One launch per layer of the pool, and the output that they share.

    Args:
        batch: what is computed.
        config: of the Triton kernel, or the CUDA kernel.
        contiguous: the blocks of each request are consecutive.
        cut: let several programs of the CUDA kernel share an item, if there are few.
    """
    shape = batch.shape
    rows = config.rows if isinstance(config, PrefillConfig) else ROWS
    programs = config.programs(shape.num_kv_heads) if cut and isinstance(config, WidePrefill) else None
    queries = rows // (shape.num_heads // shape.num_kv_heads)
    plan = Shape(decode_config(shape.head_dim, 2, 1), queries, 1, prefill=programs)
    words, capacity = plan_step(batch.query_start_loc, batch.seq_lens, plan)
    items = torch.from_numpy(words).cuda()
    calls, out = attention_calls(batch, contiguous=contiguous)
    given: dict[str, Any] = {"items": items, "num_items": capacity.prefill}
    launch: Callable[[AttentionCall], None]
    if isinstance(config, PrefillConfig):
        launch = partial(prefill_attention, config=config, **given)
    else:
        launch = partial(config, **given)
    return [partial(launch, call) for call in calls], out


def same_work(batch: Batch) -> tuple[list[Callable[[], object]], None]:
    """A call of the same operations by cuDNN, over keys side by side: of a chunk its context, then the chunk itself.

    Nothing is gathered and nothing is merged, so it is a bound for whoever does both.
    """
    shape, scale = batch.shape, batch.shape.head_dim**-0.5

    def heads(count: int, length: int, rows: int) -> Tensor:
        made = torch.randn(count, length, rows, shape.head_dim, dtype=torch.bfloat16, device="cuda")
        return made.transpose(1, 2)

    def attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=True)

    parts = []
    equal = len({(int(start), int(new)) for start, new in zip(batch.starts, batch.query_lens, strict=True)}) == 1
    count = len(batch.starts) if equal else 1
    for start, new in zip(batch.starts[::count].tolist(), batch.query_lens[::count].tolist(), strict=True):
        q = heads(count, new, shape.num_heads)
        for length, causal in ((start, False), (new, True)):
            if length:
                k, v = (heads(count, length, shape.num_kv_heads) for _ in range(2))
                parts.append(partial(attend, q, k, v, causal=causal))

    def call() -> None:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            for part in parts:
                part()

    return [call], None


def bench_chunks(tune: Callable[[], bool]) -> Iterator[tuple[Line, Batch]]:
    """Each case in the CUDA kernel, the Triton kernel, and cuDNN; other tiles of the first while `tune` says so."""
    kernels = load_hopper_kernels("cuda")
    # Each keeps what it has compiled.
    wide = {} if kernels is None else {tile: WidePrefill(kernels, tile) for tile in TILES}
    for shape, (case, rows) in product((LLAMA_8B, QWEN3_06B), CHUNK_CASES.items()):
        batch = make_batch(shape, rows)
        triton = prefill_config(shape.head_dim, 2, shape.num_heads // shape.num_kv_heads)
        line: Line = {"shape": shape.name, "case": case}
        own = line | {"kernel": "prefill", "config": [*triton]}
        yield _measured(own, partial(prefill_launches, batch, triton), batch)
        for tile, launch in wide.items():
            if tile == TILES[0] or tune():
                own = line | {"kernel": "wide prefill", "config": [*tile]}
                yield _measured(own, partial(prefill_launches, batch, launch), batch)
        if wide and sum(new for _, new in rows) < SHARED_TOKENS:
            own = line | {"kernel": "wide prefill, items whole", "config": [*TILES[0]]}
            yield _measured(own, partial(prefill_launches, batch, wide[TILES[0]], cut=False), batch)
        yield _measured(line | {"kernel": "cudnn, same work"}, partial(same_work, batch), batch)
        del batch


def _measured(line: Line, make: Callable[[], tuple[list[Any], Tensor | None]], batch: Batch) -> tuple[Line, Batch]:
    """Check and time launches; those that the device cannot run say so in their line."""
    try:
        launches, out = make()
        launches[0]()
        if out is not None:
            line["error"] = float(f"{relative_error(batch, 0, out, batch.shape.head_dim**-0.5):.2e}")
        line["us"] = round(time_launches(launches, repeats=5, min_launches=4), 2)
    except (RuntimeError, KvarenaError) as failure:
        line["failed"] = (str(failure) or type(failure).__name__).splitlines()[0][:200]
    return line, batch
