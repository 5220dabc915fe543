"""What a scrape reads while an engine writes."""

from __future__ import annotations

import multiprocessing
import re

from kvarena.engine.classes import CLASSES
from kvarena.engine.server.shared.exposition import render
from kvarena.engine.server.shared.metrics import Rows, create_page
from kvarena.engine.server.shared.page import Page

TOTAL = 1000


def _write(page: Page) -> None:
    """Slots that go from class to class, and always add up."""
    row = Rows(page, 1).engines[0]
    for step in range(1 << 40):
        owned = step * 37 % TOTAL
        row.set_all("kvarena:kv_slots", [owned, *[0] * (len(CLASSES) - 2), TOTAL - owned])


def test_classes_add_up_in_every_scrape_while_they_change():
    page = create_page(1)
    writer = multiprocessing.get_context("fork").Process(target=_write, args=(page,), daemon=True)
    writer.start()
    try:
        seen = []
        while len(set(seen)) < 50:
            text = render(Rows(page, 1), "m", [{}]).decode()
            slots = {name: float(value) for name, value in re.findall(r'kv_slots{class="(\w+)".*} (\S+)', text)}
            if not any(slots.values()):
                continue  # nothing is written yet
            assert sum(slots.values()) == TOTAL, slots
            seen.append(slots["token_states"])
    finally:
        writer.kill()
        writer.join()


def test_a_gauge_for_all_labels_stands_where_each_is_read():
    row = Rows(create_page(1), 1).engines[0]
    row.set_all("kvarena:kv_slots", range(1, len(CLASSES) + 1))
    assert [row.get("kvarena:kv_slots", name) for name in CLASSES] == list(range(1, len(CLASSES) + 1))
