"""The encoder cache: tiles of any size in pages, the least recently used makes room."""

from __future__ import annotations

from collections import OrderedDict

import torch
from hypothesis import given
from hypothesis import strategies as st

from kvarena.engine.vision.cache import FeatureCache

WIDTH, PAGE, PAGES = 3, 4, 6
BYTES = PAGES * PAGE * WIDTH * 4


def rows(key: int, count: int) -> torch.Tensor:
    return key * 1000.0 + torch.arange(count * WIDTH).view(count, WIDTH)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 7))))
def test_what_is_found_is_what_was_kept_and_the_oldest_goes_first(steps):
    """Of key k there are 1 + 5 k rows: the largest do not fit at all."""
    cache = FeatureCache(BYTES + 5, PAGE, WIDTH, torch.float32, torch.device("cpu"))
    assert (cache.num_bytes, cache.num_rows) == (BYTES, PAGES * PAGE)
    kept: OrderedDict[int, int] = OrderedDict()
    for looks, key in steps:
        count = 1 + 5 * key
        pages = -(-count // PAGE)
        if looks or key in kept:
            found = cache.find((key, 0))
            assert (found is not None) == (key in kept)
            if found is not None:
                assert torch.equal(found, rows(key, count))
                kept.move_to_end(key)
            continue
        cache.keep((key, 0), rows(key, count))
        if pages <= PAGES:
            while sum(kept.values()) + pages > PAGES:
                kept.popitem(last=False)
            kept[key] = pages
        assert cache.used_bytes == sum(kept.values()) * PAGE * WIDTH * 4


def test_no_room_at_all_keeps_nothing():
    cache = FeatureCache(0, PAGE, WIDTH, torch.float32, torch.device("cpu"))
    cache.keep((1, 0), rows(1, 2))
    assert cache.find((1, 0)) is None
    assert cache.num_bytes == cache.used_bytes == cache.num_rows == 0
