"""How often the rule for a run's steady part (reports/analysis/steady.py) gives each of its answers, on known load:

    kvarena check steady_rates --runs 400 --seed 0

Queues of 4, 16 and 64 servers, first come first served, Poisson arrivals from an empty system. Service times with mean
load x servers between arrivals: exponential, deterministic, lognormal (squared coefficient of variation 2) and Pareto
(shape 2.2: that coefficient is 11, and samples hardly ever show it). The last line of stdout is JSON. Exit code 1 when
a bar is missed: of 16 servers with exponential service, a steady part in 95 % of runs of 1,000 requests at loads up to
0.9, and none in 95 % at 1.1 (4,000 requests) and 1.3 (1,000).
"""

from __future__ import annotations

import heapq
import json
from collections import Counter
from collections.abc import Sequence

import numpy as np

from kvarena.experiments.tools import tool_parser
from kvarena.reports.analysis.steady import find_steady

ANSWERS = ("steady", "cannot tell", "overloaded")
SERVICES = ("exponential", "deterministic", "lognormal", "pareto")
SERVERS = (16, 4, 64)
LOADS = (
    (0.05, 1000), (0.5, 1000), (0.8, 1000), (0.9, 1000), (0.95, 1000), (1.0, 1000), (1.05, 1000), (1.1, 1000),
    (1.1, 4000), (1.3, 1000), (0.9, 300), (1.3, 300),
)  # fmt: skip
BARS = {(0.05, 1000): True, (0.5, 1000): True, (0.8, 1000): True, (0.9, 1000): True, (1.1, 4000): False,
        (1.3, 1000): False}  # fmt: skip
BAR = 0.95
PARETO_SHAPE = 2.2


def simulate_queue(
    load: float, servers: int, num_requests: int, service: str, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Arrival, start and end of each request of a queue that begins empty; one arrival a second in the mean."""
    arrival = np.cumsum(rng.exponential(1.0, num_requests))
    length = load * servers * service_times(service, num_requests, rng)
    free = [0.0] * servers  # when each server is done: a heap
    start = np.empty(num_requests)
    for index, (came, takes) in enumerate(zip(arrival.tolist(), length.tolist(), strict=True)):
        begins = max(came, free[0])
        heapq.heapreplace(free, begins + takes)
        start[index] = begins
    return arrival, start, start + length


def service_times(service: str, count: int, rng: np.random.Generator) -> np.ndarray:
    """Service times of mean 1."""
    if service == "exponential":
        return rng.exponential(1.0, count)
    if service == "deterministic":
        return np.ones(count)
    if service == "lognormal":
        return rng.lognormal(-np.log(3) / 2, np.log(3) ** 0.5, count)
    return rng.pareto(PARETO_SHAPE, count) * (PARETO_SHAPE - 1)


def answers(
    load: float, servers: int, num_requests: int, service: str, num_runs: int, seed: int
) -> dict[str, float]:  # fmt: skip
    """The share of each answer over `num_runs` runs."""
    rng = np.random.default_rng([seed, servers, SERVICES.index(service), num_requests, round(1000 * load)])
    found = Counter(
        find_steady(*simulate_queue(load, servers, num_requests, service, rng)).verdict for _ in range(num_runs)
    )
    return {answer: found[answer] / num_runs for answer in ANSWERS}


def main(arguments: Sequence[str]) -> int:
    """Print a table of rates; returns the exit code."""
    parser = tool_parser(__name__, __doc__)
    parser.add_argument("--runs", type=int, default=400, help="of each queue")
    parser.add_argument("--seed", type=int, default=0, help="of the queues")
    options = parser.parse_args(arguments)
    print("| servers | service | load | requests | steady | cannot tell | overloaded |\n|---|---|---|---|---|---|---|")
    missed, lines = [], []
    for servers in SERVERS:
        for service in SERVICES:
            for load, num_requests in LOADS:
                rates = answers(load, servers, num_requests, service, options.runs, options.seed)
                row = [str(servers), service, f"{load:g}", str(num_requests), *(f"{rates[a]:.1%}" for a in ANSWERS)]
                print(f"| {' | '.join(row)} |", flush=True)
                lines.append({"servers": servers, "service": service, "load": load, "requests": num_requests} | rates)
                wanted = BARS.get((load, num_requests)) if (servers, service) == (16, "exponential") else None
                if wanted is not None and (rates["steady"] if wanted else 1 - rates["steady"]) < BAR:
                    missed.append(lines[-1])
    print(json.dumps({"runs": options.runs, "seed": options.seed, "missed": missed, "rates": lines}))
    return 1 if missed else 0
