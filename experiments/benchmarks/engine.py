"""The engine on a GPU: throughput, decode steps, prefill, start-up, ablations, correctness. One JSON line per result.

    kvarena benchmark engine --shape llama-3.1-8b --sections decode,offline --out FILE
    kvarena benchmark engine --shape llama-3.1-8b --sections decode,offline,pool --batch 1 --batch 64 --quantization awq
    kvarena benchmark engine --shape qwen3-0.6b --sections decode --sampling plain --sampling top_k=20,top_p=0.95

Sections: `correct` (greedy tokens in float32 with every lever on and off), `logits` (bf16, against the modules),
`offline` (a: 256 requests, output tokens/s), `decode` (b: (T(161) - T(33)) / 128 at batch 1, 32, 256, at a mean
context of 1,024), `ablate` (the same with levers off), `prefill` (c: 16 x 4,096), `profile` (device time by kernel),
`pool` (weights, and the KV that the card has room for beside them), `startup` (e, in a process of its own).

Every line of a timed section has the card's rates as they were measured in the same call (`copy_tbps`,
`matmul_tflops`). `floor_ms` is what bytes and operations take at them, part by part: products and attention are kernels
of their own, of which none runs beside another (`floor_parts_ms`). A section that fails has `error` in its line, and
the exit code is 1. Engines are built from the main job's config, with the settings that follow the options
(`runner.gemm_table=gemm.json`).

With `--sampling` the sections `decode` and `profile` run once for each of them: `plain` (temperature 0.6 alone), or
fields of the requests' `SamplingParams`.

With `--quantization` every section but `correct` and `startup` runs twice: with plain weights, and with random ones of
4 bits in groups of 128, or of 8 bits, that are drawn on the device.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch

from kvarena.engine.checkpoints.packed_settings import DRAWN
from kvarena.engine.errors import EngineError, RequestError
from kvarena.engine.request import Request, SamplingParams
from kvarena.engine.runner.fused_runner import FusedRunner
from kvarena.experiments.benchmarks.engine_checks import check_logits, check_tokens
from kvarena.experiments.benchmarks.engine_profile import profile_steps
from kvarena.experiments.benchmarks.first_token import NUM_SLOTS
from kvarena.experiments.gpu.engines import ABLATIONS, PREFILLED, Engines, StepTimes, attempt, drive, runner_of
from kvarena.experiments.gpu.floors import (
    EXPERT_SHAPES,
    LARGE_SHAPES,
    SHAPES,
    Floor,
    Work,
    fixed_batch,
    floor_of,
    offline_workload,
    shape_of,
)
from kvarena.experiments.gpu.timing import copy_bandwidth, matmul_flops, require_cuda
from kvarena.experiments.tools import say_all, tool_parser

Line = dict[str, Any]
SECTIONS = ("correct", "logits", "decode", "ablate", "prefill", "offline", "profile", "pool", "startup")
BATCHES = (1, 32, 256)
PLAIN = "plain"
CONTEXT = 1024
FIRST, LAST = 33, 161
# The steps after token 33 and up to token 161 read that many tokens in the mean, with a prompt so long.
PROMPT = CONTEXT - (FIRST + LAST) // 2


class Ceilings:
    """Measured rates of the card, in bytes and operations per second."""

    def __init__(self) -> None:
        self.copy = copy_bandwidth()
        self.matmul = matmul_flops()

    @property
    def label(self) -> Line:
        """What each timed line says of them."""
        return {"copy_tbps": round(self.copy / 1e12, 3), "matmul_tflops": round(self.matmul / 1e12, 1)}

    def seconds(self, part: Work) -> float:
        """The least time of a part."""
        return max(part.moved / self.copy, part.flops / self.matmul)


def rates(parts: dict[str, Work], seconds: float, ceilings: Ceilings, num_ranks: int = 1) -> Line:
    """Achieved rates, and the floor: the sum over parts, each of which takes its bytes' or its operations' time."""
    shared = {name: Work(part.moved / num_ranks, part.flops / num_ranks) for name, part in parts.items()}
    floors = {name: ceilings.seconds(part) for name, part in shared.items()}
    floor = sum(floors.values())
    return {
        "tbps": round(sum(part.moved for part in shared.values()) / seconds / 1e12, 3),
        "tflops": round(sum(part.flops for part in shared.values()) / seconds / 1e12, 1),
        "floor_ms": round(floor * 1e3, 3),
        "floor_parts_ms": {name: round(one * 1e3, 3) for name, one in floors.items()},
        "share_of_floor": round(floor / seconds, 3),
    }


def _floor(engines: Engines) -> Floor:
    return floor_of(shape_of(engines.name), engines.quantization)


def sampling_of(text: str) -> tuple[str, dict[str, Any]]:
    """What `--sampling` says, and the fields of `SamplingParams` that it means.

    Raises:
        argparse.ArgumentTypeError: no such field, or a value that it cannot have.
    """
    try:
        pairs = [] if text == PLAIN else [one.split("=") for one in text.split(",")]
        fields: dict[str, Any] = {name: float(value) if "." in value else int(value) for name, value in pairs}
        SamplingParams(**fields)
    except (ValueError, TypeError, RequestError) as error:
        names = "top_p, top_k, min_p, temperature, repetition_penalty, logprobs"
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither {PLAIN} nor NAME=NUMBER,... of a request's sampling ({names}): {error}"
        ) from error
    return text, fields


def decode(
    engines: Engines,
    levers: Sequence[str],
    batch: int,
    ceilings: Ceilings,
    *,
    prefilled: bool,
    sampling: Mapping[str, Any] | None = None,
) -> Line:
    """(T(161) - T(33)) / 128 of a fixed batch."""

    def run(max_tokens: int, *, prefilled: bool) -> list[StepTimes]:
        parts = engines.build(f"scheduler.max_num_seqs={batch}", *levers, *((PREFILLED,) if prefilled else ()))
        requests = fixed_batch(batch, PROMPT, max_tokens, vocab_size=parts.spec.vocab_size, sampling=sampling)
        _, steps = drive(parts.engine, requests)
        # Only the steps in which all decode: the k-th of them gives everybody's token k + 1.
        return [step for step in steps if step.num_scheduled == step.num_new_tokens == batch][-(max_tokens - 1) :]

    run(4, prefilled=True)
    decodes = run(LAST, prefilled=prefilled)
    ends = [step.end_time for step in decodes]
    # ends[k] is when token k + 2 was there.
    step = (ends[LAST - 2] - ends[FIRST - 2]) / (LAST - FIRST)
    gaps = [b - a for a, b in zip(ends[FIRST - 2 :], ends[FIRST - 1 :], strict=False)]
    floor = _floor(engines)
    # Random weights route as they like: the floor has the experts that these steps did read.
    read = statistics.mean(one.num_experts_read for one in decodes[FIRST - 1 :])
    work = floor.decode(batch, CONTEXT, None if floor.experts is None else read)
    line = {"ms": round(step * 1e3, 4), "median_ms": round(statistics.median(gaps) * 1e3, 4)}
    line["longest_ms"] = round(max(gaps) * 1e3, 4)
    if floor.experts is not None:
        line |= {
            "experts_read": round(read / floor.experts.num_layers, 2),
            "experts_read_balanced": round(floor.experts.read(batch), 2),
        }
    return line | {"batch": batch, "context": CONTEXT, **rates(work, step, ceilings, engines.num_ranks)}


def offline(engines: Engines, levers: Sequence[str], num_requests: int, budget: int, *, chunked: bool) -> Line:
    """Workload (a)."""
    scheduler = "chunked" if chunked else "continuous"
    settings = (
        f"scheduler={scheduler}", "scheduler.max_num_seqs=256", f"scheduler.max_num_batched_tokens={budget}", *levers,
    )  # fmt: skip

    def run(requests: list[Request]) -> tuple[float, list[StepTimes]]:
        return drive(engines.build(*settings).engine, requests)

    runner = runner_of(engines.build(*settings))
    assert isinstance(runner, FusedRunner)
    start = time.perf_counter()
    runner.warm_up(256, budget)
    torch.cuda.synchronize()
    warm_up = time.perf_counter() - start

    # Prompts of the workload's lengths compile what the timed run needs.
    short = SamplingParams(temperature=0.6, max_tokens=3)
    run([Request(f"w{req.request_id}", req.prompt_token_ids, short) for req in offline_workload(64)])
    requests = offline_workload(num_requests)
    seconds, steps = run(requests)
    tokens = sum(len(req.output_token_ids) for req in requests)
    if any(len(req.output_token_ids) != req.sampling.max_tokens for req in requests):
        raise EngineError("a request of the offline workload ended before its length")
    mixed = [step for step in steps if step.num_new_tokens > step.num_scheduled]
    decodes = [b.end_time - a.end_time for a, b in pairwise(steps) if b.num_new_tokens == b.num_scheduled]
    return {
        "scheduler": scheduler, "budget": budget, "output_tokens": tokens,
        "wall": round(seconds, 3), "output_tokens_per_s": round(tokens / seconds, 1),
        "prefill_seconds": round(mixed[-1].end_time - steps[0].start_time, 3), "steps": len(steps),
        "prefill_steps": len(mixed), "decode_seconds": round(sum(decodes), 3),
        "longest_decode_ms": round(max(decodes) * 1e3, 2),
        "schedule_ms": round(statistics.median(step.launch_time - step.start_time for step in steps) * 1e3, 3),
        "warm_up_seconds": round(warm_up, 2),
    }  # fmt: skip


def prefill(engines: Engines, ceilings: Ceilings, num_prompts: int, length: int, budget: int) -> Line:
    """Workload (c)."""
    best = float("inf")
    for turn in range(3):
        parts = engines.build(f"scheduler.max_num_seqs={num_prompts}", f"scheduler.max_num_batched_tokens={budget}")
        requests = fixed_batch(num_prompts, length, 1, vocab_size=parts.spec.vocab_size, name=f"c{turn}-")
        seconds, _ = drive(parts.engine, requests)
        best = min(best, seconds) if turn else best  # the first compiles
    work = _floor(engines).prefill(num_prompts, length)
    line = {"tokens_per_s": round(num_prompts * length / best, 0), "ms": round(best * 1e3, 2), "budget": budget}
    return line | rates(work, best, ceilings, engines.num_ranks)


def pool(engines: Engines) -> Line:
    """What weights take, and what the card's share has left for keys and values beside them and the largest step."""
    engines.shared.drop_runner()
    weights = torch.cuda.memory_allocated()
    parts = engines.build("kv_cache.num_slots=null")
    facts = parts.pool_facts
    return {
        "gpu_memory_utilization": parts.config.gpu_memory_utilization, "weights_gb": round(weights / 1e9, 2),
        "pool_gb": round(facts["bytes"] / 1e9, 2), "slots": facts["num_slots"],
    }  # fmt: skip


