"""Random workloads for tiny pools: what a strategy must survive, from one seed."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import Any

from kvarena.engine.request import ImageSpan, Request, SamplingParams, expand
from kvarena.experiments.correctness.oracle import expected_beams, expected_output

MAX_MODEL_LEN = 48
VOCAB_SIZE = 97
PLACEHOLDER, IDENTITIES = 7, (1 << 300, (1 << 300) + 1)  # of images: the same token for all, and what tells them apart


@dataclass
class Trace:
    """A random workload and the random sizes under which strategies run it.

    Attributes:
        seed: what it was made from.
        specs: arguments of `Request`.
        aborts: (time, request id), by time.
        num_slots: size of the pool.
        allocator_options: by option name; applied where an allocator has the option.
        scheduler_options: likewise.
        levels: options of a prefix cache with a level below the pool.
        most_delay: steps that a transfer to or from that level takes at most.
    """

    seed: int
    specs: list[dict[str, Any]]
    aborts: list[tuple[float, str]]
    num_slots: int
    allocator_options: dict[str, Any]
    scheduler_options: dict[str, Any]
    levels: dict[str, Any] = field(default_factory=dict)
    most_delay: int = 0
    _expected: dict[int | None, dict[str, list[int]]] = field(default_factory=dict)

    def expected(self, window: int | None) -> dict[str, list[int]]:
        """The right output of each request under a window, by id."""
        if window not in self._expected:
            found: dict[str, list[int]] = {}
            for whole in (Request(**spec) for spec in self.specs):
                requests = expand(whole)
                if whole.sampling.beams:
                    outputs = expected_beams(whole, VOCAB_SIZE, window)
                else:
                    outputs = [expected_output(req, VOCAB_SIZE, window) for req in requests]
                found |= dict(zip((req.request_id for req in requests), outputs, strict=True))
            self._expected[window] = found
        return self._expected[window]

    def requests(self) -> list[Request]:
        """New requests by arrival, parallel samples expanded; some know their true output length, some a wrong one."""
        rng = random.Random(self.seed)
        requests = [req for spec in self.specs for req in expand(Request(**spec))]
        for req in requests:
            length = len(self.expected(None)[req.request_id])
            req.oracle_output_len = rng.choice([None, length, length, length, (length + 1) // 2])
        return requests


def make_trace(seed: int, num_requests: int = 20) -> Trace:
    """A random trace: shared, identical, block-aligned prompts, images, stop tokens, n > 1, priorities, aborts."""
    rng = random.Random(seed)
    block_size = rng.choice([1, 2, 4, 4, 8])
    shared = [rng.randrange(VOCAB_SIZE) for _ in range(24)]
    specs: list[dict[str, Any]] = []
    stop_token_ids = frozenset(rng.sample(range(VOCAB_SIZE), rng.choice([0, 6])))
    for i in range(num_requests):
        prompt = shared[: rng.choice([0, 0, 8, 16, 24])]
        if not prompt or rng.random() < 0.7:  # else: identical to others, and a whole number of blocks
            prompt = prompt + [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 10))]
        max_tokens = rng.randint(1, 14 if rng.random() < 0.9 else 40)
        specs.append(
            {
                "request_id": f"r{i}",
                "prompt_token_ids": prompt,
                "sampling": SamplingParams(
                    max_tokens=max_tokens,
                    min_tokens=rng.choice([0, min(3, max_tokens)]),
                    seed=rng.choice([None, i]),
                    n=rng.choice([1, 1, 1, 1, 2, 3]),
                ),
                "arrival_time": float(rng.randint(0, 2 * num_requests)),
                "priority": rng.randint(0, 2),
                "client_id": rng.choice("abc"),
                "cache_salt": rng.choice(["", "", "", "salt"]),
                "eos_token_ids": stop_token_ids,
            }
        )
    pictures = random.Random(f"images of {seed}")  # draws of its own: the rest of a trace is what it was without
    for spec in specs:
        _put_images(spec, pictures)
    specs.sort(key=lambda spec: spec["arrival_time"])
    ids = [req.request_id for spec in specs for req in expand(Request(**spec))]
    aborts = [(float(rng.randint(1, 5 * num_requests)), rid) for rid in rng.sample(ids, rng.randint(0, 4))]
    aborts += _put_beams(specs, {rid for _, rid in aborts}, random.Random(f"beams of {seed}"))
    max_num_seqs = rng.choice([3, 6, 12])
    swap_blocks = rng.choice([0, 6, 60])
    below = random.Random(f"levels of {seed}")
    return Trace(
        seed=seed,
        specs=specs,
        aborts=sorted(aborts),
        num_slots=rng.choice([40, 64, 80, 100, 128]),
        allocator_options={
            "block_size": block_size,
            "swap_blocks": swap_blocks,
            "page_tokens": rng.choice([None, 3, 8, 16]),
            "max_regions": rng.choice([2, 64]),
        },
        scheduler_options={
            "max_num_seqs": max_num_seqs,
            "max_num_batched_tokens": max_num_seqs + rng.choice([-1, 0, 5, 20, 100]),
            "max_num_batched_tiles": pictures.choice([1, 2, 16]),
            "watermark": rng.choice([0.0, 0.01, 0.1]),
            "preemption": rng.choice(["recompute", "recompute", "none"] if swap_blocks == 0 else ["swap"]),
            "chunks": random.Random(f"chunks {seed}").choice(["budget", "timed"]),
            "victim": rng.choice(["last_arrived", "lowest_priority", "most_blocks"]),
            "retire": rng.choice(["hold", "free"]),
            "max_wait": rng.choice([0.0, 3.5]),
            "predictor": rng.choice(["oracle", "lognormal"]),
            "ageing": rng.choice([0.1, 1.0]),
        },
        levels={
            "host_blocks": swap_blocks + below.choice([1, 5, 20, 80]),
            "load": below.choice(["always", "always", "always", "never"]),
        },
        most_delay=below.choice([0, 0, 2, 9]),
    )


def _put_beams(specs: list[dict[str, Any]], aborted: set[str], rng: random.Random) -> list[tuple[float, str]]:
    """Make beam searches of some requests; which beams end early, and when."""
    aborts = []
    for spec in specs:
        sampling = spec["sampling"]
        if sampling.n > 1 or spec["request_id"] in aborted or rng.random() < 0.8:
            continue
        spec["sampling"] = replace(
            sampling, beams=rng.choice([1, 2, 3, 4]), length_penalty=rng.choice([0.0, 1.0, 2.0, -1.0]),
            early_stopping=rng.choice([True, False, "never"]),
        )  # fmt: skip
        if rng.random() < 0.1:
            beam = rng.randrange(spec["sampling"].beams)
            aborts.append((spec["arrival_time"] + rng.randint(1, 40), f"{spec['request_id']}-{beam}"))
    return aborts


def _put_images(spec: dict[str, Any], rng: random.Random) -> None:
    """Put images into a third of the prompts, in place of tokens: two that differ have the same placeholders."""
    prompt = list(spec["prompt_token_ids"])
    at, images = rng.choice([0, 1, 8]), []
    while rng.random() < 0.33:
        num_tiles, size = rng.choice([1, 2, 3]), rng.choice([1, 2, 4])
        stop = at + num_tiles * size
        if stop >= len(prompt):
            break
        prompt[at:stop] = [PLACEHOLDER] * (stop - at)
        images.append(ImageSpan(at, stop, rng.choice(IDENTITIES), num_tiles))
        at = stop + rng.choice([0, 1])
    spec["prompt_token_ids"], spec["images"] = prompt, tuple(images)
