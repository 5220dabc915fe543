"""The config, typed at the door: `RunConfig` is made once, and whoever is behind it gets a section of it.

    DictConfig (Hydra's, interpolations and all) --RunConfig.of--> typed sections, and `values` for manifests

Strategies, workloads and arrivals check their own options where they are made; these are the sections that the driver
itself reads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

from omegaconf import DictConfig, OmegaConf

from kvarena.engine.beams import EARLY_STOPPING
from kvarena.engine.checkpoints.kinds import QUANTIZATIONS
from kvarena.engine.checks import (
    NUMBER,
    SECONDS,
    SHARE,
    TEXT,
    TRUTH,
    Must,
    Section,
    integer,
    number,
    one_of,
    require,
)
from kvarena.engine.errors import ConfigError, RequestError
from kvarena.engine.request import SamplingParams
from kvarena.engine.server.shared.config import ServerConfig
from kvarena.experiments.settings import defaults
from kvarena.experiments.settings.near import did_you_mean
from kvarena.experiments.settings.targets import Part, leaves

defaults.register()  # of a config that another process composed

# What no memory holds; the product with a block's size is still an integer of 64 bits.
MOST_SLOTS, MOST_GIB = 2**48, 2**30
SIZES = ("num_slots", "num_blocks", "memory_gib")  # of the pool
SLOTS = Must(f"at most {MOST_SLOTS}", lambda value: value is None or value <= MOST_SLOTS)
GIB = Must(f"at most {MOST_GIB}", lambda value: value is None or value <= MOST_GIB)
EARLY = Must("true, false or never", lambda value: value in EARLY_STOPPING)
AUTO = Must("auto, true or false", lambda value: value == "auto" or isinstance(value, bool))
GRAPHS = Must("auto, true, false or decode", lambda value: value == "decode" or AUTO.holds(value))
# Hydra reads a name such as 0 as a number.
NAME = Must("a name", lambda value: TEXT.holds(value) or integer(0).holds(value)).or_null


@dataclass(frozen=True)
class EngineConfig(Section):
    """Section `engine`."""

    section = "engine"
    max_model_len: Annotated[int | None, integer(2).or_null]
    dtype: Annotated[str, one_of("float32", "bfloat16", "float16", "auto")]
    device: Annotated[str, one_of("auto", "cpu", "cuda")]
    overlap: Annotated[bool | str, AUTO]
    seed: Annotated[int, integer(0)]
    gpu_memory_utilization: Annotated[float, SHARE]
    image_cache_mib: Annotated[float, number(0)]


@dataclass(frozen=True)
class KVCacheConfig(Section):
    """Section `kv_cache`: at most one of `SIZES` says how large the pool is."""

    section = "kv_cache"
    num_slots: Annotated[int | None, integer(1).or_null, SLOTS]
    num_blocks: Annotated[int | None, integer(1).or_null, SLOTS]
    memory_gib: Annotated[float | None, Must("above 0", SECONDS.holds).or_null, GIB]
    host_gib: Annotated[float, number(0), GIB] = 0.0
    load: Annotated[str, one_of("always", "never")] = "always"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_blocks is not None and self.memory_gib is not None:
            raise ConfigError("kv_cache.num_blocks and kv_cache.memory_gib both set the pool's size; give one of them")

    @property
    def sized_by(self) -> str | None:
        """The key that says how large the pool is; None: the device's memory does."""
        return next((f"kv_cache.{key}" for key in SIZES if getattr(self, key) is not None), None)


@dataclass(frozen=True)
class SamplingConfig(Section):
    """Types of section `sampling`; `kvarena.engine.request.SamplingParams` checks its ranges."""

    section = "sampling"
    temperature: Annotated[float, NUMBER]
    top_p: Annotated[float, NUMBER]
    top_k: Annotated[int, Must("an integer of at least 0 (0 keeps all tokens)", integer(0).holds)]
    min_p: Annotated[float, NUMBER]
    n: Annotated[int, integer(1, 2**16)]
    beams: Annotated[int, Must("an integer in [0, 1024] (0 searches no beams)", integer(0, 1024).holds)]
    length_penalty: Annotated[float, NUMBER]
    early_stopping: Annotated[bool | str, EARLY]
    ignore_eos: Annotated[bool, TRUTH]


