"""What it costs to share a model: sums over the ranks by size and way, and the host's part of a decode step.

    kvarena benchmark parallel --shape llama-3.1-8b parallel.tensor_parallel_size=2

Prints JSON lines. Section `sums`: `all_reduce` has microseconds on the slowest rank, in a CUDA graph, by bytes and way;
`norm` the same with residual addition and norm behind it; `chosen` is the way that the engine takes, `left_out` says
why another one cannot be had. Section `host`: wall time of a decode step less what the device works, at 1 and 256 rows,
with the ranks and with one device, and the difference; `before_ms` of it are before the device begins (a step's end and
the next one's plan), and `launch_ms` beside it what the host takes to launch. On a CPU the sums are gloo's and there is
nothing else. Decode steps and throughput over ranks are `kvarena benchmark engine`'s, with
`parallel.tensor_parallel_size=2` behind its options.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kvarena.engine.errors import ConfigError
from kvarena.engine.runner.torch_runner import TorchRunner
from kvarena.experiments.benchmarks.first_token import NUM_SLOTS
from kvarena.experiments.building.ranks import time_all_reduce
from kvarena.experiments.gpu.engines import PREFILLED, Engines, attempt, runner_of
from kvarena.experiments.gpu.floors import EXPERT_SHAPES, LARGE_SHAPES, SHAPES, fixed_batch
from kvarena.experiments.settings.compose import load_run
from kvarena.experiments.tools import say_all, tool_parser

Line = dict[str, Any]
ROWS = (1, 8, 32, 64, 256, 2048)
BATCHES = (1, 256)
SECTIONS = ("sums", "host")
CONTEXT, NUM_STEPS = 1024, 64
RANKS = "parallel.tensor_parallel_size=2"


def sums(runner: TorchRunner, peers: Any, num_rows: int, *, with_norm: bool) -> Line:
    """Every way's microseconds for so many rows."""
    reducer: Any = runner.reducer  # type: ignore[attr-defined]
    module: Any = runner.model.module
    size: int = module.config.hidden_size
    x = torch.zeros(num_rows, size, dtype=runner.model.spec.dtype, device=runner.pool.device)
    found: Line = {"rows": num_rows, "bytes": x.numel() * x.element_size()}
    for way in reducer.ways:
        if hasattr(reducer, "takes") and not reducer.takes(x, way):
            continue
        peers.tell("time_all_reduce", way=way, num_rows=num_rows, with_norm=with_norm)
        found[way] = round(time_all_reduce(runner, way, num_rows, with_norm=with_norm), 2)
    if hasattr(reducer, "way_of"):
        found |= {"chosen": reducer.way_of(x), "left_out": reducer.left_out}
    return found


def host_line(engines: Engines, batch: int) -> Line:
    """Wall time of a decode step less its device time, in ms: the median of some steps without overlap."""
    parts = engines.build(f"scheduler.max_num_seqs={batch}", "engine.overlap=false", PREFILLED)
    runner, now = runner_of(parts), parts.clock.now
    compute, spans, times = runner._compute, [], []

    def timed(*args: Any) -> Any:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        called = now()
        begin.record()
        found = compute(*args)
        end.record()
        spans.append((begin, end, called, now()))
        return found

    runner.__dict__["_compute"] = timed
    try:
        for req in fixed_batch(batch, CONTEXT, NUM_STEPS + 2, vocab_size=parts.spec.vocab_size):
            parts.engine.add(req)
        ended = None
        while parts.engine.has_work:
            step = parts.engine.step()
            if step is None or step.plan.num_new_tokens != batch:
                ended = None
                continue
            if ended is not None:
                begin, end, called, returned = spans[-1]
                on_host = (step.end_time - ended) * 1e3 - begin.elapsed_time(end)
                times.append((on_host, (called - ended) * 1e3, (returned - called) * 1e3))
            ended = step.end_time
    finally:
        del runner.__dict__["_compute"]
    medians = [round(statistics.median(column), 4) for column in zip(*times, strict=True)]
    return {"rows": batch} | dict(zip(("ms", "before_ms", "launch_ms"), medians, strict=True))


def lines(args: Any) -> Iterator[Line]:
    """All lines, one after the other."""
    ranks = [RANKS, *args.overrides]
    layout = load_run(ranks).parallel
    if layout.pipeline_parallel_size > 1 or layout.tensor_parallel_size == 1:
        raise ConfigError("kvarena benchmark parallel measures ranks of a layer: parallel.tensor_parallel_size=2")
    label = {"shape": args.shape, "ranks": layout.tensor_parallel_size}
    slots = f"kv_cache.num_slots={4096 if args.shape == 'tiny' else NUM_SLOTS}"
    engines = Engines(args.shape, slots, "runner.fusions=true", *ranks)
    parts = engines.build("scheduler.max_num_seqs=256")
    runner, peers = runner_of(parts), None if parts.model is None else parts.model.peers
    on_gpu = runner.pool.device.type == "cuda"
    for name, with_norm in (("all_reduce", False), ("norm", True))[: (1 + on_gpu) * ("sums" in args.sections)]:
        for rows in args.rows:
            yield attempt(name, partial(sums, runner, peers, rows, with_norm=with_norm), **label)
    del runner, peers, parts
    if not on_gpu or "host" not in args.sections:
        engines.shared.clear()
        return
    shared = [attempt("host", partial(host_line, engines, batch), **label) for batch in BATCHES]
    engines.shared.clear()
    alone = Engines(args.shape, slots, *args.overrides, "parallel.tensor_parallel_size=1")
    for line, batch in zip(shared, BATCHES, strict=True):
        one = attempt("host", partial(host_line, alone, batch))
        found = {f"one_{key}": one.get(key) for key in ("ms", "before_ms", "launch_ms")}
        found |= {"error": line.get("error") or one.get("error")}
        if "ms" in line and "ms" in one:
            found["more_ms"] = round(line["ms"] - one["ms"], 4)
        yield line | {key: value for key, value in found.items() if value is not None}
    alone.shared.clear()


def main(argv: Sequence[str]) -> int:
    """The command line."""
    parser = tool_parser(__name__, __doc__)
    parser.add_argument(
        "--shape", default="llama-3.1-8b", choices=(*SHAPES, *LARGE_SHAPES, *EXPERT_SHAPES, "tiny"), help="of the model"
    )
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="some of them")
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS), help="of the sums")
    parser.add_argument("--out", type=Path, help="a file that gets every line, too")
    parser.add_argument("overrides", nargs="*", help="further settings of the engine, as of run.py")
    args = parser.parse_args(argv)
    return say_all(lines(args), args.out, "error")
