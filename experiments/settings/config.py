"""The settings that the driver itself reads, validated where they are made.

Strategies, workloads and arrivals validate their own options; these are the sections `engine`, `kv_cache`,
`sampling`, `sweep`, `driver`, `http`, `slo`, `runner` and `report` of conf/config.yaml.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Self

from omegaconf import DictConfig, OmegaConf

from kvarena.engine.errors import ConfigError
from kvarena.engine.server.shared.config import ServerConfig
from kvarena.experiments.settings import defaults
from kvarena.experiments.settings.near import did_you_mean

defaults.register()  # of a config that another process composed
DTYPES = ("float32", "bfloat16", "float16", "auto")
DEVICES = ("auto", "cpu", "cuda")
ATTENTION = ("auto", "reference", "triton")
LAYOUTS = ("paged", "contiguous")
RECORDS = ("full", "summary", "none")
CACHES = ("cold", "warm")
JSONS = ("short", "full")
SLO_RULES = ("per_request", "percentiles")
SECTIONS = ("engine", "kv_cache", "sampling", "driver", "sweep", "report", "http", "slo", "allocator", "scheduler",
            "model", "runner", "workload", "arrival")  # fmt: skip
KEYS = (*SECTIONS, "server", "tracking", "study", "mode", "target")
MODEL_KEYS = ("name", "path", "shape", "load_format", "trust_remote_code")
MOST_SLOTS = 2**48  # what no memory holds; the product with a block's size is still an integer of 64 bits
MOST_GIB = 2**30
MOST_SAMPLES = 2**16
MOST_SCORES = 1024


def _check(ok: bool, key: str, value: object, must: str) -> None:
    if not ok:
        raise ConfigError(f"{key}={value} must be {must}")


def _is_int(value: object, at_least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= at_least


def check_values(cfg: DictConfig) -> None:
    """Check every setting that this module reads, whatever the run will need of them, before any work begins.

    Raises:
        ConfigError: a section is none, a number is not finite, or a value is out of range; the message names it.
    """
    values = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(values, dict)
    for section in SECTIONS:
        if not isinstance(values.get(section), dict):
            raise ConfigError(f"{section}={values.get(section)} must be a section of settings; set those inside it")
    for name in map(str, values):
        if name not in KEYS:
            raise ConfigError(f"unknown config key {name!r}{did_you_mean(name, KEYS)}")
    server = [one.name for one in fields(ServerConfig)]
    for name, inner in (("model", MODEL_KEYS), ("server", server)):
        for key in values.get(name) or {}:
            if key not in inner:
                raise ConfigError(f"unknown config key '{name}.{key}'{did_you_mean(key, inner)}")
    for key, value in _leaves(values, ""):
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{key}={value} must be a finite number")
    is_simulated = values["runner"].get("kind") == "simulated"
    runner = SimulatedRunnerConfig if is_simulated else RunnerConfig
    kinds: dict[str, type[_Section]] = {
        "engine": EngineConfig, "kv_cache": KVCacheConfig, "sampling": SamplingConfig, "driver": DriverConfig,
        "sweep": SweepConfig, "report": ReportConfig, "http": HttpConfig, "slo": SLOConfig, "runner": runner,
    }  # fmt: skip
    for name, kind in kinds.items():
        kind.from_config(cfg[name])


def _leaves(node: object, name: str) -> Iterator[tuple[str, object]]:
    if isinstance(node, (dict, list)):
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, inner in items:
            yield from _leaves(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, node


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


class _Section:
    """Reads a frozen dataclass from the config section of the same field names."""

    @classmethod
    def from_config(cls, section: DictConfig) -> Self:
        """Build from a config section. Raises ConfigError on an unknown key or a value out of range."""
        values: dict[str, Any] = OmegaConf.to_container(section, resolve=True)  # type: ignore[assignment]
        known = {f.name for f in fields(cls)}  # type: ignore[arg-type]
        for key in values:
            if key not in known:
                raise ConfigError(
                    f"unknown key {key!r} of section {section._key()!r}{did_you_mean(key, sorted(known))}"
                )
        if missing := sorted(known - values.keys() - {one.name for one in fields(cls) if one.default is not MISSING}):  # type: ignore[arg-type]
            raise ConfigError(f"{section._key()}.{missing[0]} is needed: leave ~{section._key()}.{missing[0]} out")
        return cls(**values)


@dataclass(frozen=True)
class EngineConfig(_Section):
    """Section `engine`."""

    max_model_len: int | None
    dtype: str
    device: str
    overlap: bool
    seed: int
    gpu_memory_utilization: float

    def __post_init__(self) -> None:
        length = self.max_model_len
        _check(length is None or _is_int(length, 2), "engine.max_model_len", length, "an integer above 1, or null")
        _check(self.dtype in DTYPES, "engine.dtype", self.dtype, f"one of {', '.join(DTYPES)}")
        _check(self.device in DEVICES, "engine.device", self.device, f"one of {', '.join(DEVICES)}")
        _check(isinstance(self.overlap, bool), "engine.overlap", self.overlap, "true or false")
        _check(_is_int(self.seed, 0), "engine.seed", self.seed, "an integer of at least 0")
        share = self.gpu_memory_utilization
        _check(_is_number(share) and 0 < share <= 1, "engine.gpu_memory_utilization", share, "in (0, 1]")


@dataclass(frozen=True)
class KVCacheConfig(_Section):
    """Section `kv_cache`: at most one of the three says how large the pool is."""

    num_slots: int | None
    num_blocks: int | None
    memory_gib: float | None

    def __post_init__(self) -> None:
        for key in ("num_slots", "num_blocks"):
            value = getattr(self, key)
            _check(value is None or _is_int(value, 1), f"kv_cache.{key}", value, "an integer of at least 1, or null")
            _check(value is None or value <= MOST_SLOTS, f"kv_cache.{key}", value, f"at most {MOST_SLOTS}")
        gib = self.memory_gib
        _check(gib is None or (_is_number(gib) and gib > 0), "kv_cache.memory_gib", gib, "above 0, or null")
        _check(gib is None or gib <= MOST_GIB, "kv_cache.memory_gib", gib, f"at most {MOST_GIB}")

    @classmethod
    def from_config(cls, section: DictConfig) -> Self:
        """Build from the section; `num_blocks` or `memory_gib`, when given, replaces the default `num_slots`."""
        config = super().from_config(section)
        if config.num_blocks is not None and config.memory_gib is not None:
            raise ConfigError("kv_cache.num_blocks and kv_cache.memory_gib both set the pool's size; give one of them")
        if config.num_blocks is not None or config.memory_gib is not None:
            return cls(num_slots=None, num_blocks=config.num_blocks, memory_gib=config.memory_gib)
        return config

    @property
    def sized_by(self) -> str | None:
        """The key that says how large the pool is; None: the device's memory does."""
        return next((f"kv_cache.{f.name}" for f in fields(self) if getattr(self, f.name) is not None), None)


