"""Garbage collection while a process imports its libraries."""

import gc

import pytest

from kvarena.engine.importing import importing


@pytest.fixture(autouse=True)
def thaw():
    yield
    gc.unfreeze()


def test_nothing_is_collected_within_and_what_exists_is_set_aside_after():
    before = gc.get_freeze_count()
    with importing():
        assert not gc.isenabled()
        made = [[] for _ in range(10_000)]
    assert gc.isenabled()
    assert gc.get_freeze_count() > before + len(made)


def test_an_import_that_fails_does_not_leave_collections_off():
    with pytest.raises(ModuleNotFoundError), importing():
        import no_such_module  # noqa: F401
    assert gc.isenabled()
