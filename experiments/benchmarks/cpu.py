"""Useful tokens per second of this engine beside transformers' own generation.

    kvarena benchmark cpu

One model, one list of requests, one process. The contestants take turns, round after round, so that a busy machine
slows all of them alike; a ratio is the median over rounds of the ratio within a round. Useful tokens are those that
requests asked for: what a padded batch computes beyond them does not count. Prints JSON lines.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from kvarena.engine.core import run_to_completion
from kvarena.engine.errors import KvarenaError
from kvarena.engine.request import Request
from kvarena.experiments.building.build import build
from kvarena.experiments.correctness.reference import generate_continuous, generate_static, load_reference
from kvarena.experiments.settings.compose import load_run
from kvarena.experiments.tools import tool_parser

Tokens = list[list[int]]


def main(argv: Sequence[str]) -> int:
    """Run the contestants and print one line for each round and one for the ratios."""
    parser = tool_parser(__name__, __doc__)
    parser.add_argument("--num-requests", type=int, default=48, help="of the workload")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contestant")
    parser.add_argument("--batch-size", type=int, default=16, help="of the padded static batches")
    parser.add_argument("--max-output-len", type=int, default=256, help="longer outputs of the workload are clipped")
    args = parser.parse_args(argv)

    overrides = [
        "workload=sharegpt",
        f"workload.num_requests={args.num_requests}",
        f"workload.max_output_len={args.max_output_len}",
    ]
    requests = list(build(load_run(overrides)).load.requests)
    useful = sum(req.sampling.max_tokens for req in requests)
    contestants = _contestants(overrides, args.batch_size)
    for run in contestants.values():  # warm up: lazy initialisation, thread pools
        run(requests[:2])

    rates: dict[str, list[float]] = {name: [] for name in contestants}
    tokens: dict[str, Tokens] = {}
    for number in range(args.rounds):
        for name, run in contestants.items():
            start = time.perf_counter()
            tokens[name] = run(requests)
            rates[name].append(useful / (time.perf_counter() - start))
        line = {name: round(values[-1], 1) for name, values in rates.items()}
        print(json.dumps({"round": number, "useful_tokens": useful, "tokens_per_second": line}), flush=True)
    ours = rates["kvarena"]
    ratios = {
        name: round(statistics.median(a / b for a, b in zip(ours, values, strict=True)), 2)
        for name, values in rates.items()
        if name != "kvarena"
    }
    same = {name: sum(a == b for a, b in zip(tokens["kvarena"], other, strict=True)) for name, other in tokens.items()}
    print(json.dumps({"ratio_to": ratios, "requests_with_the_same_tokens": same, "num_requests": len(requests)}))
    return 0


def _contestants(overrides: list[str], batch_size: int) -> dict[str, Callable[[list[Request]], Tokens]]:
    """By name, what generates the tokens of a list of requests."""
    config = load_run(overrides)
    setup = build(config)
    model = setup.parts.model
    if model is None:
        raise KvarenaError("this benchmark compares runs that compute; set runner=torch")
    padded, continuous = (load_reference(str(model.path)) for _ in range(2))
    slots = setup.parts.pool_facts["num_slots"]

    def kvarena(batch: list[Request]) -> Tokens:
        fresh = [Request(r.request_id, r.prompt_token_ids, r.sampling, eos_token_ids=r.eos_token_ids) for r in batch]
        run_to_completion(setup.parts.engine, fresh)
        return [req.output_token_ids for req in fresh]

    def transformers_static(batch: list[Request]) -> Tokens:
        return generate_static(padded, batch, batch_size)

    def transformers_continuous(batch: list[Request]) -> Tokens:
        return generate_continuous(continuous, batch, slots, config.scheduler.need("max_num_batched_tokens"))

    torch.set_grad_enabled(False)
    return {"kvarena": kvarena, "generate": transformers_static, "generate_batch": transformers_continuous}
