"""The benchmark of products with packed weights, where there is no GPU: its lines, with kernels that do nothing."""

import pytest
import torch

from kvarena.engine.kernels.gemm.table import Product
from kvarena.engine.quantization.hopper import HopperDevice
from kvarena.experiments.benchmarks.kernels import packed_gemm
from kvarena.experiments.benchmarks.kernels.gemm import Case


class Idle:
    """A kernel for Hopper, which leaves zeros."""

    prepare = staticmethod(list)

    def __call__(self, x, weight, tile, *, out, **_):
        return out.zero_()


@pytest.mark.skipif(torch.cuda.is_available(), reason="of the interpreter")
@pytest.mark.parametrize(("glu", "has_norm"), [(True, True), (False, True), (False, False)])
def test_each_kernel_has_a_line_with_its_error(monkeypatch, glu, has_norm):
    device = HopperDevice.__new__(HopperDevice)
    device.stream, device.wide, device.num_multiprocessors = Idle(), Idle(), 132
    monkeypatch.setattr(packed_gemm, "hopper_device", lambda _: device)
    monkeypatch.setattr(packed_gemm, "time_launches", lambda calls, min_launches: len([call() for call in calls]) / 2)
    monkeypatch.setattr(packed_gemm, "RING_BYTES", 2**15)
    bench = packed_gemm.Bench(Case("down", Product(40, 128, 256, glu), has_norm), 64, torch.device("cpu"))
    lines = {line["kernel"]: line for line in packed_gemm.measure(bench, packed_gemm.KERNELS, 1e12, tune=False)}
    assert set(lines) == {"engine, 16 bits", "library, 16 bits", "stream", "wide", "triton", "humming"}
    assert "failed" not in str(lines), lines
    for name in ("engine, 16 bits", "library, 16 bits", "triton"):
        assert lines[name]["error"] < 0.04, name  # bf16, rounded three times; the interpreter truncates
    for name in ("stream", "wide"):
        assert lines[name]["error"] == 1
    assert lines["stream"]["taken"] != lines["wide"]["taken"] and lines["triton"]["speedup"] == 1
    assert lines["humming"]["refused"]
