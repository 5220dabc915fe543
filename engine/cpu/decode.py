"""Decode attention: one query a request reads its context once, straight through the block table.

    row 0   | chunk | chunk | ch..|      contexts are cut into chunks of CHUNK tokens; threads take equal shares of all
    row 1   | chu..|                     tokens, in whole chunks; a row of one chunk is finished where it is read,
    row 2   | chunk | ch..|              the others' parts are merged in order by whoever is free

A chunk's result depends on its row alone, and a row's parts are merged in their order: neither the batch nor the
number of threads changes a row's output. Softmax over parts as in Flash-Decoding (Dao et al., 2023).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import literally, njit

from kvarena.engine.cpu.blocks import TOKENS, add_weighted, dots, dots_of_tokens, max_of, top_of, weigh
from kvarena.engine.cpu.compiler import FAST, Kernel, kernel, num_threads, thread_id
from kvarena.engine.cpu.simd import F32, F64, I32, I64, LANES, exp, narrow, pointer, pointer_at, tanh, widen

TILE, CHUNK = 64, 512
_ZERO, _ONE, _LOWEST = np.float32(0), np.float32(1), np.float32(-np.inf)


def scratch_words(num_heads: int, head_dim: int, threads: int, num_chunks: int) -> int:
    """Float32 words of scratch that `decode_kernel` needs; `num_chunks`: of rows with more than one."""
    return threads * _thread_words(num_heads, head_dim) + num_chunks * num_heads * (head_dim + 2)


def _thread_words(num_heads: int, head_dim: int) -> int:
    # Queries and sums of all heads, their maxima, denominators and factors, a tile's scores; two tiles' offsets, of 8
    # bytes each.
    return (num_heads * (2 * head_dim + 3 + TILE) + num_heads % 2 + 4 * TILE + 15) // 16 * 16


_own_words = njit(error_model="numpy")(_thread_words)


@njit(error_model="numpy", fastmath=FAST)
def softmax_tile(s: Any, n: Any, top: Any, softcap: Any) -> Any:
    """Turn `n` scores into weights, exp(score - maximum), in place.

    Returns:
        the maximum with what came before, the weights' sum, and the factor on what came before.
    """
    if softcap > _ZERO:
        for t in range(n):
            s[t] = softcap * tanh(s[t] / softcap)
    before = top
    top = max_of(s, n, top)
    total = _ZERO
    for t in range(n):
        weight = exp(s[t] - top)
        s[t] = weight
        total += weight
    return top, total, exp(before - top)


@njit(error_model="numpy")
def find_slot(table: Any, start: Any, position: Any, block_size: Any, contiguous: Any) -> Any:
    """Where a position's keys and values are; `start`: of the request's row in `table`."""
    if contiguous:
        return np.int64(table[start]) * block_size + position
    block = position // block_size
    return np.int64(table[start + block]) * block_size + position - block * block_size


@njit(error_model="numpy")
def find_slots(
    offsets: Any, table: Any, start: Any, first: Any, n: Any, block_size: Any, contiguous: Any, size: Any
) -> None:
    """Elements before the keys of positions `first` to `first + n`, `size` a slot; the last one's up to TILE."""
    slot = find_slot(table, start, first, block_size, contiguous)
    block = first // block_size
    left = n if contiguous else block_size - (first - block * block_size)  # of the block
    done = np.int64(0)
    while done < n:
        count = min(left, n - done)
        for t in range(count):
            offsets[done + t] = (slot + t) * size
        done += count
        if done < n:
            block += 1
            slot, left = np.int64(table[start + block]) * block_size, block_size
    for t in range(n, TILE):
        offsets[t] = offsets[n - 1]


@njit(error_model="numpy")
def _num_chunks(length: Any, window: Any) -> Any:
    seen = min(length, window) if window > 0 else length
    return (seen + CHUNK - 1) // CHUNK


@njit(error_model="numpy")
def _chunk_at(seq_lens: Any, rows: Any, i: Any, chunk: Any, window: Any) -> Any:
    """A chunk of the row number `i`: its request, its first position, the one behind its last, how many there are."""
    row = rows[i]
    end = np.int64(seq_lens[row])
    begin = max(end - window, 0) if window > 0 else np.int64(0)
    first = begin + chunk * CHUNK
    return np.int64(row), first, min(first + CHUNK, end), _num_chunks(end, window)


@njit(error_model="numpy")
def _begin(query: Any, sums: Any, stats: Any, q: Any, scale: Any, heads: Any, dim: Any) -> None:
    """A token's queries, scaled, and nothing read of its context yet."""
    for j in range(heads * dim):
        query[j] = widen(q[j]) * scale
        sums[j] = _ZERO
    for j in range(heads):
        stats[j] = _LOWEST
        stats[heads + j] = _ZERO