@dataclass(frozen=True)
class SweepConfig(Section):
    """Section `sweep`."""

    section = "sweep"
    rounds: Annotated[int, integer(1)]
    allow_mixed: Annotated[bool, TRUTH]
    round: Annotated[int | None, integer(0).or_null]


@dataclass(frozen=True)
class ReportConfig(Section):
    """Section `report`."""

    section = "report"
    baseline: Annotated[str | int | None, NAME]
    progress: Annotated[bool, TRUTH]
    kv_map: Annotated[bool, TRUTH]
    pages: Annotated[bool, TRUTH]
    json: Annotated[str, one_of("short", "full")]


@dataclass(frozen=True)
class DriverConfig(Section):
    """Section `driver`."""

    section = "driver"
    warmup: Annotated[bool, TRUTH]
    max_lateness: Annotated[float, SECONDS]
    record: Annotated[str, one_of("full", "summary", "none")]
    cache: Annotated[str, one_of("cold", "warm")]
    scores: Annotated[int, integer(0, 1024)]
    probe: Annotated[bool, TRUTH]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scores and self.record != "full":
            raise ConfigError(
                f"driver.scores={self.scores} needs the tokens, and driver.record={self.record} keeps none"
            )

    def check_scores(self, place: str) -> None:
        """Raise ConfigError where scores are asked for and `place` has none."""
        if self.scores:
            raise ConfigError(f"driver.scores={self.scores} needs an engine of this process that computes; {place}")


@dataclass(frozen=True)
class HttpConfig(Section):
    """Section `http`: how a server that `target` names is asked."""

    section = "http"
    name: Annotated[str | None, TEXT.or_null]
    model: Annotated[str | None, TEXT.or_null]
    api_key_file: Annotated[str | None, TEXT.or_null]
    timeout: Annotated[float, SECONDS]
    metrics: Annotated[str | None, TEXT.or_null]
    metrics_interval: Annotated[float, SECONDS]

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
class SLOConfig(Section):
    """Section `slo`: limits in seconds that a good request keeps, and by which rule they are an objective that is met.

    `rule=per_request`: the share `attainment` of the requests keeps all limits at once; `percentiles`: each limit
    apart is kept by that percentile of the requests (reports/analysis/slo.py).
    """

    section = "slo"
    ttft: Annotated[float | None, SECONDS.or_null]
    tpot: Annotated[float | None, SECONDS.or_null]
    e2e: Annotated[float | None, SECONDS.or_null]
    attainment: Annotated[float, SHARE]
    rule: Annotated[str, one_of("per_request", "percentiles")]

    @property
    def limits(self) -> dict[str, float]:
        """The limits that are set, in seconds."""
        return {key: value for key in ("ttft", "tpot", "e2e") if (value := getattr(self, key)) is not None}


# Beyond it every token takes the same experts.
SIZE = integer(1, 64)


@dataclass(frozen=True)
class ParallelConfig(Section):
    """Section `parallel`: how many ranks share the model (docs/parallel.md)."""

    section = "parallel"
    tensor_parallel_size: Annotated[int, SIZE]
    pipeline_parallel_size: Annotated[int, SIZE]
    executor: Annotated[str, one_of("auto", "processes", "threads", "ray")]
    all_reduce: Annotated[str, one_of("auto", "nccl", "one_shot", "two_shot", "kernel")]
    check_plans: Annotated[bool, TRUTH]
    timeout: Annotated[float, SECONDS]

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.tensor_parallel_size * self.pipeline_parallel_size


SKEW = Must("a number from 0 to 4", lambda value: NUMBER.holds(value) and value <= 4)


