"""One seed, one random stream per purpose: drawing more for one purpose never shifts another."""

from __future__ import annotations

import enum

import numpy as np


class Purpose(enum.IntEnum):
    """What a stream is drawn for. The numbers are part of every recorded run: add new ones, never renumber."""

    PROMPT_LENGTHS = 0
    OUTPUT_LENGTHS = 1
    PROMPT_TOKENS = 2
    PREFIX_TOKENS = 3
    ARRIVALS = 4
    STRUCTURE = 5  # turns of a session, group of a prefix, component of a mixture, order of a sample
    TIMES = 6  # times inside a workload: starts of sessions, think times, places within a time bin
    COMPONENTS = 7  # seeds of a mixture's parts


def seed_sequence(seed: int, purpose: Purpose, *path: int) -> np.random.SeedSequence:
    """The child of `seed` for a purpose; `path` leads to grandchildren (one per component, say)."""
    return np.random.SeedSequence(seed, spawn_key=(int(purpose), *path))


def generator(seed: int, purpose: Purpose, *path: int) -> np.random.Generator:
    """A random generator for one purpose of `seed`."""
    return np.random.default_rng(seed_sequence(seed, purpose, *path))
