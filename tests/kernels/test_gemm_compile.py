"""The GEMM and step kernels compile for Hopper: no spills, within shared memory, on the units meant for them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvarena.engine.kernels.gemm.glu import glu_tile

SCRIPT = Path(__file__).with_name("compile_gemm_sm90.py")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", params=["few", pytest.param("all", marks=pytest.mark.slow)])
def resources(request):
    """Of some launches; of all of them in `make test-all`."""
    paths = os.pathsep.join([str(ROOT), str(SCRIPT.parent)])
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": paths}
    command = [sys.executable, SCRIPT, *(["--few"] if request.param == "few" else [])]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert len(found) == {"few": 10, "all": 22}[request.param]
    return found


def test_nothing_spills_shared_memory_fits_and_no_reduction_is_wrong(resources):
    assert not {name: r for name, r in resources.items() if r["stack"] or r["local"] or r["reg"] > 255}
    assert not {name: r["shared"] for name, r in resources.items() if r["shared"] > 227 * 1024}
    assert not {name: r["wrong_reductions"] for name, r in resources.items() if r["wrong_reductions"]}


def test_more_than_one_row_uses_wgmma(resources):
    for name, r in resources.items():
        if name.startswith(("gemm", "glu")):
            assert r["wgmma"] == (not name.startswith("gemm 1 ")), name


def test_packed_products_use_tensor_cores_and_asynchronous_copies(resources):
    products = {name: r for name, r in resources.items() if name.startswith("packed")}
    assert products
    for name, r in products.items():
        assert r["wgmma"] if int(name.split()[1]) >= 64 else r["mma"], name
        assert r["cp_async"] and r["wide_loads"], name
        assert r["waits"] and not r["before_wait"], name


def test_a_product_may_be_launched_before_the_kernel_before_it_has_ended(resources):
    products = {name: r for name, r in resources.items() if name.startswith(("gemm", "glu"))}
    assert products and [name for name, r in products.items() if not r["waits"] or r["before_wait"]] == []


def test_gated_products_fit_as_often_as_their_table_says(resources):
    for name, r in resources.items():
        if name.startswith("glu"):
            # A program takes 1 KiB beside its own; a multiprocessor has 228 and 64 Ki registers.
            tile = glu_tile(int(name.split()[1]), 6144, 1024, 132)
            assert tile.programs_per_sm * (r["shared"] + 1024) <= 228 * 1024, name
            assert tile.programs_per_sm * r["reg"] * 32 * tile.num_warps <= 64 * 1024, name
