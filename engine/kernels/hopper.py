"""CUDA C++ kernels for Hopper: compiled by NVRTC once on a machine, launched through the driver's Python binding.

For what Triton cannot say: tiles that are no power of two, fetches that other programs of a cluster share, and weights
that are fetched before the kernel before this one has ended. Both libraries come with PyTorch's CUDA wheels.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.runtime.cache import get_cache_manager

from kvarena.engine.errors import EngineError

# Shared memory of a multiprocessor that its programs may have.
SHARED_BYTES = 227 * 1024
_ADVICE = "; runner.fusions=false with runner.attention=triton does without CUDA kernels"


def wgmma_source(cols: int, *, from_registers: bool = False, by_columns: bool = False, dtype: str = "bf16") -> str:
    """The tensor cores' instruction for 64 x `cols` x 16 as a device function: d (+)= a @ b.T, without + if not add.

    Args:
        cols: rows of b.
        from_registers: a comes from the threads' registers and not from shared memory.
        by_columns: b lies in shared memory column by column; only with `from_registers`.
        dtype: of a and b, as PTX calls it.
    """
    count = cols // 2
    registers = ", ".join(f"%{i}" for i in range(count))
    sums = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    if from_registers:
        kind, inputs, num_a, transposed = (
            "const unsigned (&a)[4]",
            ", ".join(f'"r"(a[{i}])' for i in range(4)),
            4,
            str(int(by_columns)),
        )
        a = "{" + ", ".join(f"%{count + i}" for i in range(4)) + "}"
    else:
        kind, inputs, num_a, transposed, a = "unsigned long long a", '"l"(a)', 1, "0, 0", f"%{count}"
    return f"""
