"""A step as bytes: its size, what is read back, and the ring that carries it."""

from __future__ import annotations

import os
import random
import re
import socket
import threading
import time
from types import SimpleNamespace

import numpy as np
import orjson
import pytest
from waiting import PATIENCE

from kvarena.engine.contract import BlockCopy, CopyKind, ScheduledRequest, StepPlan
from kvarena.engine.errors import RankFailed
from kvarena.engine.parallel.layout import Layout
from kvarena.engine.ranks import ring, watch
from kvarena.engine.ranks.driver import SendingRows
from kvarena.engine.ranks.frames import send_frame
from kvarena.engine.ranks.plans import Mirror, checksum
from kvarena.engine.ranks.worker import MirroredRows
from kvarena.engine.request import Request, SamplingParams
from kvarena.experiments.building.ranks import least_blocks

BLOCK = 16


class Box:
    """Keeps what is sent."""

    check_plans, layout = True, Layout(2, 1)

    def __init__(self) -> None:
        self.messages: list[bytes] = []

    def send(self, message: bytes) -> None:
        self.messages.append(message)


class Tables:
    """Block tables that grow."""

    block_size = BLOCK

    def __init__(self) -> None:
        self.tables: dict[str, list[int]] = {}
        self.num_given = 0

    def block_table(self, req: Request) -> list[int]:
        return self.tables[req.request_id]

    def grow(self, req: Request, count: int) -> None:
        table = self.tables.setdefault(req.request_id, [])
        while len(table) * BLOCK < count:
            self.num_given += 1
            table.append(self.num_given)


def rows_and_box() -> tuple[SendingRows, Box]:
    rows, box = SendingRows(1000, "cpu"), Box()
    rows.outbox = box  # type: ignore[assignment]
    return rows, box


def send(rows: SendingRows, tables: Tables, entries: list[tuple[Request, int, int]], **more: object) -> StepPlan:
    for req, start, count in entries:
        tables.grow(req, start + count)
    plan = StepPlan([ScheduledRequest(*entry) for entry in entries], [True] * len(entries), **more)  # type: ignore[arg-type]
    rows.begin(plan)
    at = rows.of_step(plan.scheduled, tables)  # type: ignore[arg-type]
    rows.columns["sampled_to"][at] = [start + count for _, start, count in entries]
    return plan


@pytest.mark.parametrize(("length", "most"), [(20, 568), (BLOCK, 3128)])
def test_256_decodes_take_at_most_4_kb(length, most):
    """As docs/parallel.md says: of one token each, and where every one enters a new block."""
    rows, box = rows_and_box()
    tables = Tables()
    requests = [Request(f"r{i}", [7] * length) for i in range(256)]
    send(rows, tables, [(req, 0, length) for req in requests])
    send(rows, tables, [(req, length, 1) for req in requests], num_decodes=256)
    assert len(box.messages[-1]) == most <= 4096
    for more in range(1, 4):  # tokens that the devices have are not sent, however many the host has not
        send(rows, tables, [(req, length + more, 1) for req in requests], num_decodes=256)
        assert len(box.messages[-1]) == 568


@pytest.mark.parametrize("seed", range(4))
def test_what_is_read_is_what_was_planned(seed):
    """Random chunks, decodes, requests that go and come back, copies: positions, tables and known tokens agree."""
    source = random.Random(seed)
    rows, box = rows_and_box()
    tables, mirror = Tables(), Mirror(BLOCK)
    requests = [
        Request(f"r{i}", [source.randrange(1000) for _ in range(source.randint(1, 60))],
                SamplingParams(temperature=source.choice([0.0, 0.5]), top_k=source.choice([0, 5]), seed=i))
        for i in range(12)
    ]  # fmt: skip
    done: dict[str, int] = {}
    for step in range(60):
        if source.random() < 0.3 and done:
            gone = source.choice(sorted(done))
            rows.release([gone])
            tables.tables.pop(gone)
            del done[gone]
        entries = []
        for req in source.sample(requests, source.randint(0, 8)):
            start = done.get(req.request_id, 0)
            known = req.num_tokens - start
            if known <= 0:
                # The device has its last token; now and then the host sees it, too.
                if source.random() < 0.5:
                    req.output_token_ids += [3] * (start + 1 - req.num_tokens)
                known = 1
            entries.append((req, start, source.randint(1, known)))
            done[req.request_id] = start + entries[-1][2]
        copies = [BlockCopy(source.choice(list(CopyKind)), source.randrange(9), source.randrange(9))] * (step % 3)
        plan = send(rows, tables, entries, copies=copies)
        _, found, number, expected = mirror.read(box.messages[-1])
        assert (number, found.copies, found.samples) == (step, plan.copies, plan.samples)
        assert [entry[1:] for entry in found.scheduled] == [entry[1:] for entry in plan.scheduled]
        for (ours, start, count), (theirs, _, _) in zip(plan.scheduled, found.scheduled, strict=True):
            assert mirror.block_table(theirs) == tables.block_table(ours)
            assert theirs.num_prompt_tokens == ours.num_prompt_tokens
            known = ours.token_ids(start, start + count)
            assert theirs.token_ids(start, start + count)[: len(known) - 1] == known[:-1]
            filters = ours.sampling.top_k > 0 and ours.sampling.temperature > 0
            assert (theirs.constraint is None) == (not filters)
        there = [mirror.block_table(entry.req) for entry in found.scheduled]
        assert checksum(found, there, BLOCK) == expected


