"""Placements: who is cut, who merges, and that every structure agrees with a plain list of free blocks."""

from __future__ import annotations

import random

import pytest

from kvarena.allocators.placement import PLACEMENTS, BestFit, Buddy, FirstFit, Placement


def holes(placement: Placement) -> dict[int, int]:
    """Start and size of every hole of an exact placement."""
    return dict(sorted(placement._size_at.items()))  # type: ignore[attr-defined]


def runs(free: list[bool]) -> list[range]:
    """Every hole of a map of blocks."""
    edges = [i for i in range(1, len(free) + 1) if (i < len(free) and free[i]) != free[i - 1]]
    return [range(start, end) for start, end in zip(edges[::2], edges[1::2], strict=True)]


def fill(placement: Placement, *sizes: int) -> list[int]:
    starts = [placement.take(size) for size in sizes]
    assert None not in starts
    return starts  # type: ignore[return-value]


def test_first_fit_takes_the_lowest_hole_and_best_fit_the_smallest() -> None:
    for cls, want in ((FirstFit, 1), (BestFit, 9)):
        placement = cls(16)
        a, _, c, _ = fill(placement, 6, 2, 3, 5)
        placement.give(a, 6)
        placement.give(c, 3)
        assert holes(placement) == {1: 6, 9: 3}
        assert placement.take(3) == want


def test_a_hole_merges_with_the_holes_on_both_sides() -> None:
    for cls in (FirstFit, BestFit):
        placement = cls(12)
        a, b, c = fill(placement, 4, 4, 4)
        placement.give(a, 4)
        placement.give(c, 4)
        assert holes(placement) == {1: 4, 9: 4} and placement.take(5) is None
        assert not placement.fits(5) and placement.fits(4)
        placement.give(b, 4)
        assert holes(placement) == {1: 12} and placement.num_free == 12


def test_buddies_merge_only_with_their_own_buddy() -> None:
    placement = Buddy(16)
    a, b, c, d = fill(placement, 4, 4, 4, 4)
    assert sorted((a, b, c, d)) == [1, 5, 9, 13]
    placement.give(5, 4)
    placement.give(9, 4)  # adjacent, but no buddies: 4..7 belongs to 0..7, 8..11 to 8..15
    assert placement.take(8) is None and not placement.fits(8) and placement.fits(3)
    placement.give(1, 4)
    assert placement.take(8) == 1


def test_buddy_rounds_up_and_splits_the_smallest_that_fits() -> None:
    placement = Buddy(13)  # 8 + 4 + 1
    assert placement.largest == 8 and placement.extent(3) == 4 and placement.extent(1) == 1
    assert placement.take(3) == 9  # the 4 at offset 8, not half of the 8
    assert placement.num_free == 9
    assert placement.take(1) == 13
    assert placement.take(9) is None
    assert placement.take(5) == 1 and placement.num_free == 0


@pytest.mark.parametrize("name", PLACEMENTS)
def test_random_churn_against_a_map_of_every_block(name: str) -> None:
    rng = random.Random(7)
    placement = PLACEMENTS[name](1000)
    free = [True] * 1001
    free[0] = False
    live: list[tuple[int, int]] = []
    for _ in range(4000):
        if live and rng.random() < 0.5:
            start, size = live.pop(rng.randrange(len(live)))
            placement.give(start, size)
            free[start : start + placement.extent(size)] = [True] * placement.extent(size)
        else:
            size = rng.choice([1, 2, 3, rng.randint(1, 12)])
            extent = placement.extent(size)
            got = placement.take(size)
            if name == "first_fit":
                fits = (s for s in range(1, 1002 - size) if all(free[s : s + size]))
                assert got == next(fits, None)
            if name == "best_fit":
                assert (
                    got == min(((len(hole), hole[0]) for hole in runs(free) if len(hole) >= size), default=(0, None))[1]
                )
            if got is None:
                continue
            assert all(free[got : got + extent]) and got + extent <= 1001
            free[got : got + extent] = [False] * extent
            live.append((got, size))
        assert placement.num_free == sum(free)
    for start, size in live:
        placement.give(start, size)
    assert placement.take(placement.largest) == 1


def test_first_fit_among_many_holes() -> None:
    placement = FirstFit(2000)
    starts = fill(placement, *[1] * 2000)
    for start in starts[::2]:
        placement.give(start, 1)
    assert len(holes(placement)) == 1000 and placement.take(2) is None
    placement.give(starts[1001], 1)  # joins its two neighbours
    assert placement.take(3) == starts[1000]
    for start in sorted(set(starts[1::2]) - {starts[1001]}, key=lambda s: hash((s, 1))):
        placement.give(start, 1)
    placement.give(starts[1000], 3)
    assert holes(placement) == {1: 2000}


@pytest.mark.parametrize("name", PLACEMENTS)
def test_a_pool_of_ten_million_blocks_is_made_at_once(name: str) -> None:
    placement = PLACEMENTS[name](10**7)
    assert placement.take(2048) is not None
    structures = [value for value in vars(placement).values() if isinstance(value, (list, dict))]
    assert all(len(value) < 50 for value in structures)