__device__ __forceinline__ void wgmma(float (&d)[{count}], {kind}, unsigned long long b, int add) {{
  asm volatile(
      "{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{count + num_a + 1}, 0;\\n"
      "wgmma.mma_async.sync.aligned.m64n{cols}k16.f32.{dtype}.{dtype} {{{registers}}},"
      " {a}, %{count + num_a}, p, 1, 1, {transposed};\\n}}"
      : {sums} : {inputs}, "l"(b), "r"(add));
}}
"""


def kernel_source(name: str, constants: Mapping[str, object], wgmma_cols: int | None = None) -> str:
    """The text of kernel `name` with its constants, and `wgmma` of so many columns if any.

    With a constant PACKED that is not 0 `wgmma` takes its first operand from registers, with FLOAT16 both are float16.
    With COLUMNS there is a second `wgmma` of so many columns, from registers and with an operand that lies by columns.
    """
    folder = resources.files("kvarena.engine.kernels")
    head = "".join(f"#define {key} {value}\n" for key, value in constants.items())
    texts = (folder.joinpath(file).read_text() for file in ("hopper.cu", f"{name}.cu"))
    packed, dtype = bool(constants.get("PACKED", 0)), "f16" if constants.get("FLOAT16", 0) else "bf16"
    wgmma = "" if wgmma_cols is None else wgmma_source(wgmma_cols, from_registers=packed, dtype=dtype)
    if columns := constants.get("COLUMNS", 0):
        wgmma += wgmma_source(int(str(columns)), from_registers=True, by_columns=True, dtype=dtype)
    return head + wgmma + "".join(texts)


def compile_source(nvrtc: Any, text: str) -> tuple[bytes, str]:
    """A cubin for Hopper, and what the assembler says of registers and spills.

    Args:
        nvrtc: `cuda.bindings.nvrtc`.
        text: from `kernel_source`.

    Raises:
        EngineError: it does not compile; the message is the compiler's.
    """

    def call(name: str, *args: Any) -> Any:
        error, *values = getattr(nvrtc, name)(*args)
        if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise EngineError(f"{name} failed with {error.name}{_ADVICE}")
        return values[0] if values else None

    program = call("nvrtcCreateProgram", text.encode(), b"kernel.cu", 0, [], [])
    options = [b"--gpu-architecture=sm_90a", b"--std=c++17", b"--ptxas-options=-v"]
    status = nvrtc.nvrtcCompileProgram(program, len(options), options)[0]
    log = b" " * call("nvrtcGetProgramLogSize", program)
    call("nvrtcGetProgramLog", program, log)
    said = log.decode().strip("\0 \n")
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise EngineError(f"a CUDA kernel does not compile: {said}{_ADVICE}")
    cubin = b" " * call("nvrtcGetCUBINSize", program)
    call("nvrtcGetCUBIN", program, cubin)
    call("nvrtcDestroyProgram", program)
    return cubin, said


def kept_cubin(nvrtc: Any, text: str) -> bytes:
    """A cubin for Hopper: from where Triton keeps its own, or else compiled and put there.

    So a second start waits for no compiler, which takes 0.1 to 0.5 s a kernel.

    Args:
        nvrtc, text: see `compile_source`, and what it raises.
    """
    versioned = f"{nvrtc.nvrtcVersion()[1:]}\n{text}"
    kept = get_cache_manager(hashlib.sha256(versioned.encode()).hexdigest())
    path = kept.get_file("kernel.cubin")
    if path is not None:
        return Path(path).read_bytes()
    cubin, _ = compile_source(nvrtc, text)
    kept.put(cubin, "kernel.cubin")
    return cubin


def nvrtc_major(nvrtc: Any) -> int:
    """Major version of NVRTC. Raises OSError if it is not there."""
    try:
        return int(nvrtc.nvrtcVersion()[1])
    except RuntimeError as error:  # how the binding says that it finds no library
        raise OSError(f"NVRTC is not there: {error}") from error


class Kernel(NamedTuple):
    """A compiled kernel.

    Attributes:
        function: the driver's handle.
        threads: of a program.
        shared_bytes: dynamic shared memory of a program.
        cluster: programs of a cluster.
        clusters_at_once: how many the device holds at a time.
    """

    function: Any
    threads: int
    shared_bytes: int
    cluster: int
    clusters_at_once: int


class HopperKernels:
    """Compiles, and launches on the current stream.

    Args:
        device: a Hopper GPU.

    Attributes:
        device: where it launches.
        num_multiprocessors: of the device.

    Raises:
        ImportError: the binding of NVRTC or of the driver is not there.
        OSError: NVRTC is not there, or newer than the driver can load from.
    """

    def __init__(self, device: torch.device | str) -> None:
        from cuda.bindings import driver, nvrtc

        compiler, driver_version = nvrtc_major(nvrtc), driver.cuDriverGetVersion()[1]
        if compiler > driver_version // 1000:
            raise OSError(f"NVRTC {compiler} is newer than the driver's CUDA {driver_version // 1000}")
        self._driver, self._nvrtc, self.device = driver, nvrtc, device
        self.num_multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        self._maps: dict[tuple[int, ...], Any] = {}
        self._cubins: dict[str, bytes] = {}

    def prepare(self, texts: Iterable[str], num_threads: int = 16) -> None:
        """Compile kernels that will be asked for, several at a time. `texts`: from `kernel_source`."""
        wanted = list(dict.fromkeys(text for text in texts if text not in self._cubins))
        with ThreadPoolExecutor(num_threads) as threads:
            made = threads.map(lambda text: kept_cubin(self._nvrtc, text), wanted)
            self._cubins.update(zip(wanted, made, strict=True))

    def compile(
        self,
        name: str,
        constants: Mapping[str, object],
        wgmma_cols: int | None = None,
        *,
        threads: int,
        shared_bytes: int,
        cluster: int = 1,
    ) -> Kernel:
        """Kernel `name` of `engine/kernels/name.cu`. Raises EngineError if it does not compile or load."""
        text = kernel_source(name, constants, wgmma_cols)
        cubin = self._cubins.pop(text, None) or kept_cubin(self._nvrtc, text)
        module = self._call("cuModuleLoadData", cubin)
        function = self._call("cuModuleGetFunction", module, name.encode())
        dynamic = self._driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        self._call("cuFuncSetAttribute", function, dynamic, shared_bytes)
        kernel = Kernel(function, threads, shared_bytes, cluster, self.num_multiprocessors)
        if cluster > 1:
            config = self._config(kernel, self.num_multiprocessors // cluster * cluster, 0, overlap=False)
            kernel = kernel._replace(clusters_at_once=self._call("cuOccupancyMaxActiveClusters", function, config))
        return kernel

    def launch(self, kernel: Kernel, num_programs: int, *arguments: Any, overlap: bool) -> None:
        """Launch it.

        Args:
            kernel: from `compile`.
            num_programs: of the grid, whole clusters.
            arguments: maps from `matrix_map`, and ctypes objects.
            overlap: while the kernel before it runs; it must wait for that one's results itself.
        """
        pointers = [one.getPtr() if hasattr(one, "getPtr") else ctypes.addressof(one) for one in arguments]
        packed = (ctypes.c_void_p * len(pointers))(*pointers)
        stream = torch.cuda.current_stream(self.device).cuda_stream
        config = self._config(kernel, num_programs, stream, overlap=overlap)
        self._call("cuLaunchKernelEx", config, kernel.function, ctypes.addressof(packed), 0)

    def matrix_map(self, matrix: Tensor, box_rows: int, *, keep: bool = False) -> Any:
        """How the tensor memory accelerator reads boxes of `box_rows` x 64 elements of a bf16 matrix, swizzled.

        Args:
            matrix: rows contiguous, a multiple of 16 bytes apart.
            box_rows: at most 256. Rows of a box beyond the matrix are zeros.
            keep: remember the map, as of weights.
        """
        rows, cols = matrix.shape
        return self._map(matrix.data_ptr(), (cols, rows), (matrix.stride(0),), (64, box_rows), keep=keep)

    def head_map(self, heads: Tensor, box_rows: int, *, halves: int = 2) -> Any:
        """How it reads boxes of `box_rows` x one head x 128 elements of bf16 [rows, heads, 128], contiguous.

        A box is two matrices of `box_rows` x 64, swizzled, or one where `halves` is 1; its second coordinate is a row,
        its third twice the head, plus the half. The map is remembered.
        """
        rows, num_heads, dim = heads.shape
        sizes, strides = (64, rows, 2 * num_heads), (num_heads * dim, 64)
        return self._map(heads.data_ptr(), sizes, strides, (64, box_rows, halves), keep=True)

    def box_map(self, tensor: Tensor, box: tuple[int, int, int]) -> Any:
        """How it reads boxes of a bf16 tensor of three dimensions, swizzled; box and coordinates innermost first.

        Args:
            tensor: the last dimension contiguous, the others a multiple of 16 bytes apart. What a box has beyond it is
                zeros.
            box: elements in each dimension: 64, and at most 256 in each of the others.
        """
        sizes = tuple(reversed(tensor.shape))
        return self._map(tensor.data_ptr(), sizes, (tensor.stride(1), tensor.stride(0)), box, keep=False)

    def _map(
        self, address: int, sizes: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...], *, keep: bool
    ) -> Any:
        """Of bf16; sizes and strides in elements, the innermost first, whose stride is 1."""
        key = (address, *sizes, *strides, *box)
        if key in self._maps:
            return self._maps[key]
        driver = self._driver
        made = self._call(
            "cuTensorMapEncodeTiled",
            driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            len(sizes),
            address,
            [driver.cuuint64_t(size) for size in sizes],
            [driver.cuuint64_t(2 * stride) for stride in strides],
            [driver.cuuint32_t(size) for size in box],
            [driver.cuuint32_t(1)] * len(sizes),
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
        if keep:
            self._maps[key] = made
        return made

    def _config(self, kernel: Kernel, num_programs: int, stream: int, *, overlap: bool) -> Any:
        driver = self._driver
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = num_programs, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = kernel.threads, 1, 1
        config.sharedMemBytes = kernel.shared_bytes
        config.hStream = driver.CUstream(stream)
        config.attrs = list(self._attributes(kernel.cluster, overlap=overlap))
        config.numAttrs = len(config.attrs)
        return config

    def _attributes(self, cluster: int, *, overlap: bool) -> Iterator[Any]:
        ids = self._driver.CUlaunchAttributeID
        if cluster > 1:
            shape = self._driver.CUlaunchAttribute()
            shape.id = ids.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            shape.value.clusterDim.x, shape.value.clusterDim.y, shape.value.clusterDim.z = cluster, 1, 1
            yield shape
        if overlap:
            early = self._driver.CUlaunchAttribute()
            early.id = ids.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            early.value.programmaticStreamSerializationAllowed = 1
            yield early

    def _call(self, name: str, *args: Any) -> Any:
        error, *values = getattr(self._driver, name)(*args)
        if error != self._driver.CUresult.CUDA_SUCCESS:
            raise EngineError(f"{name} failed with {error.name}{_ADVICE}")
        return values[0] if values else None


def load_hopper_kernels(device: torch.device | str) -> HopperKernels | None:
    """None where the device is no Hopper GPU, or what compiles and launches is not installed."""
    if torch.device(device).type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return None
    try:
        return HopperKernels(device)
    except (ImportError, OSError):
        return None
