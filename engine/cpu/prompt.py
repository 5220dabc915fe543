"""Attention of prompts: requests with several new tokens, behind a context that may be cached, by tiles.

    queries [QUERIES tokens x group heads] of one KV head     keep their sums while
    keys, values in tiles of TILE tokens                      come through the block table, widened and side by side

A tile's keys are turned on their side, so that both products are blocks of sums in registers. Softmax over tiles as in
FlashAttention (Dao et al., 2022). Threads take equal shares of all (query, key) pairs, in whole blocks of queries.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from kvarena.engine.cpu.blocks import multiply_block
from kvarena.engine.cpu.compiler import Kernel, kernel, num_threads, thread_id
from kvarena.engine.cpu.decode import TILE, find_slot, softmax_tile
from kvarena.engine.cpu.simd import F32, F64, I32, I64, LANES, narrow, pointer, pointer_at, widen

ROWS = 128  # query rows of a block, a row being one head of one token
_FOUR = 4  # rows of a block of sums
_ZERO, _LOWEST = np.float32(0), np.float32(-np.inf)


def _columns() -> int:
    """Columns of a block of sums: as many as the registers hold."""
    return 2 * LANES


def scratch_words(group: int, head_dim: int, threads: int) -> int:
    """Float32 words of scratch that `prompt_kernel` needs."""
    return threads * _thread_words(max(1, ROWS // group) * group + _FOUR, head_dim, -(-head_dim // 32) * 32)


def _thread_words(rows: int, dim: int, padded: int) -> int:
    # Queries, sums, scores, maxima and denominators; a tile's keys and values.
    return (rows * (dim + padded + TILE + 2) + TILE * (dim + padded) + 15) // 16 * 16


def prompt_kernel(head_dim: int, group: int, q_kind: int, kv_kind: int) -> Kernel:
    """Attention of prompts; arguments as of `decode_kernel`, `rows` being the requests with several new tokens."""
    return _prompt_kernel(head_dim, group, q_kind, kv_kind, _columns())


@cache
def _prompt_kernel(head_dim: int, group: int, q_kind: int, kv_kind: int, num_columns: int) -> Kernel:
    dim, per_kv, columns = int(head_dim), int(group), int(num_columns)
    q_type, kv_type = int(q_kind), int(kv_kind)
    padded, queries = -(-dim // 32) * 32, max(1, ROWS // per_kv)
    most_rows = queries * per_kv + _FOUR
    own = _thread_words(most_rows, dim, padded)

    @kernel("17q2d")
    def prompt(args):  # type: ignore[no-untyped-def]
        a, reals = pointer(args, I64), pointer(args + 136, F64)
        q, out, keys, values = (
            pointer(a[0], q_type),
            pointer(a[1], q_type),
            pointer(a[2], kv_type),
            pointer(a[3], kv_type),
        )
        table, width, seq_lens, query_loc = pointer(a[4], I32), a[5], pointer(a[6], I32), pointer(a[7], I32)
        rows, num_rows, block_size, kv_heads, window = pointer(a[8], I32), a[9], a[10], a[11], a[12]
        contiguous, sinks, q_stride = a[13], pointer(a[14], F32), a[16]
        scale, softcap = np.float32(reals[0]), np.float32(reals[1])
        team, me = np.int64(num_threads()), np.int64(thread_id())
        query = pointer(a[15] + 4 * own * me, F32)
        sums = pointer_at(query, most_rows * dim)
        scores = pointer_at(sums, most_rows * padded)
        stats = pointer_at(scores, most_rows * TILE)
        tile_k = pointer_at(stats, 2 * most_rows)
        tile_v = pointer_at(tile_k, TILE * dim)

        total = np.int64(0)
        for i in range(num_rows):
            row = rows[i]
            end, new = np.int64(seq_lens[row]), np.int64(query_loc[row + 1] - query_loc[row])
            for first in range(end - new, end, queries):
                last = min(first + queries, end)
                total += (last - (max(first - window + 1, 0) if window > 0 else 0)) * kv_heads
        done = np.int64(0)
        for i in range(num_rows):
            row = rows[i]
            end, new = np.int64(seq_lens[row]), np.int64(query_loc[row + 1] - query_loc[row])
            for first in range(end - new, end, queries):
                last = min(first + queries, end)
                begin = max(first - window + 1, 0) if window > 0 else np.int64(0)
                for h in range(kv_heads):
                    owner = done * team // total
                    done += last - begin
                    if owner != me:
                        continue
                    token = np.int64(query_loc[row]) + first - (end - new)
                    count = (last - first) * per_kv
                    for r in range(count):
                        at_q = (token + r // per_kv) * q_stride + (h * per_kv + r % per_kv) * dim
                        for d in range(dim):
                            query[r * dim + d] = widen(q[at_q + d]) * scale
                        for d in range(padded):
                            sums[r * padded + d] = _ZERO
                        stats[2 * r] = _LOWEST
                        stats[2 * r + 1] = _ZERO
                    at = begin
                    while at < last:
                        n = min(TILE, last - at)
                        for t in range(n):
                            slot = find_slot(table, row * width, at + t, block_size, contiguous)
                            k = pointer_at(keys, (slot * kv_heads + h) * dim)
                            v = pointer_at(values, (slot * kv_heads + h) * dim)
                            for d in range(dim):
                                tile_k[d * TILE + t] = widen(k[d])
                            for d in range(dim):
                                tile_v[t * padded + d] = widen(v[d])
                        for r in range(0, count, _FOUR):
                            for c in range(0, n, columns):
                                multiply_block(
                                    pointer_at(query, r * dim),
                                    dim,
                                    pointer_at(tile_k, c),
                                    TILE,
                                    pointer_at(scores, r * TILE + c),
                                    TILE,
                                    dim,
                                    _FOUR,
                                    columns,
                                    0,
                                )
                        for r in range(count):
                            position = first + r // per_kv
                            low = max(position - window + 1 - at, 0) if window > 0 else np.int64(0)
                            high = min(n, position + 1 - at)
                            line = pointer_at(scores, r * TILE)
                            if low >= high:
                                for t in range(n):
                                    line[t] = _ZERO
                                continue
                            for t in range(low):
                                line[t] = _ZERO
                            for t in range(high, n):
                                line[t] = _ZERO
                            top, weight, factor = softmax_tile(pointer_at(line, low), high - low, stats[2 * r], softcap)
                            stats[2 * r] = top
                            stats[2 * r + 1] = stats[2 * r + 1] * factor + weight
                            for d in range(padded):
                                sums[r * padded + d] *= factor
                        for r in range(0, count, _FOUR):
                            for c in range(0, dim, columns):
                                multiply_block(
                                    pointer_at(scores, r * TILE),
                                    TILE,
                                    pointer_at(tile_v, c),
                                    padded,
                                    pointer_at(sums, r * padded + c),
                                    padded,
                                    n,
                                    _FOUR,
                                    columns,
                                    1,
                                )
                        at += n
                    for r in range(count):
                        head = h * per_kv + r % per_kv
                        denominator = stats[2 * r + 1]
                        if a[14] != 0:
                            denominator += np.float32(np.exp(sinks[head] - stats[2 * r]))
                        at_out = ((token + r // per_kv) * kv_heads * per_kv + head) * dim
                        for d in range(dim):
                            out[at_out + d] = narrow(sums[r * padded + d] / denominator, out[at_out + d])

    return prompt
