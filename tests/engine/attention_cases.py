"""Random attention batches over a scattered pool, and dense fp64 attention to judge a backend by."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvarena.engine.attention.base import AttentionBackend, AttentionMetadata
from kvarena.engine.pool.kv_pool import KVPool


@dataclass
class Case:
    pool: KVPool
    meta: AttentionMetadata
    q: Tensor
    k: Tensor  # new tokens' keys, [T, HK, D]
    v: Tensor
    context_k: list[Tensor]  # per request [seq_len, HK, D]
    context_v: list[Tensor]


def make_case(
    rows: list[tuple[int, int]],
    *,
    block_size: int = 16,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 32,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
    layer: int = 1,
) -> Case:
    """`rows` holds (context before this step, new tokens). Blocks are scattered, unused slots hold garbage."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    num_blocks = [-(-(start + new) // block_size) for start, new in rows]
    pool = KVPool(
        num_blocks=sum(num_blocks) + 5,
        block_size=block_size,
        num_layers=2,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        device=device,
    )
    pool.data.normal_(mean=3.0, generator=None if device != "cpu" else generator)
    ids = (torch.randperm(pool.num_blocks, generator=generator) + 1).numpy()
    table = np.zeros((len(rows), max(num_blocks) + 2), dtype=np.int32)
    at, slots, context_k, context_v = 0, [], [], []
    for row, ((start, new), count) in enumerate(zip(rows, num_blocks, strict=True)):
        table[row, :count] = ids[at : at + count]
        at += count
        positions = np.arange(start + new)
        slot = torch.from_numpy(
            table[row, positions // block_size].astype(np.int64) * block_size + positions % block_size
        )
        k, v = randn(start + new, num_kv_heads, head_dim), randn(start + new, num_kv_heads, head_dim)
        keys, values = pool.slots(layer)
        keys[slot[:start].to(device)], values[slot[:start].to(device)] = k[:start], v[:start]
        slots.append(slot[start:])
        context_k.append(k)
        context_v.append(v)
    new_lens = np.array([new for _, new in rows])
    seq_lens = np.array([start + new for start, new in rows], dtype=np.int32)
    loc = np.concatenate([[0], np.cumsum(new_lens)]).astype(np.int32)
    meta = AttentionMetadata(
        query_start_loc=torch.from_numpy(loc).to(device),
        seq_lens=torch.from_numpy(seq_lens).to(device),
        slot_mapping=torch.cat(slots).to(device),
        block_table=torch.from_numpy(table).to(device),
        logits_indices=torch.from_numpy(loc[1:] - 1).long().to(device),
        max_query_len=int(new_lens.max()),
        max_seq_len=int(seq_lens.max()),
        block_size=block_size,
        host_query_start_loc=loc,
        host_seq_lens=seq_lens,
    )
    news = [start for start, _ in rows]
    return Case(
        pool=pool,
        meta=meta,
        q=randn(int(loc[-1]), num_heads, head_dim),
        k=torch.cat([k[start:] for k, start in zip(context_k, news, strict=True)]),
        v=torch.cat([v[start:] for v, start in zip(context_v, news, strict=True)]),
        context_k=context_k,
        context_v=context_v,
    )


def poison(case: Case, block_size: int) -> None:
    """Slots that no request has, in its own blocks too, hold what spoils every sum that it gets into."""
    used = torch.zeros(case.pool.data.shape[2], dtype=torch.bool)
    table = case.meta.block_table.cpu()
    for row, length in enumerate(case.meta.host_seq_lens.tolist()):
        at = torch.arange(length)
        used[table[row][at // block_size].long() * block_size + at % block_size] = True
    case.pool.data[:, :, ~used.to(case.pool.data.device)] = torch.nan


def make_contiguous(case: Case, block_size: int) -> None:
    """Move every request's blocks so that they follow each other; spoil all table entries but the first."""
    table, used = case.meta.block_table, 1
    counts = -(-case.meta.host_seq_lens // block_size)
    old = case.pool.data.clone().view(2, 2, -1, block_size, *case.pool.data.shape[3:])
    new = case.pool.data.view(old.shape)
    slots = []
    for row, count in enumerate(counts.tolist()):
        ids = torch.arange(used, used + count, device=table.device)
        new[:, :, ids] = old[:, :, table[row, :count].long()]
        table[row, :count] = ids
        table[row, 1:] = -7  # only the first entry may be read
        seq_len = int(case.meta.host_seq_lens[row])
        begin = seq_len - int(np.diff(case.meta.host_query_start_loc)[row])
        slots.append(used * block_size + torch.arange(begin, seq_len))
        used += count
    case.meta.slot_mapping = torch.cat(slots).to(table.device)


def run_backend(backend: AttentionBackend, case: Case, *, layer: int = 1, **options: object) -> Tensor:
    backend.prepare(case.meta)
    backend.write_kv(case.k, case.v, layer, case.meta)
    return backend.attend(case.q, layer, case.meta, **options)  # type: ignore[arg-type]


def dense_attention(
    case: Case,
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention request by request in fp64 on the host."""
    out = []
    loc = case.meta.host_query_start_loc
    for row, (k, v) in enumerate(zip(case.context_k, case.context_v, strict=True)):
        q = case.q[loc[row] : loc[row + 1]].double().cpu()
        k, v = k.double().cpu(), v.double().cpu()
        group = q.shape[1] // k.shape[1]
        scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(group, 1)) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        query_at = torch.arange(len(k) - len(q), len(k))[:, None]
        key_at = torch.arange(len(k))[None]
        seen = key_at <= query_at
        if sliding_window is not None:
            seen &= key_at > query_at - sliding_window
        scores = scores.masked_fill(~seen, -torch.inf)
        if sinks is not None:
            extra = sinks.double().cpu().view(-1, 1, 1).expand(-1, len(q), 1)
            weights = torch.cat([scores, extra], -1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1)
        out.append(torch.einsum("hqk,khd->qhd", weights, v.repeat_interleave(group, 1)))
    return torch.cat(out)
