"""The kernels compile for Hopper, without spilling registers and within its shared memory. Needs no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("compile_sm90.py")
ROOT = Path(__file__).resolve().parents[2]
SHARED_MEMORY = 227 * 1024
REGISTERS = 65536


@pytest.fixture(scope="module", params=["few", pytest.param("all", marks=pytest.mark.slow)])
def resources(request):
    """Of two families' kernels; of all of them in `make test-all`."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, SCRIPT, *(["--few"] if request.param == "few" else [])]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert len(found) == {"few": 37, "all": 66}[request.param]
    return found


def test_nothing_spills(resources):
    spilled = {name: r for name, r in resources.items() if r["stack"] or r["local"] or r["reg"] > 255}
    assert not spilled


def test_no_reduction_is_one_that_triton_gets_wrong(resources):
    """The router's list of items lost its end so, and products of experts read weights that are nobody's."""
    assert {name: r["wrong_reductions"] for name, r in resources.items() if r["wrong_reductions"]} == {}


def test_all_lanes_choose_the_same_experts(resources):
    """Of logits that are no numbers, each lane's argmax may be another, and the list of items is then of no routing."""
    routes = {name: r["argmax"] for name, r in resources.items() if "route" in name}
    assert len(routes) >= 8 and not any(routes.values()), routes


def test_shared_memory_fits(resources):
    assert {name: r["shared"] for name, r in resources.items() if r["shared"] > SHARED_MEMORY} == {}
    for name, r in resources.items():
        if name.startswith("decode"):
            # Many rows: three programs on a multiprocessor keep enough loads in flight. Fewer rows give it no third.
            programs = 3 if name.endswith("x 256") else 2
            assert r["shared"] <= SHARED_MEMORY // programs, (name, r)
            assert r["reg"] * r["threads"] <= REGISTERS // programs, (name, r)
        elif name.startswith("shared"):
            assert r["shared"] <= SHARED_MEMORY // r["programs"], (name, r)
            assert r["reg"] * r["threads"] <= REGISTERS // r["programs"], (name, r)
        elif name.startswith("experts") and name.endswith("x 16"):
            assert r["shared"] <= SHARED_MEMORY // 2, (name, r)  # as above


def test_attention_uses_tensor_cores_and_asynchronous_copies(resources):
    for name, r in resources.items():
        if name.startswith("prefill"):
            assert r["wgmma"] and r["cp_async"], (name, r)
        elif name.startswith("decode"):
            assert r["mma"] and r["cp_async"], (name, r)
        elif name.startswith("shared"):  # products of few rows and of many; of large heads these are few too
            assert r["mma"] and r["cp_async"] and (r["wgmma"] or name == "shared gemma2"), (name, r)
        elif name.startswith(("experts gate", "experts down")):
            assert r["wgmma"] and r["cp_async"], (name, r)


def test_loads_are_sixteen_bytes_wide(resources):
    # Of a few kilobytes whose number is known to nobody when they are compiled.
    narrow = ("experts route", "experts sort", "best token", "draw chosen")
    assert [name for name, r in resources.items() if not r["wide_loads"] and not name.startswith(narrow)] == []


def test_kernels_touch_memory_only_after_the_kernel_before_them(resources):
    for name, r in resources.items():
        assert r["waits"], name
        # A step's inputs are there before its layers' first kernel.
        # So is the routing, long before a layer's second product; and so are the ranks' addresses, and weights.
        early = ("decode", "shared", "rope", "experts down", "experts norm", "norm", "all-reduce", "best token")
        assert r["before_wait"] == (["ld.global"] if name.startswith(early) else []), name


def test_rows_of_another_rank_come_sixteen_bytes_at_a_time(resources):
    """Of an address that it reads from memory Triton knows nothing: two bytes at a time, unless it is told."""
    found = resources["all-reduce"]["exchange"]
    assert [one for one in found if one.startswith("ld.global.cg")] == ["ld.global.cg.v4.b32"] * 2


def test_nobody_reads_another_rank_s_row_before_its_flag(resources):
    """One thread looks; the others learn of it behind a barrier. And nobody says so before all have written."""
    for name in ("all-reduce", "best token"):
        found = resources[name]["exchange"]
        told, seen = found.index("atom.global.sys.release"), found.index("ld.global.sys.acquire")
        read = next(i for i, one in enumerate(found) if one.startswith("ld.global.cg"))
        assert "bar.sync" in found[:told] and told < seen and "bar.sync" in found[seen:read], found


def test_the_last_program_to_end_reads_what_all_others_have_written(resources):
    """All threads' stores, a barrier, one thread's exchange; and its outcome reaches all threads behind a barrier.

    What others have written is then read past the first cache, which on another multiprocessor may hold older values.
    """
    merging = {name: r for name, r in resources.items() if r["arrivals"]}
    kinds = ("decode", "shared", "experts norm", "experts down and sum", "draw")
    assert {kind for kind in kinds if not any(name.startswith(kind) for name in merging)} == set()
    for name, r in merging.items():
        assert all(before and after for before, after in r["arrivals"]), (name, r["arrivals"])
        assert any(one.startswith("ld.global.cg") for one in r["exchange"]), name
    # One of each size of item, and the queue's.
    assert len(merging["shared gpt-oss"]["arrivals"]) == 3