@dataclass(frozen=True)
class RunnerConfig(Section):
    """Section `runner`."""

    section = "runner"
    attention: Annotated[str, one_of("auto", "reference", "triton")]
    layout: Annotated[str, one_of("paged", "contiguous")]
    fusions: Annotated[bool | str, AUTO]
    graphs: Annotated[bool | str, GRAPHS]
    cpu: Annotated[str, one_of("fused", "modules")] = "fused"
    gemm: Annotated[str, one_of("auto", "triton", "library")] = "auto"
    gemm_rows: Annotated[int | None, integer(1, 128).or_null] = None  # as many as the table has
    gemm_table: Annotated[str | None, TEXT.or_null] = None
    share_reads: Annotated[bool | str, AUTO] = "auto"
    kind: Annotated[str, Must("torch, to compute on a device", one_of("torch").holds)] = "torch"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("gemm_rows", "gemm_table"):
            if self.gemm == "library" and getattr(self, name) is not None:
                raise ConfigError(f"runner.gemm=library leaves nothing to runner.{name}; leave one of them out")


@dataclass(frozen=True)
class SimulatedRunnerConfig(Section):
    """Section `runner` of a simulated run."""

    section = "runner"
    kind: Annotated[str, Must("simulated", one_of("simulated").holds)]
    profile: Annotated[str, Must("a name or a YAML file", TEXT.holds)]
    expert_skew: Annotated[float, SKEW] = 0.0
    share_reads: Annotated[bool | str, AUTO] = "auto"


@dataclass(frozen=True)
class ModelConfig(Section):
    """Section `model`: a directory, or a shape (the content of a config.json) with random weights."""

    section = "model"
    name: Annotated[str | int | None, NAME]
    path: Annotated[str | None, TEXT.or_null]
    shape: Annotated[dict[str, Any] | None, Must("the content of a config.json", lambda v: isinstance(v, dict)).or_null]
    load_format: Annotated[str, one_of("auto", "dummy")]
    trust_remote_code: Annotated[bool, TRUTH]
    quantization: Annotated[str | None, one_of(*QUANTIZATIONS).or_null]


S = TypeVar("S", bound=Section)


def read(kind: type[S], values: Mapping[str, Any]) -> S:
    """A section from its resolved values. Raises ConfigError: a key unknown or left out, or a value out of range."""
    known = {one.name: one.default is MISSING for one in fields(kind)}
    for key in values:
        if key not in known:
            raise ConfigError(f"unknown key {key!r} of section {kind.section!r}{did_you_mean(key, sorted(known))}")
    for key, is_needed in known.items():
        if is_needed and key not in values:
            raise ConfigError(f"{kind.section}.{key} is needed: leave ~{kind.section}.{key} out")
    return kind(**values)


def plain_values(cfg: DictConfig) -> dict[str, Any]:
    """A config as manifests hold it: resolved, as plain values, without Hydra's node."""
    sections = {str(key): cfg[key] for key in cfg if key != "hydra"}
    return {key: OmegaConf.to_container(one, resolve=True) if OmegaConf.is_config(one) else one
            for key, one in sections.items()}  # fmt: skip


