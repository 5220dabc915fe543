"""The how-to of docs/strategies.md as it is written: the code of its steps runs, and tests find it by themselves."""

import re
import shutil
import sys
from pathlib import Path

import pytest
from hydra.errors import InstantiationException
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

import kvarena.allocators
import kvarena.allocators.eviction
import kvarena.schedulers
from kvarena.allocators.eviction_policies import policy_names
from kvarena.engine.contract import KVAllocator, StepScheduler
from kvarena.engine.errors import ConfigError
from kvarena.engine.request import Request, SamplingParams
from kvarena.experiments.fuzzing.matrix import Cell, MatrixFailure, allocator_cells, run_cell
from kvarena.experiments.fuzzing.random_traces import make_trace
from kvarena.experiments.settings import strategies
from kvarena.experiments.settings.explain import explain
from kvarena.experiments.settings.strategies import (
    build_allocator,
    build_scheduler,
    make_part,
    strategy_names,
    strategy_options,
)
from kvarena.experiments.settings.targets import Part

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"```(?:python|yaml)\n(# ([\w/.]+):? ?[^\n]*\n.*?)```", re.S)
PAGE = (ROOT / "docs/strategies.md").read_text(encoding="utf-8")
FILES = {path: text for text, path in BLOCK.findall(PAGE)}


@pytest.fixture
def add(tmp_path, monkeypatch):
    """Writes files as a newcomer does; nothing of it is left in the checkout or in this process."""
    for package in (kvarena.allocators, kvarena.schedulers):
        folder = tmp_path / package.__name__.rpartition(".")[2]
        folder.mkdir()
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
    for group in ("allocator", "scheduler"):
        shutil.copytree(ROOT / "conf" / group, tmp_path / "conf" / group)
    monkeypatch.setattr(strategies, "CONF", tmp_path / "conf")
    before = set(sys.modules)

    def write(*paths: str, **changes: str) -> None:
        for path in paths:
            text = FILES[path]
            for old, new in changes.items():
                assert old in text
                text = text.replace(old, new)
            (tmp_path / path).write_text(text)

    yield write
    for package in (kvarena.allocators, kvarena.schedulers):
        if hasattr(package, "mine"):
            del package.mine
    for name in set(sys.modules) - before:
        if name.endswith(".mine"):
            del sys.modules[name]


ALLOCATOR = ("allocators/mine.py", "conf/allocator/mine.yaml")
SCHEDULER = ("schedulers/mine.py", "conf/scheduler/mine.yaml")
POLICY = ("allocators/eviction/mine.py",)


def test_the_page_has_the_files():
    assert set(FILES) == {*ALLOCATOR, *SCHEDULER, *POLICY}


def test_an_eviction_policy_from_an_empty_file_is_found_by_its_name(add, tmp_path, monkeypatch):
    folder = tmp_path / "allocators" / "eviction"
    folder.mkdir()
    monkeypatch.setattr(kvarena.allocators.eviction, "__path__", [*kvarena.allocators.eviction.__path__, str(folder)])
    add(*POLICY)
    assert "mine" in policy_names()
    pool = build_allocator("paged_prefix", num_blocks=6, block_size=4, max_model_len=32, eviction="mine")
    for number in range(4):  # more than the pool keeps
        req = Request(str(number), [number + 1] * 9, SamplingParams(max_tokens=4))
        assert pool.allocate(req, 9)
        req.num_computed_tokens = 9
        pool.commit(req)
        pool.free(req)
    assert 0 < pool.usage().cached <= 24


def test_an_allocator_from_an_empty_file_passes_the_matrix_and_the_machine(add):
    from tests.allocators import allocator_machine

    add(*ALLOCATOR)
    assert ("mine", None) in allocator_cells()
    for scheduler in strategy_names("scheduler"):
        for seed in range(2):
            run_cell(make_trace(seed), Cell("mine", scheduler, overlap=seed == 1))
    known = {strategy_target(name) for name in strategy_names("allocator")} - {strategy_target("mine")}
    cases = allocator_machine.registered_cases(known)
    assert set(cases) == {"mine"}
    make = staticmethod(lambda: cases["mine"][0](max_model_len=allocator_machine.MAX_LEN))
    machine = type("mine", (allocator_machine.AllocatorMachine,), {"make": make})
    few = settings(allocator_machine.SETTINGS, max_examples=5, database=None)
    run_state_machine_as_test(machine, settings=few)


def strategy_target(name: str) -> type:
    return type(build_allocator(name, num_blocks=16, max_model_len=16))


def test_a_scheduler_from_an_empty_file_passes_the_matrix(add):
    add(*SCHEDULER)
    assert "mine" in strategy_names("scheduler")
    for allocator, window in allocator_cells():
        run_cell(make_trace(3), Cell(allocator, "mine", overlap=True, window=window))


