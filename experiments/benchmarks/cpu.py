"""This engine on a CPU: beside transformers' own generation, where a step's time goes, and how far off the floor it is.

    kvarena benchmark cpu                        # the main job: ours, ours on modules, generate, generate_batch
    kvarena benchmark cpu --shape qwen3-0.6b     # a real shape with random weights: decode steps and a long prompt

One list of requests, one process. The contestants take turns, round after round, so that a busy machine slows all of
them alike; a ratio is the median over rounds of the ratio within a round. Useful tokens are those that requests asked
for: what a padded batch computes beyond them does not count. Processor seconds are of all threads. Prints JSON lines.
"""

from __future__ import annotations

import json
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from kvarena.engine.core import Engine, StepOutput, run_to_completion
from kvarena.engine.errors import KvarenaError
from kvarena.engine.models.sizes import ModelSizes
from kvarena.engine.request import Request, SamplingParams
from kvarena.engine.runner.cpu_forward import CpuForward
from kvarena.experiments.building.build import build, build_engine
from kvarena.experiments.building.parts import sizes_of
from kvarena.experiments.building.shared import SharedParts
from kvarena.experiments.correctness.reference import generate_continuous, generate_static, load_reference
from kvarena.experiments.gpu.floors import model_of
from kvarena.experiments.settings.compose import load_run
from kvarena.experiments.tools import tool_parser

Tokens = list[list[int]]
WAYS = {"kvarena": "fused", "kvarena on modules": "modules"}
PARTS = {"decode": "attention", "merge": "attention", "prompt": "attention", "panel_product": "products"}  # by kernel
ROWS, PROMPT_TOKENS, DECODE_STEPS = (1, 8, 32), 2048, 12


def main(argv: Sequence[str]) -> int:
    """Run the contestants; print a line for each round, one for the ratios, and one for the split and the floor."""
    parser = tool_parser(__name__, __doc__)
    parser.add_argument("--num-requests", type=int, default=48, help="of the workload")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contestant")
    parser.add_argument("--batch-size", type=int, default=16, help="of the padded static batches")
    parser.add_argument("--max-output-len", type=int, default=256, help="longer outputs of the workload are clipped")
    parser.add_argument(
        "--shape", help="decode steps and a prompt of this shape in place of the contest; or tiny, demo"
    )
    parser.add_argument("--dtype", default="float32", help="of the shape's weights and pool")
    args = parser.parse_args(argv)
    torch.set_grad_enabled(False)
    rates = machine_rates()
    print(json.dumps({"threads": torch.get_num_threads()} | rates), flush=True)
    if args.shape is not None:
        return _shape(args.shape, args.dtype, args.rounds, rates)
    return _contest(args.num_requests, args.max_output_len, args.batch_size, args.rounds, rates)


def _contest(num_requests: int, max_output_len: int, batch_size: int, rounds: int, rates: dict[str, float]) -> int:
    overrides = [
        "workload=sharegpt", f"workload.num_requests={num_requests}", f"workload.max_output_len={max_output_len}",
    ]  # fmt: skip
    requests = list(build(load_run(overrides)).load.requests)
    useful = sum(req.sampling.max_tokens for req in requests)
    contestants = _contestants(overrides, batch_size)
    for run in contestants.values():  # warm up: lazy initialisation, thread pools
        run(requests[:2])

    walls: dict[str, list[float]] = {name: [] for name in contestants}
    used: dict[str, list[float]] = {name: [] for name in contestants}
    tokens: dict[str, Tokens] = {}
    for number in range(rounds):
        for name, run in contestants.items():
            start, before = time.perf_counter(), processor_seconds()
            tokens[name] = run(requests)
            walls[name].append(time.perf_counter() - start)
            used[name].append(processor_seconds() - before)
        line = {
            "tokens_per_second": {name: round(useful / values[-1], 1) for name, values in walls.items()},
            "processor_seconds": {name: round(values[-1], 2) for name, values in used.items()},
        }
        print(json.dumps({"round": number, "useful_tokens": useful} | line), flush=True)
    same = {name: sum(a == b for a, b in zip(tokens["kvarena"], other, strict=True)) for name, other in tokens.items()}
    line = {"ratio_to": _ratios(walls), "processor_seconds_ratio_to": _ratios(used)}
    print(json.dumps(line | {"requests_with_the_same_tokens": same, "num_requests": len(requests)}), flush=True)

    config = load_run(overrides)
    engine = build(config).parts.engine
    split = Split()
    split.watch(engine)
    start = time.perf_counter()
    outputs = run_to_completion(engine, fresh(requests))
    print(json.dumps(_split_line(split, outputs, time.perf_counter() - start, sizes_of(config), rates)), flush=True)
    return 0