@dataclass(frozen=True)
class RunConfig:
    """What a run is told: every section of the config, checked.

    Attributes:
        values: the whole config, resolved, as manifests hold it and keys of cells are made from it. Never changed.
        sampling: how tokens are picked; `max_tokens` comes from each request.
        server: of mode=serve; None in other runs, which read nothing of it.
        router: of a run on several replicas; None: one engine, and nothing to choose.
        study: of an experiment, which says what is run in place of one cell.
        target: the address of an OpenAI-compatible server; None: the engine of this process.
    """

    values: dict[str, Any]
    engine: EngineConfig
    kv_cache: KVCacheConfig
    sampling: SamplingParams
    driver: DriverConfig
    sweep: SweepConfig
    report: ReportConfig
    http: HttpConfig
    slo: SLOConfig
    parallel: ParallelConfig
    runner: RunnerConfig | SimulatedRunnerConfig
    model: ModelConfig
    allocator: Part
    scheduler: Part
    workload: Part
    arrival: Part
    router: Part | None
    tracking: Part | None
    study: Part | None
    server: ServerConfig | None
    mode: str
    target: str | None

    @classmethod
    def of(cls, cfg: DictConfig) -> RunConfig:
        """Check every section, whatever the run will need of it, before any work begins.

        Raises:
            ConfigError: a section is none, a key is unknown or has no value, a number is not finite, or a value is out
                of range; the message names it.
        """
        values = plain_values(cfg)
        _check_keys(values)
        if values["study"] is None and (missing := sorted(OmegaConf.missing_keys(cfg))):
            raise ConfigError(f"{missing[0]} has no default; give it a value")
        for key, value in leaves(values):
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"{key}={value} must be a finite number")
        mode, target, server = values["mode"], values["target"], values["server"]
        require(mode in ("run", "serve"), "mode", mode, "run or serve")
        typed: dict[str, Any] = {name: read(kind, values[name]) for name, kind in KINDS.items()}
        is_simulated = values["runner"].get("kind") == "simulated"
        kind: type[Section] = SimulatedRunnerConfig if is_simulated else RunnerConfig
        return cls(
            values=values,
            sampling=_sampling(read(SamplingConfig, values["sampling"])),
            kv_cache=_kv_cache(read(KVCacheConfig, values["kv_cache"])),
            runner=read(kind, values["runner"]),  # type: ignore[arg-type]
            server=ServerConfig.from_dict(server) if mode == "serve" else None,
            mode=mode,
            target=None if target is None else str(target),
            **typed,
            **{name: None if values[name] is None else Part(name, values[name]) for name in PARTS},  # type: ignore[arg-type]
            router=_router(values["router"]),
        )


KINDS: dict[str, type[Section]] = {
    "engine": EngineConfig, "driver": DriverConfig, "sweep": SweepConfig, "report": ReportConfig, "http": HttpConfig,
    "slo": SLOConfig, "model": ModelConfig, "parallel": ParallelConfig,
}  # fmt: skip
PARTS = ("allocator", "scheduler", "workload", "arrival", "tracking", "study")
MAY_BE_NULL = ("tracking", "study", "mode", "target", "server")


def _check_keys(values: dict[str, Any]) -> None:
    known = [one.name for one in fields(RunConfig) if one.name != "values"]
    for name in values:
        if name not in known:
            raise ConfigError(f"unknown config key {name!r}{did_you_mean(name, known)}")
    for name in known:
        if name not in MAY_BE_NULL and not isinstance(values.get(name), dict):
            raise ConfigError(f"{name}={values.get(name)} must be a section of settings; set those inside it")
        if name not in values:
            raise ConfigError(f"{name} is needed: leave ~{name} out")
        if name in ("tracking", "study") and not isinstance(values[name], dict | None):
            raise ConfigError(f"{name}={values[name]} must be a section of settings, or null")
    for name, kind in (("model", ModelConfig), ("server", ServerConfig)):
        inner = [one.name for one in fields(kind)]
        for key in values[name] or {}:
            if key not in inner:
                raise ConfigError(f"unknown config key '{name}.{key}'{did_you_mean(key, inner)}")


def _router(values: dict[str, Any]) -> Part | None:
    """The router; None where there is one engine."""
    if "_target_" in values:
        return Part("router", values)
    require(
        values.get("num_replicas") == 1, "router.num_replicas", values.get("num_replicas"),
        "1 without a router; choose one (router=round_robin, ...)",
    )  # fmt: skip
    return None


def _kv_cache(config: KVCacheConfig) -> KVCacheConfig:
    """`num_blocks` or `memory_gib`, when given, replaces the default `num_slots`."""
    if config.num_blocks is None and config.memory_gib is None:
        return config
    return replace(config, num_slots=None)


def _sampling(config: SamplingConfig) -> SamplingParams:
    if config.beams and config.n > 1:
        raise ConfigError(f"sampling.n={config.n} excludes sampling.beams={config.beams}: set one of them")
    try:
        return SamplingParams(**vars(config))
    except RequestError as error:
        raise ConfigError(f"sampling.{error}") from error
