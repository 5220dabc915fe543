"""The CPU benchmark at its smallest: every line that it prints, and that parts and floor add up."""

import json

import pytest
import torch

from kvarena.experiments.benchmarks import cpu


@pytest.fixture(autouse=True)
def _grad():
    yield
    torch.set_grad_enabled(True)


def lines_of(capsys, *argv):
    assert cpu.main(argv) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.slow
def test_the_contest_its_split_and_its_floor(capsys):
    rates, first, ratios, split = lines_of(capsys, "--num-requests", "3", "--rounds", "1", "--max-output-len", "64")
    assert rates["copy_gb_s"] > 0 and rates["product_gflop_s"] > 0
    names = {"kvarena", "kvarena on modules", "generate", "generate_batch"}
    assert first["tokens_per_second"].keys() == first["processor_seconds"].keys() == names
    assert ratios["ratio_to"].keys() == names - {"kvarena"}
    assert ratios["requests_with_the_same_tokens"] == dict.fromkeys(names, 3)
    parts = {"attention", "products", "kernels between products", "draw", "inputs", "scheduler"}
    assert parts < split["split_ms"].keys()
    assert all(value > 0 for value in split["split_ms"].values())
    assert sum(split["split_ms"].values()) == pytest.approx(split["ms_per_step"], rel=0.01)
    assert 0 < split["floor_ms_per_step"] < split["ms_per_step"]


def test_a_shape(capsys):
    _, *lines = lines_of(capsys, "--shape", "tiny", "--rounds", "1")
    assert [line["step"] for line in lines] == ["prompt", "decode of 1", "decode of 8", "decode of 32"]
    assert all(line["ms"] > 0 and line["modules_ms"] > 0 and line["floor_ms"] > 0 for line in lines)