def startup(args: argparse.Namespace) -> Line:
    """Seconds from a fresh process to its first token, with the kernel cache as the sections before left it."""
    command = [sys.executable, "-m", "kvarena", "benchmark", "first_token", "--shape", args.shape]
    command += args.overrides
    start = time.perf_counter()
    child = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    if child.returncode:
        raise RuntimeError(child.stderr[-600:])
    return {"to_exit": round(time.perf_counter() - start, 2), **json.loads(child.stdout.splitlines()[-1])}


def sections(args: argparse.Namespace) -> Iterator[Line]:
    """All lines, one after the other."""
    wanted = args.sections.split(",")
    if "correct" in wanted:
        yield attempt("correct", check_tokens)
    timed = [name for name in wanted if name not in ("correct", "startup")]
    if timed:
        ceilings = Ceilings()
        yield {"section": "ceilings", "copy_tbps": ceilings.copy / 1e12, "matmul_tflops": ceilings.matmul / 1e12}
        for method in (None,) if args.quantization is None else (None, args.quantization):
            yield from _timed(args, ceilings, timed, method)
    if "startup" in wanted:
        yield attempt("startup", lambda: startup(args), shape=args.shape)


def _timed(args: argparse.Namespace, ceilings: Ceilings, wanted: list[str], method: str | None) -> Iterator[Line]:
    """The sections of one model: with plain weights, or with random ones that `method` packed."""
    packed = () if method is None else (f"model.quantization={method}",)
    start = time.perf_counter()
    engines = Engines(args.shape, "engine.device=cuda", f"kv_cache.num_slots={args.slots}", *packed, *args.overrides)
    spec = engines.load().spec
    label = {"shape": engines.name, "weights": spec.quantization or str(spec.dtype).removeprefix("torch.")}
    yield {"section": "load", **label, "seconds": round(time.perf_counter() - start, 2)}
    yield from _sections_of(args, engines, ceilings, wanted, label)
    engines.shared.clear()


