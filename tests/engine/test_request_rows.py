"""Request rows: who has which, what lies in them, and what the device is sent of them."""

import random

import numpy as np
import pytest
import torch

from kvarena.engine.errors import EngineError, RequestError
from kvarena.engine.request import Request, SamplingParams
from kvarena.engine.runner import sender
from kvarena.engine.runner.block_tables import BlockTables
from kvarena.engine.runner.request_rows import FIRST_ROWS, RequestRows
from kvarena.engine.runner.sender import WordSender
from kvarena.engine.runner.step_graphs import decode_buckets
from kvarena.engine.sampling.sampler import Sampler

V = 32


def requests_of(names, **sampling):
    return [Request(name, [1, 2], SamplingParams(max_tokens=50, **sampling)) for name in names]


def test_a_row_is_a_requests_own_for_as_long_as_it_is_there():
    """Any order of coming, going and coming back, past the first rows: no two requests ever share a row."""
    rows, rng = RequestRows(V, "cpu"), random.Random(0)
    live = {}
    for step in range(200):
        if rng.random() < 0.4 and live:
            gone = rng.sample(sorted(live), rng.randint(1, min(3, len(live))))
            rows.release([*gone, "never seen"])
            for name in gone:
                del live[name]
        batch = requests_of([f"r{step}-{i}" for i in range(rng.randint(0, 2))])
        for req, row in zip(batch, rows.of(batch).tolist(), strict=True):
            live[req.request_id] = (req, row)
        known = [req for req, _ in live.values()]
        assert rows.of(known).tolist() == [row for _, row in live.values()]
        assert len({row for _, row in live.values()}) == len(live)
    assert rows.num_rows > FIRST_ROWS
    assert len(rows._rows) == len(live)
    assert len(rows._free) + len(live) == rows.num_rows
    assert len(rows.columns) == len(rows.last_tokens) == rows.num_rows + 1


def test_growing_keeps_what_lies_in_the_rows():
    rows = RequestRows(V, "cpu", 3)
    first = requests_of(["a", "b"], temperature=0.5)
    at = rows.of(first)
    rows.last_tokens[at] = torch.tensor([7, 9])
    rows.columns["sampled_to"][at] = 4, 5
    rows.tables.update(int(at[0]), [3, 4])
    before = rows.draw_params(at, np.array([6, 6]))
    rows.of(requests_of([f"r{i}" for i in range(3 * FIRST_ROWS)]))
    assert rows.last_tokens[at].tolist() == [7, 9]
    assert rows.columns["sampled_to"][at].tolist() == [4, 5]
    assert rows.tables.take(at[:1], 2).tolist() == [[3, 4]]
    assert (rows.draw_params(at, np.array([6, 6])) == before).all()


def test_a_rows_next_owner_finds_nothing_in_it():
    """Position, table and penalty counts of the one before are gone; so are those of one that was preempted."""
    rows, logits = RequestRows(V, "cpu", num_rows=1, width=4), torch.zeros(1, V)
    [old] = requests_of(["old"], frequency_penalty=2.0)
    old.output_token_ids += [0, 0]
    [row] = rows.of([old])
    rows.tables.update(row, [5, 6])
    assert Sampler()(logits, rows.batch([old])).tolist() == [1]
    rows.columns["sampled_to"][row] = 3
    rows.release(["old"])
    [new] = requests_of(["new"], frequency_penalty=2.0)
    assert rows.of([new]).tolist() == [row]
    assert rows.columns["sampled_to"][row] == -1
    assert rows.tables.read[row] == ()
    assert rows.tables.take_changes() == ([], [])
    assert Sampler()(logits, rows.batch([new])).tolist() == [0]
    rows.release(["new"])
    assert Sampler()(logits, rows.batch([old])).tolist() == [1]


def test_what_does_not_fit_takes_no_row():
    rows = RequestRows(V, "cpu", num_rows=2)
    with pytest.raises(RequestError, match="logit_bias"):
        rows.of(requests_of(["bad"], logit_bias={V: 1.0}))
    rows.of(requests_of("ab"))
    with pytest.raises(EngineError, match=r"more than 2 requests .* max_num_seqs must be the scheduler's"):
        rows.of(requests_of("c"))
    assert rows.of(requests_of("ab")).tolist() == [0, 1]


@pytest.mark.parametrize("width", [0, 64, 9])
def test_block_tables_follow_any_change(width):
    """Host array and device get the allocator's tables, whichever is asked for less often, and each entry once."""
    rng = random.Random(width)
    tables, device = BlockTables(20, width), np.zeros((20, max(width, 1)), dtype=np.int64)
    live = [[rng.randint(1, 99)] for _ in range(20)]
    for _ in range(300):
        row = rng.randrange(20)
        table, change = live[row], rng.randint(0, 5)
        if change == 0:
            live[row] = [*table, *rng.sample(range(1, 99), rng.randint(1, 30))]
        elif change == 1:
            live[row] = [0, *table[1:]]
        elif change == 2:
            live[row] = [rng.randint(1, 99) for _ in table]
        elif change == 3:
            live[row] = table[:1]
        elif change == 4:
            live[row] = rng.choice([range(7, 40), (5, 6)])
        else:
            tables.forget(row)
            live[row] = list(range(rng.randint(1, 5)))
        for row, table in enumerate(live):
            tables.update(row, table)
        if rng.random() < 0.5:
            taken = tables.take(np.arange(20), max(len(table) for table in live))
            for got, table in zip(taken, live, strict=True):
                assert got[: len(table)].tolist() == list(table)
        indices, values = tables.take_changes()
        assert len(set(indices)) == len(indices)
        if not width:
            assert not indices
            continue
        device.reshape(-1)[indices] = values
        for got, table in zip(device, live, strict=True):
            assert got[: len(table)].tolist() == list(table)[:width]


def test_a_block_more_sends_one_entry():
    tables, table = BlockTables(3, 8), [5, 6]
    tables.update(1, table)
    assert tables.take_changes() == ([8, 9], [5, 6])
    table.append(7)
    tables.update(1, table)
    assert tables.take_changes() == ([10], [7])
    tables.update(1, table)
    assert tables.take_changes() == ([], [])


def test_sender_sends_words_and_any_number_of_changes(monkeypatch):
    monkeypatch.setattr(sender, "_MAX_CHANGES", 8)
    rows = RequestRows(V, "cpu", num_rows=3, width=16)
    sends = WordSender(7, rows)
    table = np.random.default_rng(0).permutation(99).tolist()
    for row in (0, 2):
        rows.tables.update(row, table[row : row + 15])
    sends.send(np.arange(7, dtype=np.int32))
    assert sends.sent.tolist() == list(range(7))
    assert rows.device_tables[0, :15].tolist() == table[:15]
    assert rows.device_tables[2, :15].tolist() == table[2:17]
    assert rows.device_tables[[1, 3]].abs().sum() == 0
    for step in range(5):  # the buffers take turns
        rows.tables.update(1, [step])
        sends.send(np.array([step, 2], dtype=np.int32))
        assert sends.sent[:2].tolist() == [step, 2]
        assert int(rows.device_tables[1, 0]) == step


@pytest.mark.parametrize("max_batch", [1, 3, 8, 100, 256, 300])
def test_buckets_hold_every_batch(max_batch):
    buckets = decode_buckets(max_batch)
    assert buckets == sorted(set(buckets))
    assert buckets[0] == 1
    assert buckets[-1] == max_batch
