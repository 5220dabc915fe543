"""The benchmark of memory mapping counts every call, and says that it needs a GPU."""

import contextlib
import json

import pytest
import torch

from kvarena.engine.errors import ConfigError
from kvarena.experiments.benchmarks.kernels import mapping


class FreeDriver:
    """Calls that cost nothing."""

    granularity = 4096

    def __getattr__(self, name: str):
        return lambda *args: 0


class Waited:
    def wait(self) -> None:
        pass


def test_every_call_is_timed(monkeypatch, capsys):
    monkeypatch.setattr(mapping, "gpu_load", lambda busy: contextlib.nullcontext())
    driver = FreeDriver()
    driver.fence = Waited
    mapping.bench_calls(driver, 20, busy=False)
    mapping.bench_pool(driver, 20, busy=False)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {line["call"]: line["n"] for line in lines} == {
        "create": 20,
        "map": 20,
        "set_access": 20,
        "unmap": 20,
        "release": 20,
        "set_access of 8 side by side": 2,
        "grow by a page of keys and one of values": 20,
        "regrow": 20,
        "steal": 20,
    }
    assert all(0 <= line["us_per_page_p50"] <= line["us_per_page_p99"] for line in lines)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_so():
    with pytest.raises(ConfigError, match="run it on a CUDA machine"):  # a line, no stack trace
        mapping.main([])