def _ratios(seconds: dict[str, list[float]]) -> dict[str, float]:
    """How many times as many seconds the others take, by name."""
    ours = seconds["kvarena"]
    return {
        name: round(statistics.median(b / a for a, b in zip(ours, values, strict=True)), 2)
        for name, values in seconds.items()
        if name != "kvarena"
    }


def _split_line(
    split: Split, outputs: list[StepOutput], seconds: float, sizes: ModelSizes, rates: dict[str, float]
) -> dict[str, Any]:
    """Milliseconds a step by part, and what the floor of the same steps is."""
    floor = sum(floor_seconds(output, sizes, rates) for output in outputs)
    parts = {name: round(1e3 * value / len(outputs), 4) for name, value in split.seconds.items()}
    parts["the engine's loop"] = round(1e3 * (seconds - sum(split.seconds.values())) / len(outputs), 4)
    return {
        "steps": len(outputs), "ms_per_step": round(1e3 * seconds / len(outputs), 4), "split_ms": parts,
        "floor_ms_per_step": round(1e3 * floor / len(outputs), 4), "of_the_floor": round(floor / seconds, 3),
    }  # fmt: skip


def _contestants(overrides: list[str], batch_size: int) -> dict[str, Callable[[list[Request]], Tokens]]:
    """By name, what generates the tokens of a list of requests."""
    config = load_run(overrides)
    setups = {name: build(load_run([*overrides, f"runner.cpu={way}"])) for name, way in WAYS.items()}
    parts = setups["kvarena"].parts
    model = parts.model
    if model is None:
        raise KvarenaError("this benchmark compares runs that compute; set runner=torch")
    padded, continuous = (load_reference(str(model.path)) for _ in range(2))
    slots = parts.pool_facts["num_slots"]

    def ours(engine: Engine) -> Callable[[list[Request]], Tokens]:
        def run(batch: list[Request]) -> Tokens:
            requests = fresh(batch)
            run_to_completion(engine, requests)
            return [req.output_token_ids for req in requests]

        return run

    def transformers_static(batch: list[Request]) -> Tokens:
        return generate_static(padded, batch, batch_size)

    def transformers_continuous(batch: list[Request]) -> Tokens:
        return generate_continuous(continuous, batch, slots, config.scheduler.need("max_num_batched_tokens"))

    return {name: ours(setup.parts.engine) for name, setup in setups.items()} | {
        "generate": transformers_static,
        "generate_batch": transformers_continuous,
    }