def _sections_of(
    args: argparse.Namespace, engines: Engines, ceilings: Ceilings, wanted: list[str], label: Line
) -> Iterator[Line]:
    batches = args.batch or BATCHES
    plain, label = label, label | ceilings.label
    samplings = dict(args.sampling or [sampling_of(PLAIN)])
    if "logits" in wanted:
        yield attempt("logits", lambda: check_logits(engines), **plain)
    if "decode" in wanted:
        for batch, (name, fields) in product(batches, samplings.items()):
            run = partial(decode, engines, (), batch, ceilings, prefilled=False, sampling=fields)
            yield attempt("decode", run, **label, sampling=name)
    if "ablate" in wanted:
        for name, batch in product(args.levers or ABLATIONS, batches):
            run = partial(decode, engines, ABLATIONS[name], batch, ceilings, prefilled=True)
            yield attempt("ablate", run, **label, levers=name)
    if "prefill" in wanted:
        for budget in (8192, 16384):
            yield attempt("prefill", partial(prefill, engines, ceilings, 16, 4096, budget), **label)
    if "offline" in wanted:
        for budget, name in product(args.budget or (8192,), args.levers or ("all",)):
            run = partial(offline, engines, ABLATIONS[name], args.requests, budget, chunked=args.chunked)
            yield attempt("offline", run, **label, levers=name)
    if "profile" in wanted:
        for batch, (name, fields) in product(batches, samplings.items()):
            run = partial(profile_steps, engines, batch, CONTEXT - 4, sampling=fields)
            yield attempt("profile", run, **label, batch=batch, sampling=name)
        yield attempt("profile", lambda: profile_steps(engines, 4, 4096, prefill=True), **label, batch="prefill")
    if "pool" in wanted:
        yield attempt("pool", lambda: pool(engines), **plain)


