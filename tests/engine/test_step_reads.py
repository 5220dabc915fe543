"""What decode rows read once: every part once for each row, of blocks that are its own, and as much saved as can be."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvarena.engine.runner.block_tables import BlockTables
from kvarena.engine.sharing import prefix_order
from kvarena.engine.sharing.prefix_order import PrefixOrder, num_common
from kvarena.engine.sharing.reads import RULES, ReadRules, part_tokens, reads_alone
from kvarena.engine.sharing.step_reads import StepReads
from kvarena.experiments.correctness.oracle_reads import ReadFault, ReadJudge

BLOCK = 4
SMALL = ReadRules(least_part=8, most_parts=4, least_saved=0.0)
# What may happen to a row: it comes with some blocks of another one, grows, gets blocks anew, or goes.
EVENTS = st.lists(
    st.tuples(st.sampled_from(["come", "grow", "grow", "change", "go"]), st.integers(0, 7), st.integers(0, 9)),
    max_size=40,
)


class Rows:
    """Block tables under way, as a runner keeps them."""

    def __init__(self, num_rows=8):
        self.tables = BlockTables(num_rows)
        self.now = {}
        self.ids = iter(range(1, 10**6))
        self.reads = StepReads(self.tables.read, self.tables.note_changes(), BLOCK, 3, SMALL)

    def event(self, kind, row, number):
        table = self.now.get(row)
        if kind == "come" and table is None:
            others = [self.now[key] for key in sorted(self.now)]
            start = others[number % len(others)][: 1 + number] if others else []
            self.now[row] = [*start, next(self.ids)]
        elif kind == "grow" and table is not None:
            table.append(next(self.ids))
        elif kind == "change" and table is not None:
            table[number % len(table) :] = [next(self.ids)]
        elif kind == "go" and table is not None:
            del self.now[row]
            self.tables.forget(row)
        for key, value in self.now.items():
            self.tables.update(key, value)


def spans(reads, num_rows):
    found = [[] for _ in range(num_rows)]
    for first, count, begin, end in zip(reads.first, reads.num_rows, reads.begin, reads.end, strict=True):
        for place in reads.order[first : first + count]:
            found[place].append((int(begin), int(end), int(reads.order[first])))
    return found


@settings(max_examples=60, deadline=None)
@given(EVENTS)
def test_rows_read_their_own_blocks_and_each_once(events):
    rows = Rows()
    for event in events:
        rows.event(*event)
        here = np.array(sorted(rows.now), dtype=np.int64)
        tables = [rows.now[row] for row in here.tolist()]
        lens = np.array([BLOCK * len(table) - index % BLOCK for index, table in enumerate(tables)], dtype=np.int64)
        reads = rows.reads(here, lens)
        # From nothing, by comparing all with all.
        sizes = part_tokens(lens, SMALL).tolist()
        parts = [(tuple(table[: -(-size // BLOCK) * number]), size) for table, size, length in
                 zip(tables, sizes, lens.tolist(), strict=True) for number in range(1, length // size + 1)]  # fmt: skip
        saved = sum(size for _, size in parts) - sum(size for _, size in set(parts))
        assert (0 if reads is None else reads.num_saved) == rows.reads.num_saved == saved
        if reads is None:
            continue
        assert reads.num_rows.max() <= 3
        for place, found in enumerate(spans(reads, len(here))):
            ends = [0, *(end for _, end, _ in found)]
            assert [begin for begin, _, _ in found] == ends[:-1] and ends[-1] == lens[place]
            for begin, end, other in found:
                blocks = slice(begin // BLOCK, -(-end // BLOCK))
                assert tables[place][blocks] == tables[other][blocks]


def test_a_row_is_cut_as_its_length_says_whoever_shares_it():
    lens = np.array([1, 255, 4096, 4097, 8192, 8704, 100_000])
    assert part_tokens(lens).tolist() == [256, 256, 256, 512, 512, 1024, 8192]
    assert (-(-lens // part_tokens(lens))).max() <= RULES.most_parts


def test_less_than_an_eighth_of_a_long_context_is_left_to_each_row():
    lens = np.arange(1, 140_000)
    left = part_tokens(lens) - 1  # tokens in common behind the last whole part, at most: docs/gpu.md
    assert left[lens <= 4096].max() == 255
    assert 0.124 < (left / lens)[lens > 4096].max() < 1 / 8


def test_growing_by_blocks_of_its_own_moves_nothing():
    rows = Rows()
    for row in range(4):
        rows.event("come", row, 0)
        for _ in range(6):
            rows.event("grow", row, 0)
    everyone, lens = np.arange(4), np.array([len(rows.now[row]) * BLOCK - 1 for row in range(4)])
    rows.reads(everyone, lens)
    order = rows.reads._order
    order._insert = order._remove = None  # nobody is to be moved
    before = order.of(everyone)
    for row in range(4):
        rows.event("grow", row, 0)
    assert order.of(everyone) is before


def test_rows_without_a_table_and_blocks_of_nobody_have_nothing_in_common():
    tables = [[1, 2, 3, 4], [1, 2, 3, 5], [0, 0, 7], [0, 0, 8], range(1, 5), ()]
    prefixes = PrefixOrder(tables, dict.fromkeys(range(6), 0)).of(np.array([5, 4, 3, 2, 1, 0, 5]))
    assert sorted(prefixes.order.tolist()) == list(range(7))
    pairs = zip(prefixes.order.tolist(), prefixes.order[1:].tolist(), prefixes.common.tolist(), strict=False)
    assert [(sorted(pair), common) for *pair, common in pairs if common] == [([4, 5], 3)]
    assert num_common([], [1]) == num_common([0, 1], [0, 1]) == 0 and num_common([5, 6], [5, 6, 7]) == 2


def test_little_is_left_to_the_rows():
    """Where nothing is shared, or too little, the step is as it was."""
    tables = [[1, 2, *range(100 * row, 100 * row + 38)] for row in range(1, 5)]
    lens = np.full(4, 160)
    for least_saved, is_shared in ((0.0, True), (0.03, True), (0.1, False)):
        rules = SMALL._replace(most_parts=40, least_saved=least_saved)
        reads = StepReads(tables, dict.fromkeys(range(4), 0), BLOCK, rules=rules)
        assert (reads(np.arange(4), lens) is not None) == is_shared
        assert reads.num_saved == (24 if is_shared else 0)
        assert StepReads(tables, dict.fromkeys(range(4), 0), BLOCK, rules=rules, fits=lambda _: False)(
            np.arange(4), lens
        ) is None  # fmt: skip
    assert len(reads_alone(3).first) == 3 and reads_alone(0).num_saved == 0


def test_a_read_of_another_row_s_block_is_caught(monkeypatch):
    tables = [[1, 2, 3, 4], [1, 2, 5, 6]]
    ReadJudge(2).check(["a", "b"], tables, [8, 8])
    monkeypatch.setattr(prefix_order, "num_common", lambda a, b: num_common(a, b) + 1)
    with pytest.raises(
        ReadFault, match=r"'b' would read positions \[4, 6\) in blocks \[3\] of request 'a', and its own"
    ):
        ReadJudge(2).check(["a", "b"], tables, [8, 8])
