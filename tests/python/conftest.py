"""One small simulated sweep for all tests of this folder, in a folder of its own."""

import os

import pytest
from strategies import OwnAllocator

import kvarena

SIMULATED = {
    "runner": "simulated", "model": "qwen3-0.6b-shape", "engine": {"dtype": "bfloat16"}, "workload": "lognormal",
    "workload.num_requests": 5,
}  # fmt: skip


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def simulated():
    """Settings of a cell that takes a moment."""
    return SIMULATED | {"report": {"pages": False}}


@pytest.fixture(scope="session")
def comparison(tmp_path_factory):
    """A strategy of the caller's own beside a registered one, with two seeds."""
    before, folder = os.getcwd(), tmp_path_factory.mktemp("sweep")
    os.chdir(folder)
    try:
        yield kvarena.sweep(allocator=["paged", OwnAllocator], folder=folder, **SIMULATED | {"workload.seed": [0, 1]})
    finally:
        os.chdir(before)