@njit(error_model="numpy")
def _score(
    scores: Any,
    query: Any,
    keys: Any,
    offsets: Any,
    n: Any,
    ahead: Any,
    kv_heads: Any,
    dim: Any,
    per_kv: Any,
    lanes: Any,
) -> None:
    """Scores of a tile's `n` tokens, -inf behind them; meanwhile the caches get the same tokens' part of `ahead`."""
    dim, per_kv, lanes = literally(dim), literally(per_kv), literally(lanes)
    if lanes < dim or lanes == LANES:
        for t in range(0, n, TOKENS):
            for h in range(kv_heads):
                into = pointer_at(scores, h * per_kv * TILE + t)
                dots_of_tokens(
                    pointer_at(query, h * per_kv * dim), pointer_at(keys, h * dim), pointer_at(offsets, t), into, TILE,
                    pointer_at(ahead, h * dim), dim, per_kv, lanes,
                )  # fmt: skip
    else:
        for t in range(n):
            for h in range(kv_heads):
                into = pointer_at(scores, h * per_kv * TILE + t)
                dots(
                    pointer_at(query, h * per_kv * dim), pointer_at(keys, offsets[t] + h * dim), into, TILE, dim, per_kv
                )
    if n < TILE:
        for j in range(kv_heads * per_kv):
            for t in range(n, TILE):
                scores[j * TILE + t] = _LOWEST


@njit(error_model="numpy")
def _weigh(scores: Any, stats: Any, factors: Any, n: Any, heads: Any, softcap: Any) -> None:
    """Scores to weights, for all heads; `factors`: on what was summed up before. No head waits for another's."""
    tops, totals = stats, pointer_at(stats, heads)
    if softcap > _ZERO:
        for j in range(heads):
            for t in range(n):
                scores[j * TILE + t] = softcap * tanh(scores[j * TILE + t] / softcap)
    for j in range(heads):
        top = top_of(pointer_at(scores, j * TILE), tops[j], TILE, LANES)
        factors[j] = tops[j] - top
        tops[j] = top
    for j in range(heads):
        factors[j] = exp(factors[j])
        totals[j] *= factors[j]
    for j in range(heads):
        totals[j] += weigh(pointer_at(scores, j * TILE), tops[j], TILE, LANES)


@njit(error_model="numpy")
def _gather(
    sums: Any, values: Any, offsets: Any, n: Any, scores: Any, factors: Any, ahead: Any, ahead_offsets: Any,
    kv_heads: Any, dim: Any, per_kv: Any, lanes: Any,
) -> None:  # fmt: skip
    """Add a tile's weighted values; meanwhile the caches get the next tile's keys."""
    dim, per_kv, lanes = literally(dim), literally(per_kv), literally(lanes)
    whole = (n + TOKENS - 1) // TOKENS * TOKENS
    for h in range(kv_heads):
        first = h * per_kv
        weights = pointer_at(scores, first * TILE)
        add_weighted(
            pointer_at(sums, first * dim), pointer_at(values, h * dim), offsets, whole, weights, TILE,
            pointer_at(factors, first), pointer_at(ahead, h * dim), ahead_offsets, dim, per_kv, lanes,
        )  # fmt: skip


@njit(error_model="numpy")
def _finish(out: Any, sums: Any, stats: Any, sinks: Any, has_sinks: Any, heads: Any, dim: Any) -> None:
    """A token's output."""
    for j in range(heads):
        denominator = stats[heads + j]
        if has_sinks:
            denominator += np.float32(np.exp(sinks[j] - stats[j]))
        for d in range(dim):
            out[j * dim + d] = narrow(sums[j * dim + d] / denominator, out[0])