def test_a_step_that_failed_before_it_was_sent_is_no_one_s():
    rows, box = rows_and_box()
    tables, mirror = Tables(), Mirror(BLOCK)
    first, second = Request("a", [1] * 5), Request("b", [2] * 5)
    rows.begin(StepPlan())
    rows.of([first])
    rows.release(["a"])
    send(rows, tables, [(second, 0, 5)])
    gone, plan, _, _ = mirror.read(box.messages[-1])
    assert gone == [] and plan.scheduled[0].req.prompt_token_ids == [2] * 5


def connected() -> SimpleNamespace:
    file = ring.make_page()
    bell, theirs = socket.socketpair()
    page = ring.RingPage(file, 1)
    made = SimpleNamespace(
        writer=ring.RingWriter(page, [bell], 0.2), reader=ring.RingReader(ring.RingPage(file, 1), 0, theirs), bell=bell
    )
    os.close(file)
    return made


def test_messages_come_whole_and_in_order_through_the_ring():
    """Longer than half of it, across its end, and more in all than it holds."""
    made = connected()
    sizes = [1, ring.SIZE // 3, ring.SIZE // 2 + 5, 17, ring.SIZE + 3, 0, ring.SIZE // 3]
    sent = [np.random.default_rng(i).bytes(size) for i, size in enumerate(sizes)]
    made.writer._timeout = 60.0
    writing = threading.Thread(target=lambda: [made.writer.send(message) for message in sent])
    writing.start()
    assert all(made.reader.receive() == message for message in sent)
    writing.join()
    made.bell.close()
    assert made.reader.receive() is None


def test_who_does_not_read_is_found():
    made = connected()
    with pytest.raises(ring.SlowReader):
        for _ in range(5):
            made.writer.send(bytes(ring.SIZE // 3))


class Nobody(watch.Watched):
    """Ranks that are sockets alone."""

    def kill(self) -> None:
        pass

    def why_ended(self, rank: int) -> str:
        return "it ended"

    def name_of(self, rank: int) -> str:
        return f"rank {rank}"


@pytest.mark.parametrize(
    ("lost", "line"),
    [
        ((0, 2), "rank 1 of 3: it has not come to what the ranks compute together (rank 0: Timed out)"),
        ((0, 1, 2), "rank 0 of 3: Timed out"),
    ],
)
def test_who_has_not_given_up_is_who_the_others_waited_for(lost, line):
    """A rank that hangs with a beating heart says nothing itself."""
    watched = Nobody(Layout(3, 1), ends_process=False)
    pairs = [socket.socketpair() for _ in range(2)]
    watched.sockets = [ours for ours, _ in pairs]
    thread = threading.Thread(target=watched.watch, daemon=True)
    watched.note_lost(0, "Timed out")
    thread.start()
    for rank in lost[1:]:
        send_frame(pairs[rank - 1][1], orjson.dumps({"error": "Timed out", "is_lost": True}))
    thread.join(PATIENCE)
    assert watched.failure == line


def test_a_step_that_does_not_end_on_gpus_names_who_is_behind():
    """Hearts beat on while a GPU hangs, and what a graph waits for has no limit of its own."""
    watched = Nobody(Layout(2, 1), ends_process=True)
    watched.behind = lambda: 1
    now = time.monotonic()
    watched.opened(1)
    watched.opened(-1)
    for age, has_failed in ((watch.STEP_SECONDS - 5, False), (watch.STEP_SECONDS + 5, True)):
        watched.opened(1)
        watched.changed, watched._looked = now - age, now  # and the machine has not stood still
        watched._look()
        assert bool(watched.failure) is has_failed
    assert re.fullmatch(
        r"rank 1 of 2: a step has not ended for \d+ s: a device hangs, or waits for another", watched.failure
    )


@pytest.mark.parametrize(("steps", "codes"), [((), [1]), ((1,), [1]), ((1, -1), [])])
def test_a_planning_rank_that_a_gpu_holds_ends_with_the_others(monkeypatch, capsys, steps, codes):
    """While it starts, and in a step; one that is idle is asked for a step before it knows."""
    found: list[int] = []
    monkeypatch.setattr(watch, "_STUCK_SECONDS", 0.01)
    monkeypatch.setattr(watch.os, "_exit", found.append)
    watched = Nobody(Layout(2, 1), ends_process=True)
    for count in steps:
        watched.opened(count)
    watched.fail(1, "it has no memory")
    watched.watch()
    assert found == codes
    assert capsys.readouterr().err == "error: rank 1 of 2: it has no memory\n" * len(codes)


def test_a_pool_is_sized_to_the_smallest_rank():
    peers = SimpleNamespace(answers=lambda: [{"num_blocks": 5}, {"num_blocks": 9}])
    assert [least_blocks(SimpleNamespace(peers=peers), own) for own in (7, 3)] == [5, 3]


def test_tables_of_more_blocks_than_two_bytes_count():
    rows, box = rows_and_box()
    tables, mirror = Tables(), Mirror(BLOCK)
    req = Request("long", [1] * 3)
    tables.grow(req, 70_000 * BLOCK)
    send(rows, tables, [(req, 0, 3)])
    _, plan, _, _ = mirror.read(box.messages[-1])
    send(rows, tables, [(req, 3, 1)])
    tables.grow(req, 70_001 * BLOCK)
    _, plan, _, _ = mirror.read(box.messages[-1])
    send(rows, tables, [(req, 4, 1)])
    _, plan, _, _ = mirror.read(box.messages[-1])
    assert mirror.block_table(plan.scheduled[0].req) == tables.block_table(req)


def test_a_reader_that_is_gone_is_waited_for_no_longer():
    made = connected()
    made.writer._timeout = 60.0

    def gone() -> None:
        raise RankFailed("rank 1 of 2: its process has ended")

    made.writer._check = gone
    with pytest.raises(RankFailed):
        for _ in range(5):
            made.writer.send(bytes(ring.SIZE // 3))


@pytest.mark.parametrize("seed", range(3))
def test_rows_of_another_rank_are_those_of_the_planning_rank(seed):
    """Whole steps take them from the message, parts of a step look for them; tables are equal either way."""
    source = random.Random(seed)
    rows, box = rows_and_box()
    tables, mirror, others = Tables(), Mirror(BLOCK), MirroredRows(1000, "cpu")
    requests = [Request(f"r{i}", [1] * 40) for i in range(40)]
    done: dict[str, int] = {}
    for _ in range(60):
        for gone in source.sample(sorted(done), min(len(done), source.choice([0, 0, 1, 9]))):
            rows.release([gone])
            tables.tables.pop(gone)
            del done[gone]
        entries = []
        for req in source.sample(requests, source.randint(1, 30)):
            start = done.get(req.request_id, 0)
            entries.append((req, start, 1 if start >= 40 else source.randint(1, 40 - start)))
            done[req.request_id] = start + entries[-1][2]
        send(rows, tables, entries)
        gone, found, _, _ = mirror.read(box.messages[-1])
        others.release(gone)
        expected = rows.of([entry[0] for entry in entries]).tolist()
        half = len(found.scheduled) // 2
        parts = source.choice([[found.scheduled], [found.scheduled[:half], found.scheduled[half:]]])
        assert [row for part in parts for row in others.of_step(part, mirror).tolist()] == expected
        assert [list(others.tables.read[row]) for row in expected] == [tables.block_table(e[0]) for e in entries]
        names = ("num_prompt", "temperature")
        assert all((others.columns[name][expected] == rows.columns[name][expected]).all() for name in names)
