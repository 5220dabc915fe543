"""One small simulated sweep for all tests of this folder, in a folder of its own."""

import pytest
from strategies import OwnAllocator

import kvarena

SIMULATED = {
    "runner": "simulated", "model": "qwen3-0.6b-shape", "engine": {"dtype": "bfloat16"}, "arrival": "poisson",
    "workload": "fixed", "workload.num_requests": 5, "workload.prompt_len": 24, "workload.output_len": 9,
    "report": {"pages": False},
}  # fmt: skip


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def simulated():
    """Settings of a cell that takes a moment."""
    return SIMULATED


@pytest.fixture(scope="session")
def comparison(tmp_path_factory):
    """A strategy of the caller's own beside a registered one, with two seeds."""
    folder = tmp_path_factory.mktemp("sweep")
    return kvarena.sweep(["paged", OwnAllocator], folder=folder, **SIMULATED | {"workload.seed": [0, 1]})


@pytest.fixture(scope="session")
def with_page(tmp_path_factory):
    """A run that wrote its page."""
    return kvarena.run(folder=tmp_path_factory.mktemp("run"), **SIMULATED | {"report": {"pages": True}})
