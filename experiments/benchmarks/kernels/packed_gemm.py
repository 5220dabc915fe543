"""Times products with packed weights on a GPU: each kernel's, against a 16-bit product and the copy's bandwidth.

    kvarena benchmark packed_gemm [--shape llama-3.1-8b] [--rows 1 --rows 64] [--group-size 128]

Every product of a decode forward but the output head's, in 4 bits with zero points, over enough copies of the weights
that the L2 cache holds none: by the Triton kernel, by humming-kernels where it is installed, and unpacked by the
library. Each is compared with float64 first. One JSON line per product and kernel: microseconds, the packed bytes a
second as a share of the copy's, and how much faster than the 16-bit product.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kvarena.engine.quantization.humming import humming_product
from kvarena.engine.quantization.products import Product, TritonProduct
from kvarena.engine.quantization.weight import PackedWeight, pack_codes
from kvarena.experiments.benchmarks.kernels.gemm import RING_BYTES, cases
from kvarena.experiments.gpu.floors import SHAPES, shape_of
from kvarena.experiments.gpu.timing import copy_bandwidth, require_cuda, time_launches
from kvarena.experiments.tools import tool_parser

ROWS = (1, 8, 64, 256, 2048)


def random_packed(num_outputs: int, num_inputs: int, group_size: int, device: torch.device) -> PackedWeight:
    """A weight of 4 bits with zero points whose values have a standard deviation of about 1 / sqrt(inputs)."""
    shape = num_inputs // group_size, num_outputs
    codes = torch.randint(0, 16, (num_outputs, num_inputs), dtype=torch.uint8, device=device)
    scales = (torch.rand(shape, device=device) + 0.5).mul_(0.2 * num_inputs**-0.5).half()
    zeros = torch.randint(6, 10, shape, dtype=torch.uint8, device=device)
    return PackedWeight(pack_codes(codes), scales, zeros, None, group_size)


def lines(
    name: str, shape: tuple[int, int, int], group_size: int, copy: float, device: torch.device
) -> Iterator[dict[str, Any]]:
    """What to print of one product; `shape`: rows of x, outputs, inputs. `copy`: bytes a second."""
    num_rows, num_outputs, num_inputs = shape
    x = torch.randn(num_rows, num_inputs, device=device, dtype=torch.bfloat16)
    num_copies = max(2, min(32, 2 * RING_BYTES // (num_outputs * num_inputs)))
    weights = [random_packed(num_outputs, num_inputs, group_size, device) for _ in range(num_copies)]
    exact = F.linear(x.double(), weights[0].dequantize(torch.float64))
    plain = [weight.dequantize(torch.bfloat16) for weight in weights]
    library = time_launches([lambda w=w: F.linear(x, w) for w in plain])  # type: ignore[misc]
    del plain
    common = {"section": "packed", "name": name, "rows": num_rows, "cols": num_outputs, "depth": num_inputs}
    yield common | {"kernel": "library, 16 bits", "us": round(library, 2)}
    judges = [TritonProduct(weight) for weight in weights]
    kernels: dict[str, Callable[[PackedWeight, TritonProduct], tuple[Product | None, str | None]]] = {
        "triton": lambda _, judge: (judge, None),
        "humming": lambda weight, judge: humming_product(weight, torch.bfloat16, judge),
    }
    for kernel, make in kernels.items():
        made = [make(weight, judge) for weight, judge in zip(weights, judges, strict=True)]
        products = [product for product, _ in made if product is not None]
        if len(products) < len(made):
            yield common | {"kernel": kernel, "refused": made[0][1] or "not installed"}
            continue
        error = _error(products[0](x, None, None, None), exact)
        calls = [lambda p=p: p(x, None, None, None) for p in products]
        us = time_launches(calls)
        share = weights[0].num_bytes / us * 1e6 / copy
        yield common | {
            "kernel": kernel, "us": round(us, 2), "copy_share": round(share, 3), "speedup": round(library / us, 2),
            "error": error,
        }  # fmt: skip


def _error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def main(argv: Sequence[str]) -> int:
    """The command line."""
    parser = tool_parser(__name__, __doc__)
    parser.add_argument("--shape", choices=SHAPES, default=SHAPES[0], help="of the model")
    parser.add_argument("--rows", type=int, action="append", help=f"default: {', '.join(map(str, ROWS))}")
    parser.add_argument("--group-size", type=int, default=128, choices=(32, 64, 128), help="inputs that share a scale")
    args = parser.parse_args(argv)
    require_cuda()
    device, copy = torch.device("cuda"), copy_bandwidth()
    print(json.dumps({"section": "ceiling", "copy_tbps": round(copy / 1e12, 3)}), flush=True)
    for num_rows in args.rows or ROWS:
        for case in cases(shape_of(args.shape), num_rows):
            if case.name != "head":
                _, num_cols, depth, _ = case.product
                for line in lines(case.name, (num_rows, num_cols, depth), args.group_size, copy, device):
                    print(json.dumps(line), flush=True)
    return 0