def main(argv: Sequence[str]) -> int:
    """The command line."""
    parser = tool_parser(__name__, __doc__)
    parser.add_argument(
        "--shape", default="llama-3.1-8b", choices=SHAPES + LARGE_SHAPES + EXPERT_SHAPES, help="of the model"
    )
    parser.add_argument("--sections", default=",".join(SECTIONS), help="some of them, separated by commas")
    parser.add_argument("--batch", type=int, action="append", help="of sections decode, ablate, profile; 1, 32 and 256")
    parser.add_argument(
        "--sampling", type=sampling_of, action="append", metavar="NAME=NUMBER,...",
        help="of sections decode and profile: top_p=0.9, say; plain (as without) is temperature 0.6 alone",
    )  # fmt: skip
    parser.add_argument("--quantization", choices=DRAWN, help="run all again with random weights that are packed so")
    parser.add_argument("--slots", type=int, default=NUM_SLOTS, help="of the KV pool")
    parser.add_argument("--requests", type=int, default=256, help="of the offline workload")
    parser.add_argument("--budget", type=int, action="append", help="tokens per step of the offline workload; 8192")
    parser.add_argument("--chunked", action="store_true", help="the offline workload under the chunked scheduler")
    parser.add_argument(
        "--levers", action="append", choices=sorted(ABLATIONS), help="of sections ablate (default: each) and offline"
    )
    parser.add_argument("--out", type=Path, help="a file that gets every line, too")
    parser.add_argument("overrides", nargs="*", help="further settings of the engine, as of run.py")
    args = parser.parse_args(argv)
    unknown = set(args.sections.split(",")) - set(SECTIONS)
    if unknown:
        parser.error(f"--sections: no section {sorted(unknown)[0]!r}; there are {', '.join(SECTIONS)}")
    require_cuda()
    return say_all(sections(args), args.out, "error")
