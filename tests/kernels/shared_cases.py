"""Decode rows whose block tables begin alike, over a pool of random keys and values, and what attention must give."""

from typing import NamedTuple

import numpy as np
import torch

from kvarena.engine.kernels.attention.base import AttentionCall
from kvarena.engine.pool.kv_pool import KVPool
from kvarena.engine.sharing.step_reads import StepReads

BLOCK = 16


class SharedCase(NamedTuple):
    pool: KVPool
    tables: list[list[int]]
    seq_lens: np.ndarray
    call: AttentionCall


def tree_case(
    prefixes: list[tuple[int, list[int]]],
    own: list[int],
    *,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    **options: object,
) -> SharedCase:
    """`prefixes` holds (blocks, rows that begin with them), outer ones first; `own` each row's tokens behind them."""
    tables: list[list[int]] = [[] for _ in own]
    ids = iter(np.random.default_rng(0).permutation(4000) + 1)
    for blocks, rows in prefixes:
        shared = [int(next(ids)) for _ in range(blocks)]
        for row in rows:
            tables[row] += shared
    seq_lens = np.array([len(table) * BLOCK + tokens for table, tokens in zip(tables, own, strict=True)])
    for table, tokens in zip(tables, own, strict=True):
        table += [int(next(ids)) for _ in range(-(-tokens // BLOCK))]
    pool = KVPool(
        num_blocks=max(map(max, tables)), block_size=BLOCK, num_layers=1, num_kv_heads=num_kv_heads,
        head_dim=head_dim, dtype=dtype, device=device,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    pool.data.copy_(torch.randn(pool.data.shape, generator=generator))
    table = np.zeros((len(own), max(map(len, tables))), dtype=np.int32)
    used = torch.zeros(pool.data.shape[2], dtype=torch.bool)
    for row, blocks_of_row in enumerate(tables):
        table[row, : len(blocks_of_row)] = blocks_of_row
        used[slots(blocks_of_row, int(seq_lens[row]))] = True
    # What nobody has spoils every sum that it gets into.
    pool.data[:, :, ~used] = torch.nan
    q = torch.randn(len(own), num_heads, head_dim, generator=generator).to(device, dtype)
    keys, values = pool.slots(0)
    call = AttentionCall(
        q, keys, values, torch.full_like(q, torch.nan),
        torch.arange(len(own) + 1, dtype=torch.int32, device=device),
        torch.tensor(seq_lens, dtype=torch.int32, device=device),
        torch.from_numpy(table).to(device), BLOCK, 0.3, **options,
    )  # fmt: skip
    return SharedCase(pool, tables, seq_lens, call)


def slots(table: list[int], seq_len: int) -> torch.Tensor:
    at = torch.arange(seq_len)
    return torch.tensor(table)[at // BLOCK] * BLOCK + at % BLOCK


def reader(case: SharedCase, most_rows: int | None = None, **options: object) -> StepReads:
    return StepReads(case.tables, dict.fromkeys(range(len(case.tables)), 0), BLOCK, most_rows, **options)


def exact(case: SharedCase) -> torch.Tensor:
    """Row by row in fp64."""
    call, out = case.call, []
    keys, values = (part.double().cpu() for part in (call.keys, call.values))
    for row, seq_len in enumerate(case.seq_lens.tolist()):
        at = slots(case.tables[row], seq_len)
        k, v = (part[at].repeat_interleave(call.group, 1) for part in (keys, values))
        scores = torch.einsum("hd,khd->hk", call.q[row].double().cpu(), k) * call.scale
        if call.softcap is not None:
            scores = call.softcap * torch.tanh(scores / call.softcap)
        if call.sliding_window is not None:
            scores[:, : max(0, seq_len - call.sliding_window)] = -torch.inf
        if call.sinks is not None:
            scores = torch.cat([scores, call.sinks.double().cpu()[:, None]], 1)
            v = torch.cat([v, torch.zeros_like(v[:1])])
        out.append(torch.einsum("hk,khd->hd", scores.softmax(1), v))
    return torch.stack(out)
