"""Kernels of the library that we chose: which products they serve, and on a GPU that they compute them."""

import pytest
import torch

from kvarena.engine.kernels.gemm import library as library_gemm
from kvarena.engine.kernels.gemm.library import MEASURED, find, load_library_gemm


def test_rows_between_the_buckets_take_the_larger_one():
    down = (4096, 14336)
    assert find(256, *down, accumulate=True) == find(193, *down, accumulate=True) is not None
    assert find(128, *down, accumulate=True) == find(65, *down, accumulate=True) != find(256, *down, accumulate=True)
    assert find(32, *down, accumulate=True) is None
    assert find(257, *down, accumulate=True) is None
    assert find(256, *down, accumulate=False) is None
    assert find(256, 4096, 14328, accumulate=True) is None


def test_without_the_library_or_with_another_version_nothing_is_chosen(monkeypatch):
    assert load_library_gemm("cpu") is None

    class Library:
        @staticmethod
        def cublasLtGetVersion():
            return library_gemm.VERSION + 1

    monkeypatch.setattr(library_gemm.ctypes, "CDLL", lambda name: Library)
    assert load_library_gemm("cuda") is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="cuBLASLt needs a CUDA device")
@pytest.mark.parametrize("product", MEASURED, ids=str)
def test_chosen_kernels_compute_their_products(product):
    gemm = load_library_gemm("cuda")
    if gemm is None:
        pytest.skip("another version of cuBLASLt")
    torch.manual_seed(0)
    for num_rows in (product.num_rows, product.num_rows - 7):
        x = torch.randn(num_rows, product.depth, device="cuda", dtype=torch.bfloat16)
        weight = torch.randn(product.num_cols, product.depth, device="cuda", dtype=torch.bfloat16)
        held = 50 * torch.randn(num_rows, product.num_cols, device="cuda", dtype=torch.bfloat16)
        out = held.clone()
        assert gemm(x, weight, out, accumulate=product.accumulate) is out
        expected = x.double() @ weight.double().t() + (held.double() if product.accumulate else 0)
        assert (out.double() - expected).norm() <= 5e-3 * expected.norm()
        assert gemm(x.float(), weight.float(), out.float(), accumulate=product.accumulate) is None
