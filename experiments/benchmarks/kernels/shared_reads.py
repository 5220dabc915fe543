"""Decodes whose requests begin with the same blocks: the host's plan, the kernel, whole steps and a run, as JSON lines.

    kvarena benchmark shared_reads --sections host               # anywhere: processor time of a step's plan
    kvarena benchmark shared_reads --sections kernel --tune      # GPU: beside the kernels that read each row's context
    kvarena benchmark shared_reads --sections steps,offline      # GPU: runner.share_reads=true beside false

Cases are (prefixes, tokens of each, rows of each, tokens of a row's own). `kernel` lines have `us` (median of graph
replays over memory several times the L2 cache), `distinct_tbps` (bytes of the distinct blocks over that time), `error`
(of three rows, relative, against float64), `same_bits`, and of all rows `bits`, which differ from launch to launch, and
`far`, which are further from the plain kernel's than two roundings: how many, the largest relative difference, and how
many have a NaN. `steps` and `offline` build their engines from the main job's config; what follows
the options is settings, as of run.py. `--shape tiny --sections steps` runs on a CPU without sharing: that it works.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch

from kvarena.engine.kernels.attention.config import MANY_ROWS, SharedConfig, decode_config, shared_config
from kvarena.engine.kernels.attention.shared_plan import SharedDecode
from kvarena.engine.kernels.attention.stream_decode import StreamDecode
from kvarena.engine.kernels.hopper import load_hopper_kernels
from kvarena.engine.pool.kv_pool import KVPool
from kvarena.engine.request import Request, SamplingParams, expand
from kvarena.engine.runner.block_tables import BlockTables
from kvarena.engine.sharing.step_reads import StepReads
from kvarena.experiments.benchmarks.kernels.attention_cases import (
    LLAMA_8B,
    ROTATED_BYTES,
    AttentionShape,
    Batch,
    relative_error,
    unequal_rows,
)
from kvarena.experiments.benchmarks.kernels.kernels import decode_launches
from kvarena.experiments.benchmarks.kernels.prefill_cases import attention_calls
from kvarena.experiments.gpu.engines import Engines, attempt, drive
from kvarena.experiments.gpu.timing import copy_bandwidth, matmul_flops, require_cuda, time_launches
from kvarena.experiments.tools import say_all, tool_parser

Line = dict[str, Any]
BLOCK_SIZE = 16
# The shape says 8,192 positions, and the cases are longer.
LONG = "++model.shape.max_position_embeddings=16384"
SECTIONS = ("host", "kernel", "steps", "offline")
# Launches whose results have to be the same bits, and how far two kernels' rows, rounded to bf16, may be apart.
REPEATS, ROUNDING = 8, 0.02


class Case(NamedTuple):
    """So many prefixes of so many tokens, each of so many rows, which go on with tokens of their own."""

    prefixes: int
    tokens: int
    rows: int
    own: int

    @property
    def num_rows(self) -> int:
        """All rows."""
        return self.prefixes * self.rows

    def __str__(self) -> str:
        return f"{self.prefixes} x {self.tokens} for {self.rows} rows, {self.own} own"


CASES = (
    Case(1, 8192, 256, 512), Case(8, 8192, 32, 512), Case(32, 2048, 8, 512), Case(16, 4096, 16, 256),
    Case(1, 8000, 256, 512), Case(4, 8192, 8, 512), Case(1, 8192, 8, 512), Case(256, 2048, 1, 512),
)  # fmt: skip
# Beside the default one: wider items, another depth, programs that take turns, and where single rows come in.
VARIANTS = (
    SharedConfig(64, 64, 64, 64, 4, 2, 2, lag=0.0), SharedConfig(64, 64, 64, 64, 4, 2, 2, lag=0.5),
    SharedConfig(64, 64, 64, 64, 4, 2, 2, lag=1.0), SharedConfig(64, 64, 64, 64, 4, 2, 2, queue=False),
    SharedConfig(64, 64, 64, 64, 4, 3, 1), SharedConfig(64, 64, 128, 128, 8, 2, 1),
    SharedConfig(64, 64, 128, 128, 8, 3, 1), SharedConfig(64, 128, 128, 128, 8, 2, 1),
    SharedConfig(64, 64, 128, 128, 8, 3, 1, queue=False), SharedConfig(64, 64, 128, 128, 8, 3, 1, lag=1.0),
    SharedConfig(64, 64, 64, 128, 8, 2, 1), SharedConfig(32, 64, 64, 64, 4, 3, 2),
)  # fmt: skip


def tables_of(case: Case) -> tuple[list[list[int]], np.ndarray]:
    """Block tables with scattered ids, and context lengths that differ by up to 31 tokens."""
    lens = np.array([case.tokens + case.own - row % 32 for row in range(case.num_rows)])
    own = -(-lens // BLOCK_SIZE) - case.tokens // BLOCK_SIZE
    ids = np.random.default_rng(0).permutation(case.prefixes * (case.tokens // BLOCK_SIZE) + int(own.sum())) + 1
    parts = np.split(ids, np.cumsum([case.tokens // BLOCK_SIZE] * case.prefixes + own.tolist()))
    starts, ends = parts[: case.prefixes], parts[case.prefixes :]
    return [[*starts[row % case.prefixes].tolist(), *ends[row].tolist()] for row in range(case.num_rows)], lens


def host(case: Case, num_steps: int = 400) -> Line:
    """Processor time of a step's order, plan and words; tables grow as they do, and every row decodes."""
    tables, lens = tables_of(case)
    kept = BlockTables(2 * case.num_rows + 1)
    decode = SharedDecode(pool_of(LLAMA_8B, "cpu"), LLAMA_8B.num_heads, shared_config(128, 2, 4), 132)
    reads = StepReads(kept.read, kept.note_changes(), BLOCK_SIZE, decode.most_rows)
    rows, fresh = np.arange(case.num_rows), 10**6
    for row, table in enumerate(tables):
        kept.update(row, table)
    begin = time.process_time()
    reads(rows, lens)
    first, seconds = time.process_time() - begin, []
    for _ in range(num_steps):
        lens = lens + 1
        for row in np.flatnonzero(lens > BLOCK_SIZE * np.array([len(table) for table in tables])).tolist():
            fresh += 1
            tables[row].append(fresh)
            kept.update(row, tables[row])
        begin = time.process_time()
        if (planned := reads(rows, lens)) is not None:
            decode.words(planned, case.num_rows)
        seconds.append(time.process_time() - begin)
    return {
        "host_us": round(statistics.mean(seconds) * 1e6, 1), "most_us": round(max(seconds) * 1e6, 1),
        "first_ms": round(first * 1e3, 2), "saved": round(reads.num_saved / int(lens.sum()), 3),
    }  # fmt: skip