REGION = """
    contiguous = True

    def allocate(self, req, num_tokens, num_cached=0):
        if req in self._tables:
            return num_tokens <= req.num_slots
        need = cdiv(req.max_total_tokens, self.block_size)
        start = next((s for s in sorted(self._free) if {*range(s, s + need)} <= {*self._free}), None)
        if start is None:
            return False
        self._tables[req] = list(range(start, start + need))
        self._free = [block for block in self._free if block not in self._tables[req]]
        req.num_slots = need * self.block_size
        return True

    def slots_to_admit(self, head):
        return cdiv(head.req.max_total_tokens, self.block_size) * self.block_size

    def has_hole(self, head):
        need = self.slots_to_admit(head) // self.block_size
        return any({*range(s, s + need)} <= {*self._free} for s in self._free)

    def _unused("""


def test_regions_of_a_rule_of_ones_own_are_recounted_by_it(add):
    add(ALLOCATOR[1])
    add(ALLOCATOR[0], **{"    def allocate(": REGION})
    for scheduler in ("continuous", "static"):
        run_cell(make_trace(0), Cell("mine", scheduler))


@pytest.mark.parametrize(
    ("path", "old", "new", "words"),
    [
        (
            ALLOCATOR[0],
            "def count(",
            "def counts(",
            "kvarena.allocators.mine.MineAllocator lacks count; write `def count(",
        ),
        (ALLOCATOR[0], "    @property\n", "", "MineAllocator.max_request_tokens must be a property; write `@property"),
        (ALLOCATOR[0], ", num_cached: int = 0", "", "MineAllocator.allocate is called with other arguments"),
        (ALLOCATOR[0], "        super().__init__(**pool)\n", "", "'num_blocks'; call super().__init__(...) first"),
        (
            ALLOCATOR[0],
            "Allocator(KVAllocator)",
            "Allocator(dict)",
            "MineAllocator makes no KVAllocator; derive the c",
        ),
        (ALLOCATOR[0], "(self, **pool: Any)", "(self)", "got an unexpected keyword argument"),
        (ALLOCATOR[1], "block_size: 16", "blok_size: 16", "got an unexpected keyword argument 'blok_size'"),
        (
            ALLOCATOR[1],
            "mine.Mine",
            "mine.Main",
            "MainAllocator cannot be loaded: No module named 'kvarena.allocators.mine.",
        ),
        (
            ALLOCATOR[1],
            "s.mine.",
            "s.mime.",
            "mime.MineAllocator cannot be loaded: No module named 'kvarena.allocators.mime'",
        ),
        (ALLOCATOR[0], "import Any\n", "import Amy\n", "cannot import name 'Amy' from 'typing' "),
        (ALLOCATOR[0], "class MineAllocator(KVAllocator):", "class MineAllocator(KVAllocator)", "mine.py, line 11)"),
        (SCHEDULER[0], "(Scheduler)", "(Schedule)", "name 'Schedule' is not defined (mine.py, line 9)"),
        (
            SCHEDULER[0],
            "def build_plan(",
            "def plan(",
            "kvarena.schedulers.mine.MineScheduler lacks build_plan; write `def ",
        ),
        (SCHEDULER[0], "(self, plan: StepPlan, now: float)", "(self, plan)", "build_plan is called with other argumen"),
        (SCHEDULER[1], "MineScheduler\n", "MineScheduler\nwatermark: 2\n", "scheduler.watermark=2 must be in [0, 1)"),
    ],
)
def test_each_error_on_the_way_is_a_line(add, path, old, new, words):
    group, files = ("allocator", ALLOCATOR) if path in ALLOCATOR else ("scheduler", SCHEDULER)
    add(*files)
    add(path, **{old: new})
    given = (
        {"num_blocks": 8}
        if group == "allocator"
        else {"allocator": build_allocator("paged", num_blocks=8, max_model_len=16)}
    )
    kind = KVAllocator if group == "allocator" else StepScheduler
    with pytest.raises((InstantiationException, ConfigError)) as caught:
        make_part(kind, Part(group, strategy_options(group, "mine")), **given, max_model_len=16)
    said = explain(caught.value)
    assert said is not None and words in said and "\n" not in said


def test_a_leak_and_a_wrong_count_are_lines_of_the_matrix(add):
    add(*ALLOCATOR)
    add(ALLOCATOR[0], **{"self._free += self._tables.pop(req, [])": "self._free += self._tables.pop(req, [])[1:]"})
    with pytest.raises(MatrixFailure, match="trace 0, mine x continuous: "):
        run_cell(make_trace(0), Cell("mine", "continuous"))


def test_a_policy_that_plans_nothing_is_a_line(add):
    add(*SCHEDULER)
    add(SCHEDULER[0], **{"        self.schedule_prefills(plan)\n": ""})
    scheduler = build_scheduler("mine", build_allocator("paged", num_blocks=8, max_model_len=16), max_model_len=16)
    assert scheduler.has_work is False
    with pytest.raises(MatrixFailure, match=r"requests wait and nothing is planned|run after"):
        run_cell(make_trace(0), Cell("paged", "mine"))
