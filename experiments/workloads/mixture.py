"""A mixture of workloads: requests of several kinds on one engine, each with its share."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from hydra.errors import InstantiationException

from kvarena.engine.checks import check_int, check_keys, check_number, is_int, require
from kvarena.engine.errors import ConfigError, KvarenaError
from kvarena.experiments.settings.targets import Part, instantiate
from kvarena.experiments.workloads.parts.base import FloatArray, IntArray, LengthTable, Workload
from kvarena.experiments.workloads.parts.seeds import Purpose, generator, seed_sequence
from kvarena.experiments.workloads.synthetic import required_num_requests


class MixtureWorkload(Workload):
    """Requests drawn from several workloads; each component's own order is kept.

    Each request's component is drawn with the weights. When every component states times, the requests are merged in
    order of time; otherwise they are interleaved as drawn and state none. A request's client_id begins with its
    component's name, so a fair scheduler can tell them apart.

    Args:
        components: name -> config of a workload (`_target_` and its options). Its num_requests must be null, since the
            mixture decides it, and its seed is combined with the mixture's.
        weights: name -> share of the requests, above 0; they need not add up to 1.
        priorities: name -> priority of its requests; those left out keep their workload's.
        common: num_requests, seed, vocab_size, reserved_token_ids.
    """

    name = "mixture"

    def __init__(
        self, *, components: Any, weights: Any, priorities: Mapping[str, int] | None = None, **common: Any
    ) -> None:
        super().__init__(**common)
        self._num = required_num_requests(self.num_requests)
        if not isinstance(components, Mapping) or not components:
            raise ConfigError(f"workload.components={components} must name at least one workload")
        self._configs = {str(name): config for name, config in components.items()}
        shares = check_keys("workload.weights", weights, tuple(self._configs))
        self._weights = [check_number(f"workload.weights.{n}", shares[n], above=True) for n in self._configs]
        self._priorities = check_keys("workload.priorities", priorities or {}, (), tuple(self._configs))
        for name, value in self._priorities.items():
            require(is_int(value), f"workload.priorities.{name}", value, "an integer; lower runs first")
        self._parts: list[Workload] = []
        self._part: IntArray = np.empty(0, dtype=np.int64)
        self._row: IntArray = np.empty(0, dtype=np.int64)

    @property
    def source(self) -> str:  # type: ignore[override]
        """The components' descriptions."""
        return " | ".join(part.description for part in self._parts)

    def _build(self) -> LengthTable:
        bounds = np.cumsum(self._weights) / sum(self._weights)
        places = generator(self.seed, Purpose.STRUCTURE).random(self._num)
        drawn = np.minimum(np.searchsorted(bounds, places, side="right"), len(bounds) - 1)
        names = [name for index, name in enumerate(self._configs) if (drawn == index).any()]
        # Components that got no request are left out: number the rest anew.
        part = np.unique(drawn, return_inverse=True)[1]
        counts = np.bincount(part)
        self._parts = [self._make(name, int(count)) for name, count in zip(names, counts, strict=True)]
        row = np.empty(self._num, dtype=np.int64)
        for index, count in enumerate(counts):
            row[part == index] = np.arange(count)
        times = self._times(part, row)
        order = np.arange(self._num) if times is None else np.argsort(times, kind="stable")
        self._part, self._row = part[order], row[order]
        return self._merge(names, None if times is None else times[order])

    def _make(self, name: str, count: int) -> Workload:
        key = f"workload.components.{name}"
        config = self._configs[name]
        if not isinstance(config, Mapping) or "_target_" not in config:
            raise ConfigError(f"{key}={config} must be a workload's config with a _target_")
        if config.get("num_requests") is not None:
            raise ConfigError(
                f"{key}.num_requests={config['num_requests']} must be null: workload.num_requests and workload.weights "
                "decide it"
            )
        own = check_int(f"{key}.seed", config.get("seed", 0), 0)
        seed = seed_sequence(self.seed, Purpose.COMPONENTS, zlib.crc32(name.encode()), own).generate_state(1)[0]
        options = {
            "num_requests": count,
            "seed": int(seed),
            "vocab_size": self.vocab_size,
            "reserved_token_ids": self.reserved_token_ids,
        }
        try:
            part = instantiate(Part(key, {**config} | options))
        except InstantiationException as error:
            if isinstance(error.__cause__, KvarenaError):
                raise type(error.__cause__)(f"{key}: {error.__cause__}") from error
            raise ConfigError(f"{key}: {str(error).splitlines()[0]}") from error
        if not isinstance(part, Workload):
            raise ConfigError(f"{key}._target_={config['_target_']} is not a workload")
        return part

    def _times(self, part: IntArray, row: IntArray) -> FloatArray | None:
        """Each request's time, if all components state times."""
        times = np.empty(self._num)
        for index, workload in enumerate(self._parts):
            own = workload.table.arrival_times
            if own is None:
                return None
            times[part == index] = own[row[part == index]]
        return times

    def _merge(self, names: list[str], times: FloatArray | None) -> LengthTable:
        tables = [part.table for part in self._parts]
        places = list(zip(self._part.tolist(), self._row.tolist(), strict=True))
        clients, kinds = [], []
        priorities = []
        for part, row in places:
            own_clients, own_priorities = tables[part].client_ids, tables[part].priorities
            clients.append(f"{names[part]}/{own_clients[row]}" if own_clients is not None else names[part])
            own_kinds = tables[part].kinds
            kinds.append(f"{names[part]}/{own_kinds[row]}" if own_kinds is not None else names[part])
            own_priority = 0 if own_priorities is None else own_priorities[row]
            priorities.append(self._priorities.get(names[part], own_priority))
        shares = ", ".join(f"{name} {len(table)}" for name, table in zip(names, tables, strict=True))
        return LengthTable(
            np.array([tables[part].prompt_lens[row] for part, row in places], dtype=np.int64),
            np.array([tables[part].output_lens[row] for part, row in places], dtype=np.int64),
            times,
            clients,
            priorities,
            kinds,
            notes=(shares,),
        )

    def prompt(self, row: int) -> list[int]:
        """The prompt that the row's component gives it."""
        return self._parts[int(self._part[row])].prompt(int(self._row[row]))
