"""The attention and fused kernels on a GPU, against copied bytes and a large matrix product, as JSON lines.

    kvarena benchmark kernels --only decode,prefill,fused --tune
    kvarena benchmark kernels --only chunks     # prompts behind a context, unequal ones, beside cuDNN's rate
    kvarena benchmark kernels --only figure18

Every line has `us` (median of graph replays over memory several times the L2 cache), `tbps` and `share_of_copy`
(bytes that must move, over time, over what a copy moves) or `tflops` and `share_of_matmul`, and for attention
`error` (relative, against float64). `--tune` measures other tile shapes and splits beside the default ones, for at
most `--seconds`. The last line of stdout is a JSON object with the best of each case.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from time import perf_counter
from typing import Any

import torch

from kvarena.engine.errors import KvarenaError
from kvarena.engine.kernels.attention.base import AttentionCall
from kvarena.engine.kernels.attention.config import (
    MANY_ROWS,
    DecodeConfig,
    PrefillConfig,
    decode_config,
    prefill_config,
)
from kvarena.engine.kernels.attention.decode import DecodeScratch, decode_attention
from kvarena.engine.kernels.attention.plan import Capacity, Shape, plan_step
from kvarena.engine.kernels.attention.stream_decode import StreamDecode, streams
from kvarena.engine.kernels.hopper import load_hopper_kernels
from kvarena.experiments.benchmarks.kernels.attention_cases import (
    LLAMA_8B,
    OPT_13B,
    QWEN3_06B,
    Batch,
    make_batch,
    relative_error,
)
from kvarena.experiments.benchmarks.kernels.attention_variants import (
    DECODE_CASES,
    DECODE_TILES,
    FIGURE_18_CASES,
    NUM_COMMON_TILES,
    POOLS,
    PREFILL_CASES,
    PREFILL_TILES,
    decode_variants,
    dense_call,
    library_calls,
)
from kvarena.experiments.benchmarks.kernels.fused_cases import bench_fused
from kvarena.experiments.benchmarks.kernels.prefill_cases import attention_calls, bench_chunks, prefill_launches
from kvarena.experiments.gpu.timing import copy_bandwidth, matmul_flops, require_cuda, time_launches
from kvarena.experiments.tools import tool_parser

Line = dict[str, Any]


def decode_launches(
    batch: Batch,
    config: DecodeConfig,
    *,
    contiguous: bool = False,
    overlap: bool | None = None,
    stream: StreamDecode | None = None,
) -> tuple[list[Callable[[], None]], torch.Tensor]:
    """One launch per layer of the pool, by the Triton kernel or by `stream`, and the output that they share."""
    shape = batch.shape
    programs = config.programs_per_sm * torch.cuda.get_device_properties(batch.q.device).multi_processor_count
    slots = max(1, programs // shape.num_kv_heads)
    plan = Shape(config, 1, slots, stays=stream is not None)
    # With room for any lengths, as a decode graph has it: the programs that find nothing to do cost time too.
    capacity = Capacity(plan.decode_capacity(len(batch.seq_lens)), 0, 0 if stream is None else slots + 1)
    words, _ = plan_step(batch.query_start_loc, batch.seq_lens, plan, capacity)
    items = torch.from_numpy(words).cuda()
    scratch = DecodeScratch(
        capacity.decode, len(batch.seq_lens), shape.num_heads, shape.num_kv_heads, shape.head_dim, batch.q.device
    )
    calls, out = attention_calls(batch, contiguous=contiguous)
    given: dict[str, Any] = {"num_items": capacity.decode, "scratch": scratch}
    launch: Callable[[AttentionCall], None]
    if stream is None:
        launch = partial(decode_attention, items=items, config=config, overlap=overlap, **given)
    else:
        own, starts = items.split([len(items) - capacity.starts, capacity.starts])
        launch = partial(stream, items=own, starts=starts, overlap=overlap is not False, **given)
    return [partial(launch, call) for call in calls], out


def measure(
    line: Line,
    batch: Batch,
    config: DecodeConfig | PrefillConfig,
    *,
    contiguous: bool = False,
    overlap: bool | None = None,
    stream: StreamDecode | None = None,
) -> Line:
    """Check and time one variant; a variant that the device cannot run says so in its line."""
    line |= {"block_size": batch.block_size, "contiguous": contiguous, "config": [*config]}
    is_decode = isinstance(config, DecodeConfig)
    try:
        if isinstance(config, DecodeConfig):
            launches, out = decode_launches(batch, config, contiguous=contiguous, overlap=overlap, stream=stream)
        else:
            launches, out = prefill_launches(batch, config, contiguous=contiguous)
        launches[0]()
        line["error"] = float(f"{relative_error(batch, 0, out, batch.shape.head_dim**-0.5):.2e}")
        line["us"] = round(time_launches(launches, min_launches=20 if is_decode else 4), 2)
    except (RuntimeError, KvarenaError) as failure:
        line["failed"] = _first_line(failure)
    return line


def bench_decode(tune: Callable[[], bool]) -> Iterator[tuple[Line, Batch]]:
    """Paged decode over cases, block sizes, the contiguous switch, and while `tune` says so tiles and splits."""
    kernels = load_hopper_kernels("cuda")
    stream = None if kernels is None else StreamDecode(kernels)
    for (case, rows), shape in product(DECODE_CASES.items(), (LLAMA_8B, QWEN3_06B)):
        group = shape.num_heads // shape.num_kv_heads
        many = decode_config(shape.head_dim, 2, MANY_ROWS + 1)
        default = decode_config(shape.head_dim, 2, len(rows))
        line: Line = {"kernel": "decode", "shape": shape.name, "case": case}
        batch = make_batch(shape, rows)
        tiles = DECODE_TILES if shape == LLAMA_8B else DECODE_TILES[:NUM_COMMON_TILES]
        for config in decode_variants(default, len(rows), tiles):
            if config == default or tune():
                yield measure(line.copy(), batch, config), batch
        apart = line | {"kernel": "decode, launches apart"}
        yield measure(apart, batch, default, overlap=False), batch
        if stream is not None:
            yield measure(line | {"kernel": "stream decode"}, batch, many, stream=stream), batch
        del batch
        for block_size, contiguous in POOLS:
            if case in ("256 x 1024", "32 x 8192"):
                other = make_batch(shape, rows, block_size=block_size, contiguous=contiguous)
                yield measure(line.copy(), other, default, contiguous=contiguous), other
                if stream is not None and streams(shape.head_dim, group, block_size):
                    staying = line | {"kernel": "stream decode"}
                    yield measure(staying, other, many, contiguous=contiguous, stream=stream), other
                del other


def bench_rows() -> Iterator[tuple[Line, Batch]]:
    """Decode by both kernels over rows and contexts, for the table of which is faster on a card."""
    kernels = load_hopper_kernels("cuda")
    stream = None if kernels is None else StreamDecode(kernels)
    many = decode_config(LLAMA_8B.head_dim, 2, MANY_ROWS + 1)
    for context, rows in product((1024, 8192), (1, 8, 32, 64, 96, 128, 160, 192, 224, 256)):
        batch = make_batch(LLAMA_8B, [(context - 1, 1)] * rows)
        line: Line = {"shape": LLAMA_8B.name, "case": f"{rows} x {context}"}
        yield measure(line | {"kernel": "decode"}, batch, decode_config(LLAMA_8B.head_dim, 2, rows)), batch
        if stream is not None:
            yield measure(line | {"kernel": "stream decode"}, batch, many, stream=stream), batch
        del batch


def bench_figure18() -> Iterator[tuple[Line, Batch]]:
    """Decode with OPT-13B's heads through a block table and without one, over PagedAttention's cases."""
    for case, rows in FIGURE_18_CASES.items():
        for contiguous in (False, True):
            batch = make_batch(OPT_13B, rows, contiguous=contiguous)
            line: Line = {"kernel": "decode", "shape": OPT_13B.name, "case": case}
            yield measure(line, batch, decode_config(OPT_13B.head_dim, 2, len(rows)), contiguous=contiguous), batch
            del batch


def bench_prefill(tune: Callable[[], bool]) -> Iterator[tuple[Line, Batch]]:
    """Paged prefill over cases, and PyTorch's own kernels where there is no cached prefix."""
    for (case, rows), shape in product(PREFILL_CASES.items(), (LLAMA_8B, QWEN3_06B)):
        default = prefill_config(shape.head_dim, 2, shape.num_heads // shape.num_kv_heads)
        line: Line = {"kernel": "prefill", "shape": shape.name, "case": case}
        batch = make_batch(shape, rows)
        for config in dict.fromkeys([default, *PREFILL_TILES]):
            if config == default or tune():
                yield measure(line.copy(), batch, config), batch
        for block_size, contiguous in POOLS:
            if block_size > 1:
                other = make_batch(shape, rows, block_size=block_size, contiguous=contiguous)
                yield measure(line.copy(), other, default, contiguous=contiguous), other
                del other
        if not batch.starts.any():
            for handed_over in (True, False):
                name = "dense" if handed_over else "dense, read back"
                yield measure_dense(line | {"kernel": name}, batch, handed_over=handed_over), batch
            for name, call in library_calls(shape, rows).items():
                yield measure_library(line | {"kernel": f"library {name}"}, call), batch
        del batch


def measure_dense(line: Line, batch: Batch, *, handed_over: bool) -> Line:
    """Check and time the engine's path through the library."""
    try:
        begin = perf_counter()
        dense = dense_call(batch, handed_over=handed_over)
        if dense is None:
            return line | {"failed": "the prompts are too short or of different lengths"}
        torch.cuda.synchronize()
        line["first_ms"] = round((perf_counter() - begin) * 1e3, 2)
        line["error"] = float(f"{relative_error(batch, 0, dense[1], batch.shape.head_dim**-0.5):.2e}")
        line["us"] = round(time_launches([dense[0]], min_launches=4), 2)
    except (RuntimeError, KvarenaError) as failure:
        line["failed"] = _first_line(failure)
    return line


def measure_library(line: Line, call: Callable[[], object]) -> Line:
    """Time one of the library's kernels, and the host's part of its first and a later call."""
    try:
        for name in ("first_ms", "host_ms"):
            begin = perf_counter()
            call()
            line[name] = round((perf_counter() - begin) * 1e3, 2)
            torch.cuda.synchronize()
        line["us"] = round(time_launches([call], min_launches=4), 2)
    except (RuntimeError, TypeError, ValueError, AttributeError) as failure:
        line["failed"] = _first_line(failure)
    return line


def _first_line(failure: Exception) -> str:
    return (str(failure) or type(failure).__name__).splitlines()[0][:200]


def main(argv: Sequence[str]) -> int:
    """Run the chosen sections."""
    parser = tool_parser(__name__, __doc__)
    parser.add_argument(
        "--only", default="decode,prefill,fused", help="sections, separated by commas; also rows, chunks, figure18"
    )
    parser.add_argument("--tune", action="store_true", help="measure other tile shapes and splits too")
    parser.add_argument("--seconds", type=float, default=250.0, help="after so long `--tune` tries no more variants")
    args = parser.parse_args(argv)
    deadline = perf_counter() + args.seconds

    def tune() -> bool:
        return args.tune and perf_counter() < deadline

    require_cuda()
    copy, matmul = copy_bandwidth(), matmul_flops()
    ceilings = {"copy_tbps": round(copy / 1e12, 3), "matmul_tflops": round(matmul / 1e12, 1)}
    print(json.dumps({"device": torch.cuda.get_device_name(), "torch": torch.__version__} | ceilings), flush=True)
    best: dict[str, Line] = {}

    def report(line: Line, num_bytes: int, num_flops: int = 0) -> None:
        if "us" in line:
            seconds = line["us"] * 1e-6
            line |= {
                "tbps": round(num_bytes / seconds / 1e12, 3),
                "share_of_copy": round(num_bytes / seconds / copy, 3),
            }
            if num_flops:
                rate = num_flops / seconds
                line |= {"tflops": round(rate / 1e12, 1), "share_of_matmul": round(rate / matmul, 3)}
            key = f"{line['kernel']} {line['shape']} {line['case']}"
            if line.get("block_size", 16) != 16 or line.get("contiguous"):
                key += " contiguous" if line["contiguous"] else f" blocks of {line['block_size']}"
            if key not in best or line["us"] < best[key]["us"]:
                best[key] = line
        print(json.dumps(line), flush=True)

    sections = args.only.split(",")
    if "decode" in sections:
        for line, batch in bench_decode(tune):
            report(line, batch.num_bytes)
    if "rows" in sections:
        for line, batch in bench_rows():
            report(line, batch.num_bytes)
    if "figure18" in sections:
        for line, batch in bench_figure18():
            report(line, batch.num_bytes)
    if "prefill" in sections:
        for line, batch in bench_prefill(tune):
            report(line, batch.num_bytes, batch.num_flops)
    if "chunks" in sections:
        for line, batch in bench_chunks(tune):
            report(line, batch.num_bytes, batch.num_flops)
    if "fused" in sections:
        for line in bench_fused():
            report(line, line.pop("bytes"))
    keys = ("us", "tbps", "share_of_copy", "tflops", "share_of_matmul", "config", "error")
    print(json.dumps({name: {k: line[k] for k in keys if k in line} for name, line in best.items()}))
    return 0
