"""Small random traces of what is asked of a prefix cache."""

from __future__ import annotations

import random

import numpy as np

from kvarena.experiments.caching.optimum import Ask, Event, Leave
from kvarena.experiments.caching.plain_replay import numbered


def prompts(rng: random.Random, number: int, longest: int, letters: int = 2) -> list[list[int]]:
    """Keys of prompts that share prefixes: a key is the whole prefix."""
    drawn = [[rng.randrange(letters) for _ in range(rng.randint(1, longest))] for _ in range(number)]
    return numbered([[tuple(one[: i + 1]) for i in range(len(one))] for one in drawn])


def with_locks(rng: random.Random, trace: list[list[int]], num_blocks: int) -> list[Event]:
    """Requests that come and go; never more owned than the pool holds."""
    events: list[Event] = []
    live: dict[int, list[int]] = {}
    for row, keys in enumerate(trace):
        while live and (
            rng.random() < 0.5 or len({key for own in live.values() for key in own} | set(keys)) > num_blocks
        ):
            gone = rng.choice(sorted(live))
            del live[gone]
            events.append(Leave(gone))
        if len(keys) > num_blocks:
            continue
        live[row] = keys
        events.append(Ask(row, np.array(keys, dtype=np.int64), rng.choice([len(keys), len(keys) - 1])))
    return events