@cache
def decode_kernel(head_dim: int, group: int, q_kind: int, kv_kind: int) -> Kernel:
    """Decode attention for heads of `head_dim`, `group` query heads to a KV head.

    A row of one chunk is finished; those of several are by `merge_kernel`.

    Arguments of a call, after the number of threads:

        q, out         [T, num_heads, head_dim] of `q_kind`, a token's heads side by side
        keys, values   a layer by slot, [num_slots, num_kv_heads, head_dim] of `kv_kind`
        table, width   int32 [B, width]; with `contiguous` = 1 the first column alone is read
        seq_lens       int32 [B]
        query_loc      int32 [B + 1], where each request's new tokens start
        rows, num_rows int32, the requests to do: those with one new token
        block_size, num_kv_heads
        window         0: none
        contiguous
        sinks          float32 [num_heads], or 0
        scratch        float32 words, see `scratch_words`
        q_stride       elements from one token's queries to the next one's; those of `out` follow each other
        scale, softcap softcap 0: none
    """
    dim, per_kv = int(head_dim), int(group)
    q_type, kv_type = int(q_kind), int(kv_kind)
    lanes = LANES if dim % LANES == 0 else dim

    @kernel("17q2d")
    def decode(args):  # type: ignore[no-untyped-def]
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
        heads = kv_heads * per_kv
        own, size, part_words = _own_words(heads, dim), kv_heads * dim, heads * (dim + 2)
        query = pointer(a[15] + 4 * own * me, F32)
        sums = pointer_at(query, heads * dim)
        stats = pointer_at(sums, heads * dim)
        factors = pointer_at(stats, 2 * heads)
        scores = pointer_at(factors, heads)
        here = pointer(a[15] + 4 * (own * me + heads * (2 * dim + 3 + TILE) + heads % 2), I64)
        ahead = pointer_at(here, TILE)
        parts = pointer(a[15] + 4 * own * team, F32)

        total = np.int64(0)
        for i in range(num_rows):
            length = np.int64(seq_lens[rows[i]])
            total += min(length, window) if window > 0 else length
        i, chunk, done, part = np.int64(0), np.int64(0), np.int64(0), np.int64(0)
        is_first = True
        while i < num_rows:
            row, first, last, count = _chunk_at(seq_lens, rows, i, chunk, window)
            mine = done * team // total == me
            done += last - first
            chunk += 1
            if chunk == count:
                i, chunk = i + 1, np.int64(0)
            if mine:
                token = np.int64(query_loc[row])
                _begin(query, sums, stats, pointer_at(q, token * q_stride), scale, heads, dim)
                at = first
                while at < last:
                    n = min(TILE, last - at)
                    if is_first:
                        find_slots(here, table, row * width, at, n, block_size, contiguous, size)
                        is_first = False
                    if at + n < last:
                        find_slots(
                            ahead, table, row * width, at + n, min(TILE, last - at - n), block_size, contiguous, size
                        )
                    elif i < num_rows:
                        other, start, end, _ = _chunk_at(seq_lens, rows, i, chunk, window)
                        find_slots(
                            ahead, table, other * width, start, min(TILE, end - start), block_size, contiguous, size
                        )
                    _score(scores, query, keys, here, n, values, kv_heads, dim, per_kv, lanes)
                    _weigh(scores, stats, factors, n, heads, softcap)
                    _gather(sums, values, here, n, scores, factors, keys, ahead, kv_heads, dim, per_kv, lanes)
                    here, ahead = ahead, here
                    at += n
                if count == 1:
                    _finish(pointer_at(out, token * heads * dim), sums, stats, sinks, a[14] != 0, heads, dim)
                else:
                    into = pointer_at(parts, part * part_words)
                    for j in range(heads * dim):
                        into[j] = sums[j]
                    for j in range(2 * heads):
                        into[heads * dim + j] = stats[j]
            if count > 1:
                part += 1

    return decode


@cache
def merge_kernel(head_dim: int, group: int, q_kind: int) -> Kernel:
    """What follows the decode kernel, on the same arguments and as many threads: outputs of rows of several chunks.

    Of a chunk there are sums [heads, dim], then the heads' maxima and their denominators.
    """
    dim, per_kv, q_type = int(head_dim), int(group), int(q_kind)

    @kernel("17q2d")
    def merge(args):  # type: ignore[no-untyped-def]
        a = pointer(args, I64)
        out, seq_lens, query_loc = pointer(a[1], q_type), pointer(a[6], I32), pointer(a[7], I32)
        rows, num_rows, window, heads = pointer(a[8], I32), a[9], a[12], a[11] * per_kv
        sinks, team, me = pointer(a[14], F32), np.int64(num_threads()), np.int64(thread_id())
        own, words = _own_words(heads, dim), heads * (dim + 2)
        sums, parts = pointer(a[15] + 4 * own * me, F32), pointer(a[15] + 4 * own * team, F32)
        turn = np.int64(0)
        for i in range(num_rows):
            row = rows[i]
            count = _num_chunks(np.int64(seq_lens[row]), window)
            if count == 1:
                continue
            if turn % team == me:
                for j in range(heads):
                    top = _LOWEST
                    for chunk in range(count):
                        value = parts[chunk * words + heads * dim + j]
                        top = value if value > top else top
                    denominator = np.float32(np.exp(sinks[j] - top)) if a[14] != 0 else _ZERO
                    for d in range(dim):
                        sums[d] = _ZERO
                    for chunk in range(count):
                        part = pointer_at(parts, chunk * words)
                        factor = exp(part[heads * dim + j] - top)
                        denominator += factor * part[heads * dim + heads + j]
                        for d in range(dim):
                            sums[d] += factor * part[j * dim + d]
                    place = pointer_at(out, (np.int64(query_loc[row]) * heads + j) * dim)
                    for d in range(dim):
                        place[d] = narrow(sums[d] / denominator, place[0])
            turn += 1
            parts = pointer_at(parts, count * words)

    return merge
