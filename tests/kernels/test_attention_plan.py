"""The plan covers every key and query exactly once, within its capacity."""

import heapq
import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvarena.engine.errors import EngineError
from kvarena.engine.kernels.attention.config import DecodeConfig
from kvarena.engine.kernels.attention.plan import Capacity, Shape, chunk_tokens, even_items, plan_step
from kvarena.engine.kernels.attention.prefill_plan import Programs, num_parts

DECODE = DecodeConfig(tile=16, num_warps=4, num_stages=3, programs_per_sm=4, min_chunk=32)
BATCH = st.lists(st.tuples(st.integers(0, 3000), st.sampled_from([0, 1, 1, 1, 2, 7, 200])), min_size=1, max_size=40)


def arrays(batch):
    query_lens = np.array([new for _, new in batch])
    loc = np.concatenate([[0], np.cumsum(query_lens)]).astype(np.int32)
    return loc, np.array([start + new for start, new in batch], dtype=np.int32)


def parts(buffer, capacity):
    d, p, s = capacity
    return np.split(buffer, np.cumsum([d, d, d, d, d, s, p, p, p, p]))


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)  # on a busy machine nothing is quick
@given(
    BATCH, st.integers(1, 60), st.integers(1, 64), st.booleans(), st.booleans(),
    st.sampled_from([None, Programs(7, 1), Programs(132, 8), Programs(132, 2)]),
)  # fmt: skip
def test_items_cover_the_batch_exactly_once(batch, slots, queries, is_reserved, stays, programs):
    shape = Shape(DECODE, queries, slots, stays, programs)
    loc, lens = arrays(batch)
    room = shape.decode_capacity(len(batch)), shape.prefill_capacity(len(batch), int(loc[-1]))
    most = Capacity(*room, slots + 1 if stays else 0)
    buffer, capacity = plan_step(loc, lens, shape, most if is_reserved else None)
    assert len(buffer) == capacity.num_words
    assert capacity.decode <= most.decode and capacity.prefill <= most.prefill
    rows, begins, ends, chunks, counts, starts, *prefill = parts(buffer, capacity)
    prefill_rows, blocks, part, num, cells = prefill
    num_items = int((rows >= 0).sum())
    if stays and num_items:
        assert starts[0] == 0 and starts[-1] == num_items and (np.diff(starts) >= 0).all()
    for row, (start, new) in enumerate(batch):
        own = np.flatnonzero(rows == row)
        if new == 1:
            assert begins[own[0]] == 0 and ends[own[-1]] == start + 1
            assert (begins[own[1:]] == ends[own[:-1]]).all() and (begins[own] < ends[own]).all()
            assert (begins[own] % DECODE.tile == 0).all()
            assert chunks[own].tolist() == list(range(len(own))) and (counts[own] == len(own)).all()
            assert (np.diff(own) == 1).all(), "the merge relies on a row's items being consecutive"
        else:
            assert not len(own)
        own_blocks = blocks[(prefill_rows == row) & (part == 0)]
        assert sorted(own_blocks.tolist()) == (list(range(-(-new // queries))) if new > 1 else [])
    live = prefill_rows[prefill_rows >= 0]
    assert (prefill_rows[len(live) :] == -1).all()
    num, part, cells = num[: len(live)], part[: len(live)], cells[: len(live)]
    for first in np.flatnonzero(part == 0):
        assert part[first : first + num[first]].tolist() == list(range(num[first]))
        assert (num[first : first + num[first]] == num[first]).all()
    assert sorted(cells[num > 1].tolist()) == list(range(int((num > 1).sum())))
    assert (num > 1).sum() <= (0 if programs is None else programs.most_parts)


H100 = Programs(132, 8)


def longest_program(ends, parts):
    """Tiles that the busiest program has when each takes the next part as soon as it is done."""
    busy = [0.0] * H100.number
    for end, number in zip(ends.tolist(), parts.tolist(), strict=True):
        for _ in range(number * H100.num_kv_heads):
            heapq.heapreplace(busy, busy[0] + -(-end // 128) / number)
    return max(busy)


def test_few_items_behind_long_contexts_are_shared_out():
    """Four items of 8 heads each would leave 100 of 132 programs idle; 17 of them would take two rounds."""
    for new, queries, worst in ((128, 32, 1.25), (128, 64, 1.25), (576, 32, 1.25), (1100, 64, 1.25), (1500, 64, 1.2)):
        ends = 32000 + np.arange(new, 0, -queries)
        parts = num_parts(ends, H100)
        share = -(-ends // 128).sum() * H100.num_kv_heads / H100.number
        assert parts.max() > 1 and longest_program(ends, parts) < worst * share, (new, parts)
        assert (-(-ends // 176) >= 2 * parts).all(), "each part has tiles, of the widest ones too"


def test_items_that_fill_the_device_or_are_short_stay_whole():
    assert (num_parts(np.arange(4096, 0, -32), H100) == 1).all(), "four rounds and more"
    assert (num_parts(np.array([1024] * 4), H100) == 1).all(), "a part would cost what it saves"
    assert (num_parts(32000 + np.arange(1056, 0, -32), H100) == 1).all(), "two rounds exactly"
    assert len(num_parts(np.zeros(0, dtype=np.int64), H100)) == 0


def test_contexts_are_split_only_as_far_as_the_device_is_empty():
    shape = Shape(DECODE, 16, slots_per_head=64)
    assert chunk_tokens(np.full(8, 1024), shape) == 128  # 8 rows x 8 chunks = 64 programs
    assert chunk_tokens(np.full(64, 1024), shape) >= 1024  # one program per row
    assert chunk_tokens(np.full(256, 1024), shape) >= 1024
    assert chunk_tokens(np.array([40]), shape) == DECODE.min_chunk


@pytest.mark.parametrize(("num_rows", "chunks"), [(24, 2), (25, 1), (32, 1), (33, 1), (40, 1)])
def test_rows_that_almost_fill_the_device_stay_whole(num_rows, chunks):
    shape = Shape(DECODE, 16, slots_per_head=33)
    lens = np.full(num_rows, 1030)
    _, capacity = plan_step(*arrays([(1029, 1)] * num_rows), shape)
    assert capacity.decode == chunks * num_rows
    lens[0] = 9000
    _, capacity = plan_step(np.arange(num_rows + 1), lens, shape)
    assert chunks * num_rows < capacity.decode <= num_rows + 33, "a long row is cut all the same"


@pytest.mark.parametrize("lens", [[1030] * 256, [9000, 16, 3, 500], [1], [40, 1030] * 40, [700] * 34])
def test_programs_that_stay_get_equal_shares(lens):
    items, starts = even_items(np.array(lens), Shape(DECODE, 16, slots_per_head=33, stays=True))
    index, begins, ends = items[:3]
    tiles = -(-(ends - begins) // DECODE.tile)
    shares = [int(tiles[a:b].sum()) for a, b in itertools.pairwise(starts)]
    assert sum(shares) == sum(-(-length // DECODE.tile) for length in lens)
    assert max(shares) - min(shares) <= 1
    assert (np.diff(index) >= 0).all() and len(index) <= len(lens) + 32


def test_rows_that_almost_fill_the_programs_that_stay_are_whole():
    shape = Shape(DECODE, 16, slots_per_head=33, stays=True)
    for num_rows, is_whole in ((24, False), (25, True), (33, True), (34, False)):
        items, starts = even_items(np.full(num_rows, 1030), shape)
        assert (items.shape[1] == num_rows) == is_whole
        assert not is_whole or np.diff(starts).tolist() == [1] * num_rows + [0] * (33 - num_rows)
    items, _ = even_items(np.array([1030] * 29 + [1900]), shape)
    assert items.shape[1] > 30, "one that takes longer than the others' share is cut"


def test_a_context_is_cut_into_equal_chunks():
    loc, lens = arrays([(2047, 1), (99, 1)])
    buffer, capacity = plan_step(loc, lens, Shape(DECODE, 16, slots_per_head=3))
    _, begins, ends, *_ = parts(buffer, capacity)
    assert (ends - begins).tolist() == [688, 688, 672, 100]


def test_blocks_of_a_prefill_row_follow_each_other_and_late_ones_come_first():
    loc, lens = arrays([(0, 64), (500, 32)])
    buffer, capacity = plan_step(loc, lens, Shape(DECODE, 16, 4))
    rows, blocks = parts(buffer, capacity)[6:8]
    assert list(zip(rows.tolist(), blocks.tolist(), strict=True)) == [(1, 1), (1, 0), (0, 3), (0, 2), (0, 1), (0, 0)]


def test_a_step_beyond_the_reserved_capacity_is_refused():
    loc, lens = arrays([(10, 1)] * 5)
    with pytest.raises(EngineError, match="more rows or tokens than were reserved"):
        plan_step(loc, lens, Shape(DECODE, 16, 4), Capacity(4, 0))
    with pytest.raises(EngineError, match="starts does not fit"):
        plan_step(loc, lens, Shape(DECODE, 16, 4, stays=True), Capacity(40, 20))