def pool_of(shape: AttentionShape, device: str) -> KVPool:
    """A pool of which nothing is asked but its sizes."""
    return KVPool(
        num_blocks=1, block_size=BLOCK_SIZE, num_layers=1, num_kv_heads=shape.num_kv_heads, head_dim=shape.head_dim,
        dtype=torch.bfloat16, device=device,
    )  # fmt: skip


def shared_batch(case: Case, shape: AttentionShape, device: str = "cuda") -> tuple[Batch, list[list[int]]]:
    """Random keys, values and queries of decodes, and the block tables as lists."""
    tables, lens = tables_of(case)
    num_blocks = max(map(max, tables)) + 1
    table = torch.zeros(case.num_rows, max(map(len, tables)), dtype=torch.int32)
    for row, blocks in enumerate(tables):
        table[row, : len(blocks)] = torch.tensor(blocks)
    layer = num_blocks * BLOCK_SIZE * shape.num_kv_heads * shape.head_dim
    num_layers = max(2, min(32, ROTATED_BYTES // (4 * layer) + 1))
    made: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
    torch.manual_seed(0)
    pool = torch.randn(2, num_layers, num_blocks * BLOCK_SIZE, shape.num_kv_heads, shape.head_dim, **made)
    q = torch.randn(case.num_rows, shape.num_heads, shape.head_dim, **made)
    ones = np.ones(case.num_rows, dtype=np.int64)
    return Batch(shape, lens - 1, ones, q, pool[0], pool[1], table.to(device), BLOCK_SIZE), tables


def kernels(case: Case, tune: Callable[[], bool], copy: float) -> Iterator[Line]:
    """One layer's decode attention, by the kernels that read each row's context and by the one that shares."""
    shape = LLAMA_8B
    batch, tables = shared_batch(case, shape)
    group, scale = shape.num_heads // shape.num_kv_heads, shape.head_dim**-0.5
    line: Line = {"section": "kernel", "shape": shape.name, "case": str(case)}
    found = load_hopper_kernels("cuda")
    ways = {"triton": None} | ({} if found is None else {"cuda": StreamDecode(found)})
    plain: torch.Tensor | None = None
    for name, stream in ways.items():
        rows = case.num_rows if stream is None else MANY_ROWS + 1
        launches, out = decode_launches(batch, decode_config(shape.head_dim, 2, rows), stream=stream)
        first, checks = repeated(launches, out)
        plain = first if plain is None else plain
        error = relative_error(batch, 0, first, scale)
        yield line | {"kernel": name, "error": float(f"{error:.2e}")} | checks
    default = shared_config(shape.head_dim, 2, group)
    for config in dict.fromkeys([default, *VARIANTS]):
        if config == default or tune():
            one = partial(shared_line, batch, tables, config, copy, plain)
            yield line | attempt("kernel", one)


def repeated(launches: Sequence[Callable[[], None]], out: torch.Tensor) -> tuple[torch.Tensor, Line]:
    """The first layer's result, its time, and whether it is the same bits every time.

    Between its launches those of the other layers leave other sums behind; the last result is that of a graph, whose
    launches begin before the ones before them have ended.
    """
    launches[0]()
    first, results = out.clone(), []
    for _ in range(REPEATS):
        for launch in launches[1:]:
            launch()
        out.fill_(torch.nan)
        launches[0]()
        results.append(out.clone())
    us = time_launches([*launches[1:], launches[0]])
    bits = unequal_rows([*results, out], first)
    return first, {"us": round(us, 2), "same_bits": not bits["rows"], "bits": bits}


def shared_line(
    batch: Batch,
    tables: list[list[int]],
    config: SharedConfig,
    copy: float,
    plain: torch.Tensor | None = None,
    num_multiprocessors: int | None = None,
) -> Line:
    """Check and time one configuration, beside the first layer's result by the `plain` kernel."""
    shape, device = batch.shape, batch.q.device
    if num_multiprocessors is None:
        num_multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    decode = SharedDecode(pool_of(shape, str(device)), shape.num_heads, config, num_multiprocessors)
    reads = StepReads(tables, dict.fromkeys(range(len(tables)), 0), BLOCK_SIZE, decode.most_rows)
    planned = reads(np.arange(len(tables)), batch.seq_lens)
    label: Line = {"kernel": "shared", "config": [*config]}
    if planned is None:
        return label | {"kernel": "none is shared"}
    plan = decode.plan(planned, len(tables))
    calls, out = attention_calls(batch, contiguous=False)
    launches = [lambda call=call: decode(call, plan) for call in calls]
    first, checks = repeated(launches, out)
    error, us = relative_error(batch, 0, first, shape.head_dim**-0.5), checks["us"]
    if plain is not None:
        checks["far"] = unequal_rows([first], plain, ROUNDING)
    distinct = int(batch.seq_lens.sum()) - planned.num_saved
    num_bytes = 4 * distinct * shape.num_kv_heads * shape.head_dim
    return label | checks | {
        "error": float(f"{error:.2e}"),
        "items": len(planned.first), "parts": int(planned.parts.sum()), "saved_tokens": planned.num_saved,
        "distinct_tbps": round(num_bytes / us / 1e6, 3), "share_of_copy": round(num_bytes / us * 1e6 / copy, 3),
    }  # fmt: skip


def requests_of(case: Case, max_tokens: int, vocab_size: int, *, samples: bool = False) -> list[Request]:
    """A case's requests: prompts with common beginnings, or `samples` of one prompt each, without tokens of their own.

    `case.own` counts half of the outputs, so that it is the mean while they decode.
    """
    rng = np.random.default_rng(0)
    params = SamplingParams(temperature=0.6, max_tokens=max_tokens, ignore_eos=True, n=case.rows if samples else 1)
    starts = [rng.integers(0, vocab_size, case.tokens).tolist() for _ in range(case.prefixes)]
    if samples:
        return [req for i, start in enumerate(starts) for req in expand(Request(f"r{i}", start, params))]
    own = max(1, case.own - max_tokens // 2)
    tails = rng.integers(0, vocab_size, (case.num_rows, own)).tolist()
    return [Request(f"r{row}", starts[row % case.prefixes] + tails[row], params) for row in range(case.num_rows)]


def steps(engines: Engines, case: Case, lever: str, *, samples: bool = False, max_tokens: int = 97) -> Line:
    """Milliseconds of the steps in which all rows decode."""
    limits = f"scheduler.max_num_seqs={case.num_rows}", lever
    vocab_size = engines.load().spec.vocab_size
    waves = []
    for _ in range(2):  # the first compiles, and captures
        parts = engines.build("allocator=paged_prefix", *limits)
        _, found = drive(parts.engine, requests_of(case, max_tokens, vocab_size, samples=samples))
        waves.append([step for step in found if step.num_scheduled == step.num_new_tokens == case.num_rows])
    decodes = waves[-1]
    gaps = [b.end_time - a.end_time for a, b in pairwise(decodes)]
    if not gaps:
        return {"case": str(case), "lever": lever, "failed": "no two steps in which all decode"}
    host_ms = statistics.median(step.launch_time - step.start_time for step in decodes) * 1e3
    return {
        "case": str(case) + (", samples" if samples else ""), "lever": lever, "num_steps": len(gaps),
        "ms": round(statistics.mean(gaps) * 1e3, 3), "median_ms": round(statistics.median(gaps) * 1e3, 3),
        "schedule_ms": round(host_ms, 4),
    }  # fmt: skip


def offline(engines: Engines, lever: str, case: Case, max_tokens: int) -> Line:
    """Output tokens per second of a case's requests, all at once, 256 of them side by side."""
    vocab_size, rates = engines.load().spec.vocab_size, []
    for _ in range(2):  # as above
        parts = engines.build("allocator=paged_prefix", "scheduler.max_num_seqs=256", lever)
        requests = requests_of(case._replace(own=case.own + max_tokens // 2), max_tokens, vocab_size)
        seconds, _ = drive(parts.engine, requests)
        rates.append(sum(len(req.output_token_ids) for req in requests) / seconds)
    return {"case": str(case), "lever": lever, "output_tokens_per_s": round(rates[-1], 1)}


def main(argv: Sequence[str]) -> int:
    """Run the chosen sections."""
    parser = tool_parser(__name__, __doc__)
    parser.add_argument("--sections", default="host", help=f"some of {', '.join(SECTIONS)}, separated by commas")
    parser.add_argument("--cases", default="", help="numbers of the cases, from 0, separated by commas; default: all")
    parser.add_argument("--shape", default="llama-3.1-8b", help="of steps and offline")
    parser.add_argument("--tune", action="store_true", help="time other configurations too")
    parser.add_argument("--seconds", type=float, default=90.0, help="after so long `--tune` tries no more of them")
    parser.add_argument("overrides", nargs="*", help="settings of the engines, as of run.py")
    args = parser.parse_args(argv)
    wanted, deadline = args.sections.split(","), time.perf_counter() + args.seconds
    if unknown := set(wanted) - set(SECTIONS):
        parser.error(f"--sections: no section {sorted(unknown)[0]!r}; there are {', '.join(SECTIONS)}")
    cases = [CASES[int(number)] for number in args.cases.split(",")] if args.cases else [*CASES]
    is_small = args.shape in ("tiny", "demo")

    def lines() -> Iterator[Line]:
        if "host" in wanted:
            for case in cases:
                yield attempt("host", lambda case=case: {"case": str(case)} | host(case))  # type: ignore[misc]
        if "kernel" in wanted:
            require_cuda()
            copy = copy_bandwidth()
            yield {"device": torch.cuda.get_device_name(), "copy_tbps": round(copy / 1e12, 3),
                   "matmul_tflops": round(matmul_flops() / 1e12, 1)}  # fmt: skip
            for case in cases:
                yield from kernels(case, lambda: args.tune and time.perf_counter() < deadline, copy)
        if {"steps", "offline"} & set(wanted):
            yield from engine_lines()

    def engine_lines() -> Iterator[Line]:
        if not is_small:
            require_cuda()
        sizes = () if is_small else ("kv_cache.num_slots=327680", "engine.max_model_len=10240", LONG)
        engines = Engines(args.shape, *sizes, *args.overrides)
        small, max_tokens = [Case(2, 48, 3, 40)], 9
        levers = [f"runner.share_reads={word}" for word in (("false",) if is_small else ("true", "false"))]
        if "steps" in wanted:
            shown = small if is_small else cases
            timed = [(case, False) for case in shown] + [(shown[-1]._replace(rows=8, prefixes=32), True)] * (
                not is_small
            )
            for (case, samples), lever in ((one, lever) for one in timed for lever in levers):
                options: Line = {"samples": samples} | ({"max_tokens": max_tokens} if is_small else {})
                yield attempt("steps", lambda: steps(engines, case, lever, **options))  # noqa: B023 - called at once
        if "offline" in wanted:
            case, count = (small[0], max_tokens) if is_small else (Case(16, 4096, 32, 128), 256)
            for lever in levers:
                yield attempt("offline", lambda: offline(engines, lever, case, count))  # noqa: B023 - called at once

    return say_all(lines(), None, "error")
