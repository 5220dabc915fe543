"""The Triton kernels on a GPU, against copied bytes and a large matrix product, as JSON lines.

    python -m experiments.bench_kernels --only decode,prefill,fused --tune

Every line has `us` (median of graph replays over memory several times the L2 cache), `tbps` and `share_of_copy`
(bytes that must move, over time, over what a copy moves) or `tflops` and `share_of_matmul`, and for attention
`error` (relative, against float64). `--tune` measures other tile shapes and splits beside the default ones. The last
line of stdout is a JSON object with the best of each case.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from engine.errors import KvarenaError
from engine.kernels.config import DecodeConfig, PrefillConfig, decode_config, prefill_config
from engine.kernels.decode import DecodeScratch, decode_attention
from engine.kernels.plan import Shape, plan_step
from engine.kernels.prefill import prefill_attention
from experiments.attention_cases import LLAMA_8B, QWEN3_06B, AttentionShape, Batch, make_batch, relative_error
from experiments.fused_cases import bench_fused
from experiments.gpu_timing import copy_bandwidth, matmul_flops, require_cuda, time_launches

Line = dict[str, Any]

_RANDOM = np.random.default_rng(0)
# (context before the step, new tokens) of each request.
DECODE_CASES: dict[str, list[tuple[int, int]]] = {
    "256 x 1024": [(1023, 1)] * 256,
    "32 x 1024": [(1023, 1)] * 32,
    "1 x 8192": [(8191, 1)],
    "1 x 1024": [(1023, 1)],
    "256 x 100..2000": [(int(n), 1) for n in _RANDOM.integers(100, 2000, 256)],
    "64 x 600, 1 x 32768": [(599, 1)] * 63 + [(32767, 1)],
}
PREFILL_CASES: dict[str, list[tuple[int, int]]] = {
    "16 x 4096": [(0, 4096)] * 16,
    "16 x 562": [(0, 562)] * 16,
    "2048 after 6144": [(6144, 2048)],
    "4 x 512 after 1536": [(1536, 512)] * 4,
}
DECODE_TILES = [(64, 4, 3), (64, 4, 5), (64, 4, 7), (32, 4, 5), (32, 4, 7), (128, 4, 3), (128, 8, 3), (128, 8, 5)]
PREFILL_TILES = [(128, 64, 8, 3), (128, 64, 8, 5), (128, 128, 8, 2), (128, 128, 8, 3), (64, 64, 4, 3), (64, 128, 4, 2)]


def decode_launches(
    batch: Batch, config: DecodeConfig, *, contiguous: bool = False
) -> tuple[list[Callable[[], None]], torch.Tensor]:
    """One launch per layer of the pool, and the output that they share."""
    shape = batch.shape
    programs = config.programs_per_sm * torch.cuda.get_device_properties(batch.q.device).multi_processor_count
    plan = Shape(config, 1, max(1, programs // shape.num_kv_heads))
    words, capacity = plan_step(batch.query_start_loc, batch.seq_lens, plan)
    items = torch.from_numpy(words).cuda()
    scratch = DecodeScratch(
        capacity.decode, len(batch.seq_lens), shape.num_heads, shape.num_kv_heads, shape.head_dim, batch.q.device
    )
    loc, lens = torch.from_numpy(batch.query_start_loc).cuda(), torch.from_numpy(batch.seq_lens.astype(np.int32)).cuda()
    out = torch.full_like(batch.q, torch.nan)

    def launch(layer: int) -> None:
        decode_attention(
            batch.q,
            batch.keys[layer],
            batch.values[layer],
            out,
            items=items,
            num_items=capacity.decode,
            query_start_loc=loc,
            seq_lens=lens,
            block_table=batch.block_table,
            block_size=batch.block_size,
            scratch=scratch,
            scale=shape.head_dim**-0.5,
            contiguous=contiguous,
            config=config,
        )

    return [partial(launch, layer) for layer in range(len(batch.keys))], out


def prefill_launches(
    batch: Batch, config: PrefillConfig, *, contiguous: bool = False
) -> tuple[list[Callable[[], None]], torch.Tensor]:
    """One launch per layer of the pool, and the output that they share."""
    shape = batch.shape
    queries = config.rows // (shape.num_heads // shape.num_kv_heads)
    plan = Shape(decode_config(shape.head_dim, 2), queries, 1)
    words, capacity = plan_step(batch.query_start_loc, batch.seq_lens, plan)
    items = torch.from_numpy(words[1:].copy()).cuda()
    loc, lens = torch.from_numpy(batch.query_start_loc).cuda(), torch.from_numpy(batch.seq_lens.astype(np.int32)).cuda()
    out = torch.full_like(batch.q, torch.nan)

    def launch(layer: int) -> None:
        prefill_attention(
            batch.q,
            batch.keys[layer],
            batch.values[layer],
            out,
            items=items,
            num_items=capacity.prefill,
            query_start_loc=loc,
            seq_lens=lens,
            block_table=batch.block_table,
            block_size=batch.block_size,
            scale=shape.head_dim**-0.5,
            contiguous=contiguous,
            config=config,
        )

    return [partial(launch, layer) for layer in range(len(batch.keys))], out


def measure(line: Line, batch: Batch, config: DecodeConfig | PrefillConfig, *, contiguous: bool = False) -> Line:
    """Check and time one variant; a variant that the device cannot run says so in its line."""
    line |= {"block_size": batch.block_size, "contiguous": contiguous, "config": [*config]}
    try:
        if isinstance(config, DecodeConfig):
            launches, out = decode_launches(batch, config, contiguous=contiguous)
        else:
            launches, out = prefill_launches(batch, config, contiguous=contiguous)
        launches[0]()
        line["error"] = float(f"{relative_error(batch, 0, out, batch.shape.head_dim**-0.5):.2e}")
        line["us"] = round(time_launches(launches), 2)
    except (RuntimeError, KvarenaError) as failure:
        line["failed"] = str(failure).splitlines()[0][:200]
    return line


def bench_decode(tune: bool) -> Iterator[tuple[Line, Batch]]:
    """Paged decode over cases, block sizes, the contiguous switch, and with `tune` tiles and splits."""
    for shape, (case, rows) in product((LLAMA_8B, QWEN3_06B), DECODE_CASES.items()):
        default = decode_config(shape.head_dim, 2)
        batch = make_batch(shape, rows)
        variants = [default]
        if tune:
            variants += [DecodeConfig(t, w, s, 4, max(256, t)) for t, w, s in DECODE_TILES]
            variants += [default._replace(programs_per_sm=n) for n in (2, 3, 6, 8)]
            variants += [default._replace(min_chunk=n) for n in (128, 512)]
        for config in dict.fromkeys(variants):
            yield measure({"kernel": "decode", "shape": shape.name, "case": case}, batch, config), batch
        for block_size, contiguous in ((1, False), (64, False), (256, False), (16, True)):
            if case not in ("256 x 1024", "32 x 1024"):
                continue
            other = make_batch(shape, rows, block_size=block_size, contiguous=contiguous)
            line = {"kernel": "decode", "shape": shape.name, "case": case}
            yield measure(line, other, default, contiguous=contiguous), other
            del other
        del batch


def bench_prefill(tune: bool) -> Iterator[tuple[Line, Batch]]:
    """Paged prefill over cases, and PyTorch's own kernels where there is no cached prefix."""
    for shape, (case, rows) in product((LLAMA_8B, QWEN3_06B), PREFILL_CASES.items()):
        default = prefill_config(shape.head_dim, 2, shape.num_heads // shape.num_kv_heads)
        batch = make_batch(shape, rows)
        variants = [default, *(PrefillConfig(*tile) for tile in PREFILL_TILES if tune)]
        for config in dict.fromkeys(variants):
            yield measure({"kernel": "prefill", "shape": shape.name, "case": case}, batch, config), batch
        other = make_batch(shape, rows, contiguous=True)
        line: Line = {"kernel": "prefill", "shape": shape.name, "case": case}
        yield measure(line, other, default, contiguous=True), other
        del other
        if not batch.starts.any():
            for name, call in library_calls(shape, rows).items():
                line = {"kernel": f"library {name}", "shape": shape.name, "case": case}
                try:
                    line["us"] = round(time_launches([call], min_launches=4), 2)
                except (RuntimeError, TypeError, ValueError, AttributeError) as failure:
                    line["failed"] = (str(failure) or type(failure).__name__).splitlines()[0][:200]
                yield line, batch
        del batch


def library_calls(shape: AttentionShape, rows: list[tuple[int, int]]) -> dict[str, Callable[[], object]]:
    """PyTorch's attention kernels on fresh prompts of equal length, without a pool."""
    count, length = len(rows), rows[0][1]
    scale = shape.head_dim**-0.5
    total = count * length
    q = torch.randn(total, shape.num_heads, shape.head_dim, dtype=torch.bfloat16, device="cuda")
    k, v = torch.randn(2, total, shape.num_kv_heads, shape.head_dim, dtype=torch.bfloat16, device="cuda").unbind()
    loc = torch.arange(0, total + 1, length, dtype=torch.int32, device="cuda")
    group = shape.num_heads // shape.num_kv_heads
    wide_k, wide_v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)

    def dense(backend: SDPBackend, k: torch.Tensor, v: torch.Tensor) -> object:
        query, key, value = (x.view(count, length, -1, shape.head_dim).transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(backend):
            gqa = k.shape[1] != q.shape[1]
            return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=gqa)

    def flash(k: torch.Tensor, v: torch.Tensor) -> object:
        return torch.ops.aten._flash_attention_forward(q, k, v, loc, loc, length, length, 0.0, True, False, scale=scale)

    def varlen(k: torch.Tensor, v: torch.Tensor) -> object:
        from torch.nn.attention.varlen import varlen_attn

        return varlen_attn(q, k, v, loc, loc, length, length, window_size=(-1, 0))

    return {
        "flash varlen": lambda: flash(k, v),
        "flash varlen, heads repeated": lambda: flash(wide_k, wide_v),
        "varlen_attn, heads repeated": lambda: varlen(wide_k, wide_v),
        "sdpa flash, dense": lambda: dense(SDPBackend.FLASH_ATTENTION, k, v),
        "sdpa cudnn, dense": lambda: dense(SDPBackend.CUDNN_ATTENTION, k, v),
        "sdpa cudnn, dense, heads repeated": lambda: dense(SDPBackend.CUDNN_ATTENTION, wide_k, wide_v),
    }


def main(argv: list[str] | None = None) -> None:
    """Run the chosen sections."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="decode,prefill,fused", help="sections, separated by commas")
    parser.add_argument("--tune", action="store_true", help="measure other tile shapes and splits too")
    args = parser.parse_args(argv)
    try:
        require_cuda()
    except KvarenaError as error:
        sys.exit(str(error))
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
            if key not in best or line["us"] < best[key]["us"]:
                best[key] = line
        print(json.dumps(line), flush=True)

    sections = args.only.split(",")
    if "decode" in sections:
        for line, batch in bench_decode(args.tune):
            report(line, batch.num_bytes)
    if "prefill" in sections:
        for line, batch in bench_prefill(args.tune):
            report(line, batch.num_bytes, batch.num_flops)
    if "fused" in sections:
        for line in bench_fused():
            report(line, line.pop("bytes"))
    keys = ("us", "tbps", "share_of_copy", "tflops", "share_of_matmul", "config", "error")
    print(json.dumps({name: {k: line[k] for k in keys if k in line} for name, line in best.items()}))


if __name__ == "__main__":
    main()
