"""The library's GEMM with a kernel of our choice.

cuBLASLt picks its kernel by a model of the card. For some products of decode steps another of its kernels is up to 15 %
faster; `MEASURED` names them, as `kvarena benchmark library_gemm` found them. What a
number means is only sure for the version it was measured with: with another one, and for all other products, PyTorch's
call stays what it is.

    y [M, N] (+)= x [M, K] @ w [N, K].T       row-major; to the library, which counts by columns, y.T = w @ x.T
"""

from __future__ import annotations

import ctypes
from ctypes import byref, c_float, c_int, c_int64, c_size_t, c_uint16, c_uint32, c_uint64, c_void_p
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvarena.engine.errors import EngineError

VERSION = 130100
# Of the library's enumerations.
_BF16, _FP32, _COMPUTE_FP32, _TRANSPOSED, _TRANSPOSE_A = 14, 0, 68, 1, 3
# Of an algorithm: its number among the attributes, and its type.
ATTRIBUTES: dict[str, tuple[int, Any]] = {
    "tile": (1, c_uint32), "splitk": (2, c_uint32), "reduction": (3, c_uint32), "swizzle": (4, c_uint32),
    "custom": (5, c_uint32), "stages": (6, c_uint32), "cluster": (8, c_uint16),
}  # fmt: skip
_WORKSPACE_BYTES = 32 * 2**20


class Algorithm(NamedTuple):
    """A kernel of the library, by the attributes of cublasLtMatmulAlgoConfigAttributes_t that differ between them."""

    tile: int
    swizzle: int
    custom: int
    cluster: int


class LibraryProduct(NamedTuple):
    """Most rows of x, rows and columns of w, and whether the product is added to what y holds."""

    num_rows: int
    num_cols: int
    depth: int
    accumulate: bool


# Common to all of them: the one algorithm for bf16 on Hopper, with its only number of stages, K in one part.
_ALGORITHM_ID, _STAGES = 66, 35
_ROW_BUCKETS = (64, 128, 192, 256)
# One H100.
MEASURED: dict[LibraryProduct, Algorithm] = {
    LibraryProduct(64, 4096, 14336, True): Algorithm(13, 0, 3, 5),
    LibraryProduct(128, 28672, 4096, False): Algorithm(220, 4, 0, 3),
    LibraryProduct(128, 4096, 14336, True): Algorithm(15, 0, 1, 3),
    LibraryProduct(192, 4096, 14336, True): Algorithm(27, 4, 0, 2),
    LibraryProduct(256, 28672, 4096, False): Algorithm(165, 0, 0, 5),
    LibraryProduct(256, 4096, 14336, True): Algorithm(17, 4, 3, 5),
    LibraryProduct(256, 4096, 4096, True): Algorithm(17, 2, 3, 5),
    LibraryProduct(256, 1024, 3072, True): Algorithm(12, 0, 0, 2),
    LibraryProduct(256, 1024, 2048, True): Algorithm(12, 0, 0, 5),
}


class Algo(ctypes.Structure):
    """cublasLtMatmulAlgo_t."""

    _fields_ = (("data", c_uint64 * 8),)


