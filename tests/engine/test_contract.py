"""What a class that others write lacks is said in one line where an object is made: class, member, what to write."""

import inspect

import pytest

from kvarena.engine.contract import KVAllocator, KVUsage, StepScheduler
from kvarena.engine.errors import ConfigError
from kvarena.schedulers.base import Scheduler

POOL = {"num_blocks": 4, "block_size": 4, "max_model_len": 16}
OPTIONS = {"max_model_len": 16}


class Whole(KVAllocator):
    """Holds nothing, in a right way."""

    max_request_tokens = 16

    def allocate(self, req, num_tokens, num_cached=0):
        return False

    def free(self, req):
        req.num_slots = 0

    def block_table(self, req):
        return []

    def count(self):
        return KVUsage(16, 0, 0, 0, 0, 0, 16)


def line(make) -> str:
    with pytest.raises(ConfigError) as caught:
        make()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_whole_class_is_made():
    assert Whole(**POOL).usage().free == 16
    assert list(inspect.signature(Whole).parameters)[:3] == list(POOL)


@pytest.mark.parametrize("name", sorted(KVAllocator.__abstractmethods__))
def test_an_allocator_without_a_member_is_told_what_to_write(name):
    members = {key: value for key, value in vars(Whole).items() if not key.startswith("_") and key != name}
    said = line(lambda: type("Mine", (KVAllocator,), members)(**POOL))
    function = getattr(KVAllocator, name)
    function = function.fget if isinstance(function, property) else function
    assert f".Mine lacks {name}; write `" in said and f"def {name}(self" in said
    assert function.__doc__.strip().splitlines()[0] in said and "(KVAllocator in kvarena.engine.contract)" in said


def test_all_that_is_missing_is_named_at_once():
    said = line(lambda: type("Mine", (KVAllocator,), {})(**POOL))
    assert "Mine lacks allocate, block_table, count, free, max_request_tokens; write `@property def max_request" in said


def test_a_scheduler_without_a_policy_is_told_too():
    said = line(lambda: type("Mine", (Scheduler,), {})(Whole(**POOL), **OPTIONS))
    assert "Mine lacks build_plan; write `def build_plan(self, plan: StepPlan, now: float) -> None`" in said
    assert "(Scheduler in kvarena.schedulers.base)" in said
    said = line(lambda: type("Mine", (StepScheduler,), {})())
    assert "has_work, head, num_running, num_waiting, queue_head, schedule, take_back, update; write `@property" in said


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"max_request_tokens": lambda self: 16}, "Mine.max_request_tokens must be a property; write `@property def"),
        ({"count": property(lambda self: None)}, "Mine.count must not be a property; write `def count(self)"),
        (
            {"allocate": lambda self, req, num_tokens: True},
            "Mine.allocate is called with other arguments (too many positional arguments); write `def allocate(self, ",
        ),
        ({"free": lambda self, req, now: None}, "Mine.free is called with other arguments (missing a required argu"),
    ],
)
def test_a_member_of_another_shape_is_named(members, words):
    assert words in line(lambda: type("Mine", (Whole,), members)(**POOL))


def forgets(self, **pool):
    pass


def comes_first(self, **pool):
    self.table = [0] * self.num_blocks


def test_a_constructor_that_leaves_its_base_out_is_named():
    said = line(lambda: type("Mine", (Whole,), {"__init__": forgets})(**POOL))
    assert "Mine was made without its base; call super().__init__(...) first in " in said
    said = line(lambda: type("Mine", (Whole,), {"__init__": comes_first})(**POOL))
    assert "'Mine' object has no attribute 'num_blocks'; call super().__init__(...) first in " in said


def test_a_bug_of_the_classs_own_keeps_its_stack_trace():
    def typo(self, **pool):
        Whole.__init__(self, **pool)
        self.tabel.clear()

    with pytest.raises(AttributeError, match="tabel"):
        type("Mine", (Whole,), {"__init__": typo})(**POOL)


def test_an_unknown_option_is_named_with_the_known_ones():
    said = line(lambda: Whole(**POOL, block_sise=4))
    assert "Whole: got an unexpected keyword argument 'block_sise'; it takes (*, num_blocks" in said