@dataclass(frozen=True)
class SamplingConfig(_Section):
    """Types of section `sampling`; `kvarena.engine.request.SamplingParams` checks its ranges."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    n: int
    ignore_eos: bool

    def __post_init__(self) -> None:
        for key in ("temperature", "top_p", "min_p"):
            _check(_is_number(getattr(self, key)), f"sampling.{key}", getattr(self, key), "a number")
        _check(_is_int(self.top_k, 0), "sampling.top_k", self.top_k, "an integer of at least 0 (0 keeps all tokens)")
        _check(
            _is_int(self.n, 1) and self.n <= MOST_SAMPLES, "sampling.n", self.n, f"an integer in [1, {MOST_SAMPLES}]"
        )
        _check(isinstance(self.ignore_eos, bool), "sampling.ignore_eos", self.ignore_eos, "true or false")


@dataclass(frozen=True)
class SweepConfig(_Section):
    """Section `sweep`."""

    rounds: int
    allow_mixed: bool
    round: int | None

    def __post_init__(self) -> None:
        _check(_is_int(self.rounds, 1), "sweep.rounds", self.rounds, "an integer of at least 1")
        _check(
            self.round is None or _is_int(self.round, 0), "sweep.round", self.round, "an integer of at least 0, or null"
        )
        _check(isinstance(self.allow_mixed, bool), "sweep.allow_mixed", self.allow_mixed, "true or false")


@dataclass(frozen=True)
class ReportConfig(_Section):
    """Section `report`."""

    baseline: str | int | None
    progress: bool
    kv_map: bool
    pages: bool
    json: str

    def __post_init__(self) -> None:
        # Hydra reads the folder's name 0 as a number.
        name = self.baseline
        _check(name is None or _is_int(name, 0) or (isinstance(name, str) and bool(name)), "report.baseline", name,
               "a name, or null")  # fmt: skip
        for key in ("progress", "kv_map", "pages"):
            _check(isinstance(getattr(self, key), bool), f"report.{key}", getattr(self, key), "true or false")
        _check(self.json in JSONS, "report.json", self.json, f"one of {', '.join(JSONS)}")


@dataclass(frozen=True)
class DriverConfig(_Section):
    """Section `driver`."""

    warmup: bool
    max_lateness: float
    record: str
    cache: str
    scores: int
    probe: bool

    def __post_init__(self) -> None:
        _check(self.cache in CACHES, "driver.cache", self.cache, f"one of {', '.join(CACHES)}")
        _check(self.record in RECORDS, "driver.record", self.record, f"one of {', '.join(RECORDS)}")
        for key in ("warmup", "probe"):
            _check(isinstance(getattr(self, key), bool), f"driver.{key}", getattr(self, key), "true or false")
        late = self.max_lateness
        _check(_is_number(late) and late > 0, "driver.max_lateness", late, "above 0 (seconds)")
        scores = self.scores
        _check(
            _is_int(scores, 0) and scores <= MOST_SCORES, "driver.scores", scores, f"an integer in [0, {MOST_SCORES}]"
        )
        if scores and self.record != "full":
            raise ConfigError(f"driver.scores={scores} needs the tokens, and driver.record={self.record} keeps none")

    def check_scores(self, place: str) -> None:
        """Raise ConfigError where scores are asked for and `place` has none."""
        if self.scores:
            raise ConfigError(f"driver.scores={self.scores} needs an engine of this process that computes; {place}")


@dataclass(frozen=True)
class HttpConfig(_Section):
    """Section `http`: how a server that `target` names is asked."""

    name: str | None
    model: str | None
    api_key_file: str | None
    timeout: float
    metrics: str | None
    metrics_interval: float

    def __post_init__(self) -> None:
        for key in ("name", "model", "api_key_file", "metrics"):
            value = getattr(self, key)
            _check(value is None or (isinstance(value, str) and bool(value)), f"http.{key}", value, "text, or null")
        for key in ("timeout", "metrics_interval"):
            value = getattr(self, key)
            _check(_is_number(value) and value > 0, f"http.{key}", value, "above 0 (seconds)")

    def authorization(self) -> dict[str, str]:
        """The header with the key, which is read here and kept nowhere. Raises ConfigError."""
        if self.api_key_file is None:
            return {}
        try:
            key = Path(self.api_key_file).read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"http.api_key_file={self.api_key_file} cannot be read: {error}") from error
        return {"Authorization": f"Bearer {key}"}


@dataclass(frozen=True)
class SLOConfig(_Section):
    """Section `slo`: limits in seconds that a good request keeps, and by which rule they are an objective that is met.

    `rule=per_request`: the share `attainment` of the requests keeps all limits at once; `percentiles`: each limit
    apart is kept by that percentile of the requests (reports/analysis/slo.py).
    """

    ttft: float | None
    tpot: float | None
    e2e: float | None
    attainment: float
    rule: str

    def __post_init__(self) -> None:
        for key in ("ttft", "tpot", "e2e"):
            value = getattr(self, key)
            _check(
                value is None or (_is_number(value) and value > 0), f"slo.{key}", value, "above 0 (seconds), or null"
            )
        share = self.attainment
        _check(_is_number(share) and 0 < share <= 1, "slo.attainment", share, "in (0, 1]")
        _check(self.rule in SLO_RULES, "slo.rule", self.rule, f"one of {', '.join(SLO_RULES)}")

    @property
    def limits(self) -> dict[str, float]:
        """The limits that are set, in seconds."""
        return {key: value for key in ("ttft", "tpot", "e2e") if (value := getattr(self, key)) is not None}


@dataclass(frozen=True)
class RunnerConfig(_Section):
    """Section `runner`."""

    attention: str
    layout: str
    fusions: bool | str
    graphs: bool | str
    kind: str = "torch"

    def __post_init__(self) -> None:
        _check(self.kind == "torch", "runner.kind", self.kind, "torch, to compute on a device")
        _check(self.attention in ATTENTION, "runner.attention", self.attention, f"one of {', '.join(ATTENTION)}")
        _check(self.layout in LAYOUTS, "runner.layout", self.layout, f"one of {', '.join(LAYOUTS)}")
        for key in ("fusions", "graphs"):
            value = getattr(self, key)
            _check(isinstance(value, bool) or value == "auto", f"runner.{key}", value, "auto, true or false")


@dataclass(frozen=True)
class SimulatedRunnerConfig(_Section):
    """Section `runner` of a simulated run."""

    kind: str
    profile: str

    def __post_init__(self) -> None:
        _check(self.kind == "simulated", "runner.kind", self.kind, "simulated")
        name = self.profile
        _check(isinstance(name, str) and bool(name), "runner.profile", name, "a name or a YAML file")