def _shape(name: str, dtype: str, rounds: int, rates: dict[str, float]) -> int:
    """Decode steps of 1, 8 and 32 rows, and one long prompt, fused and on modules in turn, on the same weights."""
    shared = SharedParts()
    settings = [*model_of(name), f"engine.dtype={dtype}", "kv_cache.num_slots=8192", "scheduler=chunked"]
    settings += [f"scheduler.max_num_batched_tokens={PROMPT_TOKENS}", "scheduler.max_num_seqs=32"]
    timed: dict[tuple[str, str], list[float]] = {}
    floors: dict[str, float] = {}
    for number in range(rounds):
        for way, runner in WAYS.items():
            config = load_run([*settings, f"runner.cpu={runner}"])
            parts, sizes = build_engine(config, shared), sizes_of(config)
            longest = min(PROMPT_TOKENS, parts.max_model_len - 1)
            lines = {"prompt": (1, longest, 1)} | {f"decode of {rows}": (rows, 32, DECODE_STEPS) for rows in ROWS}
            for line, (rows, length, steps) in lines.items():
                requests = [_request(f"{line} {i}", length, steps, parts.spec.vocab_size, i) for i in range(rows)]
                outputs = run_to_completion(parts.engine, requests)
                kept = [output for output in outputs if len(output.plan.scheduled) == output.plan.num_new_tokens]
                kept = kept[1:] if steps > 1 else outputs[:1]
                seconds = statistics.median(output.end_time - output.start_time for output in kept)
                if number or rounds == 1:  # the first one touches memory for the first time
                    timed.setdefault((line, way), []).append(seconds)
                floors[line] = floor_seconds(kept[len(kept) // 2], sizes, rates)
    for line, floor in floors.items():
        ours, modules = (statistics.median(timed[line, way]) for way in WAYS)
        print(
            json.dumps(
                {
                    "step": line, "ms": round(1e3 * ours, 2), "modules_ms": round(1e3 * modules, 2),
                    "floor_ms": round(1e3 * floor, 2), "of_the_floor": round(floor / ours, 3),
                }
            ),
            flush=True,
        )  # fmt: skip
    return 0


def _request(name: str, length: int, num_tokens: int, vocab_size: int, seed: int) -> Request:
    ids = [(7919 * (seed + 1) * (i + 1)) % (vocab_size - 2) + 2 for i in range(length)]
    return Request(name, ids, SamplingParams(max_tokens=num_tokens, ignore_eos=True))


def fresh(requests: list[Request]) -> list[Request]:
    """The same requests, not yet run."""
    return [Request(r.request_id, r.prompt_token_ids, r.sampling, eos_token_ids=r.eos_token_ids) for r in requests]


def processor_seconds() -> float:
    """Of this process, all threads."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def machine_rates() -> dict[str, float]:
    """Of a copy out of the caches, GB/s read and written, and of a float32 product, GFLOP/s; the best of a few."""
    source = torch.ones(2**25)
    target, a = torch.empty_like(source), torch.ones(1024, 1024)
    copy, product = (
        min(_seconds(call) for _ in range(8)) for call in (lambda: target.copy_(source), lambda: torch.mm(a, a))
    )
    return {
        "copy_gb_s": round(8 * len(source) / copy / 1e9, 2),
        "product_gflop_s": round(2 * 1024**3 / product / 1e9, 1),
    }


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def floor_seconds(output: StepOutput, sizes: ModelSizes, rates: dict[str, float]) -> float:
    """What a step must take at these rates: the larger of bytes over the copy's and operations over the product's.

    Weights are read once and keys and values of every context once; the output head is of sampled tokens only.
    """
    spec, entries = sizes.spec, output.plan.scheduled
    context = sum(entry.start + entry.num_new_tokens for entry in entries)
    pairs = sum(entry.num_new_tokens * (entry.start + (entry.num_new_tokens + 1) / 2) for entry in entries)
    moved = (sizes.num_layer_weights + sizes.num_head_weights) * spec.dtype.itemsize + context * spec.kv_bytes_per_token
    flops: float = 2 * sizes.num_layer_weights * output.plan.num_new_tokens + 2 * sizes.num_head_weights * sum(
        output.plan.samples
    )
    flops += 4 * pairs * sizes.num_heads * spec.head_dim * spec.num_layers
    return max(moved / rates["copy_gb_s"], flops / rates["product_gflop_s"]) / 1e9


class Split:
    """Where an engine's time goes: seconds by part, each without the parts that it calls.

    Attributes:
        seconds: by part.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inner = [0.0]

    def watch(self, engine: Engine) -> None:
        """Time the parts of an engine whose model runs as one program; each stage and part costs it some us more."""
        runner: Any = engine.runner
        if not isinstance(runner.forward, CpuForward):
            raise KvarenaError("the split is of fused layers in float32 on a CPU; leave out runner.cpu and fusions")
        program = runner.forward.program
        stages = [self._timed(PARTS.get(name, "kernels between products"), program.run) for name in program.names]

        def run(threads: int, first: int, last: int) -> None:
            for stage in range(first, last):
                stages[stage](threads, stage, stage + 1)

        program.run = run  # type: ignore[method-assign]
        parts = {
            "forward's rest": (runner, ("forward",)),
            "draw": (runner, ("_pick",)),
            "inputs": (runner, ("execute",)),
            "scheduler": (engine.scheduler, ("schedule", "update")),
        }
        for part, (owner, names) in parts.items():
            for name in names:
                setattr(owner, name, self._timed(part, getattr(owner, name)))

    def _timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        self.seconds.setdefault(part, 0.0)

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            start = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                took = time.perf_counter() - start
                self.seconds[part] += took - self._inner.pop()
                self._inner[-1] += took

        return timed