class Result(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = (
        ("algo", Algo), ("workspace", c_size_t), ("state", c_int), ("waves", c_float), ("reserved", c_int * 4),
    )  # fmt: skip


class Descriptors(NamedTuple):
    """The library's handles of a product and of w, x and y."""

    product: c_void_p
    w: c_void_p
    x: c_void_p
    y: c_void_p


class _Prepared(NamedTuple):
    desc: c_void_p
    layouts: tuple[c_void_p, c_void_p, c_void_p]
    algo: Algo


def find(num_rows: int, num_cols: int, depth: int, *, accumulate: bool) -> Algorithm | None:
    """The kernel for x [num_rows, depth] by w [num_cols, depth]; None: as the library likes."""
    if not _ROW_BUCKETS[0] // 2 < num_rows <= _ROW_BUCKETS[-1]:
        return None
    bucket = next(bucket for bucket in _ROW_BUCKETS if num_rows <= bucket)
    return MEASURED.get(LibraryProduct(bucket, num_cols, depth, accumulate))


class LibraryGemm:
    """Calls cuBLASLt; owns a workspace. Launches must be on one stream.

    Args:
        device: where the operands live.

    Raises:
        OSError: the library is not there, or of another version than `VERSION`.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.lib = ctypes.CDLL(f"libcublasLt.so.{VERSION // 10000}")
        self.lib.cublasLtGetVersion.restype = c_size_t
        version = self.lib.cublasLtGetVersion()
        if version != VERSION:
            raise OSError(f"libcublasLt is of version {version}, and the kernels' numbers are those of {VERSION}")
        self.handle = c_void_p()
        self.call("Create", byref(self.handle))
        self._workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._prepared: dict[tuple[Any, ...], _Prepared | None] = {}

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        out: Tensor | None = None,
        *,
        accumulate: bool = False,
        algorithm: Algorithm | None = None,
    ) -> Tensor | None:
        """out (+)= x @ weight.T by a kernel of our choice.

        Args:
            x: [M, K], rows contiguous.
            weight: [N, K], likewise.
            out: [M, N], likewise; written. Allocated if None.
            accumulate: add to `out`.
            algorithm: the kernel; None: what `find` says.

        Returns:
            `out`; None, and nothing was done, where there is no choice for these operands, or the library refuses it.
        """
        shape = (len(x), *weight.shape)
        algorithm = algorithm or find(*shape, accumulate=accumulate)
        if algorithm is None or not x.dtype == weight.dtype == torch.bfloat16:
            return None
        if out is None:
            out = x.new_empty(shape[:2])
        strides = (x.stride(0), weight.stride(0), out.stride(0))
        key = (shape, strides, algorithm)
        if key not in self._prepared:
            self._prepared[key] = self._prepare(shape, strides, algorithm)
        prepared = self._prepared[key]
        if prepared is None:
            return None
        a, b, c = prepared.layouts
        one, beta = c_float(1.0), c_float(1.0 if accumulate else 0.0)
        at_w, at_x, at_y, at_workspace = (c_void_p(t.data_ptr()) for t in (weight, x, out, self._workspace))
        stream = c_void_p(torch.cuda.current_stream(x.device).cuda_stream)
        self.call(
            "Matmul", self.handle, prepared.desc, byref(one), at_w, a, at_x, b, byref(beta), at_y, c, at_y, c,
            byref(prepared.algo), at_workspace, c_size_t(_WORKSPACE_BYTES), stream,
        )  # fmt: skip
        return out

    def describe(self, shape: tuple[int, ...], strides: tuple[int, ...]) -> Descriptors:
        """A product to the library: M, N and K, and the distances between rows of x, w and y."""
        num_rows, num_cols, depth = shape
        product = c_void_p()
        self.call("MatmulDescCreate", byref(product), c_int(_COMPUTE_FP32), c_int(_FP32))
        transposed = c_int(_TRANSPOSED)
        self.call("MatmulDescSetAttribute", product, c_int(_TRANSPOSE_A), byref(transposed), c_size_t(4))
        sizes = ((depth, num_cols, strides[1]), (depth, num_rows, strides[0]), (num_cols, num_rows, strides[2]))
        layouts = []
        for rows, cols, stride in sizes:
            layouts.append(c_void_p())
            types = c_int(_BF16), c_uint64(rows), c_uint64(cols), c_int64(stride)
            self.call("MatrixLayoutCreate", byref(layouts[-1]), *types)
        return Descriptors(product, layouts[0], layouts[1], layouts[2])

    def _prepare(self, shape: tuple[int, ...], strides: tuple[int, ...], algorithm: Algorithm) -> _Prepared | None:
        """What a call needs; None if the library refuses the algorithm."""
        desc = self.describe(shape, strides)
        algo, types = Algo(), [c_int(_BF16)] * 4
        precision = c_int(_COMPUTE_FP32), c_int(_FP32)
        self.call("MatmulAlgoInit", self.handle, *precision, *types, c_int(_ALGORITHM_ID), byref(algo))
        values = {"splitk": 1, "reduction": 0, "stages": _STAGES, **algorithm._asdict()}
        for name, number in values.items():
            value = ATTRIBUTES[name][1](number)
            size = c_size_t(ctypes.sizeof(value))
            self.call("MatmulAlgoConfigSetAttribute", byref(algo), c_int(ATTRIBUTES[name][0]), byref(value), size)
        result = Result()
        _, a, b, c = desc
        status = self.lib.cublasLtMatmulAlgoCheck(self.handle, desc.product, a, b, c, c, byref(algo), byref(result))
        fits = status == 0 and result.workspace <= _WORKSPACE_BYTES
        return _Prepared(desc.product, (a, b, c), algo) if fits else None

    def call(self, name: str, *args: Any) -> None:
        """Call a function of the library. Raises EngineError if it fails."""
        status = getattr(self.lib, f"cublasLt{name}")(*args)
        if status:
            raise EngineError(f"cublasLt{name} failed with status {status}; set runner.fusions=false")


def load_library_gemm(device: torch.device | str) -> LibraryGemm | None:
    """The library with kernels of our choice; None where it is not there or of another version."""
    try:
        return LibraryGemm(device) if torch.device(device).type == "cuda" else None
    except OSError:
        return None
