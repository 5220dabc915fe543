"""Strategies of a caller's own, as the tests use them."""

from kvarena.allocators.paged import PagedAllocator
from kvarena.schedulers.continuous import ContinuousScheduler


class OwnAllocator(PagedAllocator):
    """Pages; keeps an option of its own."""

    def __init__(self, *, greed: int = 2, **options) -> None:
        super().__init__(**options)
        self.greed = greed


class OwnScheduler(ContinuousScheduler):
    """First come, first served."""


class Strict(PagedAllocator):
    """Has an option that must be given."""

    def __init__(self, *, limit: int, **options) -> None:
        super().__init__(**options)
        self.limit = limit


class Broken(PagedAllocator):
    """Cannot be made."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        raise TypeError("greed must be a number")


def made_by_a_function(**options) -> OwnAllocator:
    """An allocator of its own."""
    return OwnAllocator(greed=7, **options)
