"""Pages in regions, against a driver that fails where CUDA would, or where steps would share memory."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from memory_drivers import KIB, FakeDriver

from kvarena.engine.errors import ConfigError, EngineError
from kvarena.engine.pool.cuda_memory import call
from kvarena.engine.pool.virtual_memory import PageMap

PAGE = 64 * KIB
REGION = 8  # pages of address range


def make(driver: FakeDriver, num_pages: int = 6, num_regions: int = 4, page_bytes: int = PAGE) -> PageMap:
    return PageMap(driver, num_pages=num_pages, page_bytes=page_bytes, plane_bytes=num_regions * REGION * PAGE)


def pages_of(driver: FakeDriver, pages: PageMap, region: int, count: int) -> set[int]:
    """Addresses of a region's first pages in both planes."""
    plane = 4 * REGION * PAGE
    return {pages.address + p * plane + (region * REGION + i) * PAGE for p in range(2) for i in range(count)}


class Machine(RuleBasedStateMachine):
    """Requests come, grow and leave; steps are launched, and end only when somebody waits for them."""

    @initialize()
    def start(self) -> None:
        self.driver = FakeDriver()
        self.pages = make(self.driver)
        self.in_use: dict[int, int] = {}

    @precondition(lambda self: sum(self.in_use.values()) < 6)
    @rule(data=st.data())
    def grow(self, data: st.DataObject) -> None:
        region = data.draw(st.integers(0, 3))
        most = 6 - sum(self.in_use.values())
        self.in_use[region] = self.in_use.get(region, 0) + data.draw(st.integers(1, most))
        self.pages.grow(region * REGION, self.in_use[region])

    @precondition(lambda self: self.in_use)
    @rule()
    def launch(self) -> None:
        used = [pages_of(self.driver, self.pages, region, count) for region, count in self.in_use.items()]
        self.driver.launch(set().union(*used))

    @precondition(lambda self: self.in_use)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        gone = data.draw(st.lists(st.sampled_from(sorted(self.in_use)), min_size=1, unique=True))
        for region in gone:
            del self.in_use[region]
        self.pages.release(region * REGION for region in gone)

    @precondition(lambda self: self.in_use)
    @rule()
    def one_too_many(self) -> None:
        before = dict(self.driver.mapped)
        with pytest.raises(EngineError, match=r"more pages of KV are wanted, and \d of 6 are in use"):
            self.pages.grow(min(self.in_use) * REGION, self.in_use[min(self.in_use)] + 7)
        needed = set().union(*(pages_of(self.driver, self.pages, *item) for item in self.in_use.items()))
        assert {page: before[page] for page in needed} == {page: self.driver.mapped[page] for page in needed}
        self.leave_all()

    def leave_all(self) -> None:
        self.pages.release(region * REGION for region in self.in_use)
        self.in_use = {}

    @invariant()
    def audit(self) -> None:
        if not hasattr(self, "pages"):
            return
        # That no page is in two places, the driver sees to.
        for region, count in self.in_use.items():
            assert pages_of(self.driver, self.pages, region, count) <= self.driver.accessible
        assert len(self.driver.mapped) == 2 * (6 - self.pages.num_free)
        assert len(self.driver.handles) == 12

    def teardown(self) -> None:
        self.pages.close()
        self.pages.close()
        assert self.driver.range is None and not self.driver.handles and not self.driver.mapped


TestPageMap = Machine.TestCase
TestPageMap.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_released_region_keeps_its_pages_until_they_are_wanted():
    driver = FakeDriver()
    pages = make(driver)
    pages.grow(0, 4)
    pages.release([0])
    pages.grow(0, 3)  # the next request in this region
    assert (pages.num_mapped, pages.num_unmapped) == (4, 0)
    pages.grow(REGION, 3)  # two free ones, and the one that region 0 does not need
    assert (pages.num_mapped, pages.num_unmapped) == (7, 1)
    assert pages.num_free == 0


def test_a_page_is_unmapped_only_after_the_steps_that_may_read_it():
    driver = FakeDriver()
    pages = make(driver)
    pages.grow(0, 6)
    driver.launch(pages_of(driver, pages, 0, 6))
    pages.release([0])
    assert driver.num_done == 0  # nobody waits for a step while pages are not wanted
    pages.grow(REGION, 1)
    assert driver.num_done == 1
    driver.launch(pages_of(driver, pages, 1, 1))
    pages.grow(REGION, 6)
    assert driver.num_done == 1  # nor for a step that did not use them


@pytest.mark.parametrize("function", ["map", "set_access"])
def test_a_refused_call_leaves_nothing_half_mapped(function):
    driver = FakeDriver(fail_at=(function, 1))
    pages = make(driver)
    with pytest.raises(EngineError, match=f"{function} failed with CUDA_ERROR_UNKNOWN"):
        pages.grow(0, 3)
    assert not driver.mapped and pages.num_free == 6
    pages.release([0])
    pages.grow(REGION, 6)


def test_a_device_without_room_says_what_to_lower_and_keeps_nothing():
    driver = FakeDriver(num_handles=5)
    with pytest.raises(
        EngineError,
        match=r"768\.0 KiB of pages were asked for and 320\.0 KiB of them .* \(.*OUT_OF_MEMORY\); lower kv_cache",
    ) as error:
        make(driver)
    assert "\n" not in str(error.value)
    assert not driver.handles and driver.range is None


def test_a_page_that_the_device_cannot_map_is_refused():
    with pytest.raises(ConfigError, match="page_bytes=98304 cannot be mapped: this device maps pages of 65536 bytes"):
        make(FakeDriver(), page_bytes=96 * KIB)


def bindings(code: str, *values: int) -> SimpleNamespace:
    ok = SimpleNamespace(name="CUDA_SUCCESS")
    error = ok if code == "CUDA_SUCCESS" else SimpleNamespace(name=code)
    return SimpleNamespace(CUresult=SimpleNamespace(CUDA_SUCCESS=ok), cuMemMap=lambda *args: (error, *values))


def test_codes_of_the_binding():
    assert call(bindings("CUDA_SUCCESS", 7), "cuMemMap", 1) == 7
    assert call(bindings("CUDA_SUCCESS"), "cuMemMap") is None
    with pytest.raises(EngineError, match=r"^cuMemMap failed with CUDA_ERROR_INVALID_VALUE$"):
        call(bindings("CUDA_ERROR_INVALID_VALUE"), "cuMemMap")
    with pytest.raises(EngineError, match=r"CUDA_ERROR_NOT_SUPPORTED: .*use allocator=contiguous"):
        call(bindings("CUDA_ERROR_NOT_SUPPORTED"), "cuMemMap")
