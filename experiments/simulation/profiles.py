"""What a step takes on some device: a file of conf/profile, read and checked.

card (figures of a GPU) x sizes of the model -> StepTime      any pair works; of experts with the skew of their use
tables (published operations) x sizes -> StepTime             Llama-like layers, on a card that somebody measured
measured (coefficients of a fit to recorded runs)  -> StepTime      one model, one machine
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from kvarena.engine.checks import SHARE, check_bool, check_int, check_number, require
from kvarena.engine.errors import ConfigError
from kvarena.engine.models.sizes import ModelSizes
from kvarena.experiments.settings.compose import CONF_DIR
from kvarena.experiments.simulation.collectives import (
    ONE_CARD,
    AllReduce,
    Collectives,
    Ranks,
    kv_share,
    parallel_step_time,
)
from kvarena.experiments.simulation.expert_load import expert_load
from kvarena.experiments.simulation.fitted_range import FittedRange
from kvarena.experiments.simulation.step_time import (
    HostTime,
    RooflineStepTime,
    StepTime,
    TableStepTime,
    TwoPhaseStepTime,
)
from kvarena.experiments.simulation.table_profile import TablesProfile


@dataclass(frozen=True)
class Card:
    """An analytic profile: a GPU's public figures, and the share of them that kernels reach.

    Args:
        source: where the figures come from.
        memory_bytes: of the GPU.
        bandwidth: of its memory, in bytes per second.
        flops: dense operations per second in 16 bit.
        bandwidth_efficiency: share of `bandwidth` that reading weights and KV reaches, in (0, 1].
        flops_efficiency: share of `flops` that matrix products reach, in (0, 1].
        attention_efficiency: share of `flops` that prompt attention reaches, in (0, 1].
        layer_gap: seconds lost between the kernels of a layer, for each layer and step.
        copy_bandwidth: of swapped blocks between GPU and host, in bytes per second.
        copy_gap: seconds that a block's transfer takes beside its bytes.
        host: seconds of the host around a step.
        collectives: what cards take to exchange data; None: not known.
        error: what is known of its error, in words; reports print it.

    Raises:
        ConfigError: a figure out of range.
    """

    source: str
    memory_bytes: float
    bandwidth: float
    flops: float
    bandwidth_efficiency: float
    flops_efficiency: float
    attention_efficiency: float
    layer_gap: float
    copy_bandwidth: float
    copy_gap: float
    host: HostTime
    collectives: Collectives | None = None
    error: str = ""

    def __post_init__(self) -> None:
        for name in ("memory_bytes", "bandwidth", "flops", "copy_bandwidth"):
            check_number(f"profile.{name}", getattr(self, name), above=True)
        for name in ("bandwidth_efficiency", "flops_efficiency", "attention_efficiency"):
            require(SHARE.holds(getattr(self, name)), f"profile.{name}", getattr(self, name), SHARE.words)
        for name in ("layer_gap", "copy_gap"):
            check_number(f"profile.{name}", getattr(self, name))

    def step_time(
        self, sizes: ModelSizes, block_size: int, expert_skew: float = 0.0, ranks: Ranks = ONE_CARD
    ) -> StepTime:
        """The step time of a model on so many cards. Raises as `share`, and where the ranks do not fit."""
        share = self.share(sizes, block_size, expert_skew, ranks)
        return parallel_step_time(share, ranks, sizes, self.collectives)

    def share(
        self, sizes: ModelSizes, block_size: int, expert_skew: float = 0.0, ranks: Ranks = ONE_CARD
    ) -> RooflineStepTime:
        """What one of the cards does, at the rates that kernels reach.

        Weights once, operations per token, KV bytes per context token.

        Of experts the weights are read of those that a token of the step takes, which `expert_skew` decides
        (reports/analysis/experts.py), and each token is multiplied with those that it takes.

        Raises:
            ConfigError: the model has experts of an unknown kind, or is not in 16 bit.
        """
        spec = sizes.spec
        if spec.dtype.itemsize != 2:
            raise ConfigError(
                f"runner.profile has rates for 16 bit, and model {spec.name!r} is in {_dtype_name(sizes)}; set "
                "engine.dtype=bfloat16 or float16 (auto takes what the model says)"
            )
        load = expert_load(sizes, expert_skew)
        read = self.bandwidth * self.bandwidth_efficiency
        multiply = self.flops * self.flops_efficiency
        pair_operations = 4 * spec.num_layers * sizes.num_heads * spec.head_dim  # q k^T and p v, two operations each
        # Of the experts' weights: all, and those that a token is multiplied with; and one expert's in every layer.
        stacked = multiplied = each = 0
        if load is not None and spec.experts is not None:
            each = load.num_layers * spec.experts.num_weights
            stacked, multiplied = load.num_experts * each, load.top_k * each
        weights = sizes.num_layer_weights + sizes.num_head_weights
        # Seconds for each weight; what packing saves is spread over all alike.
        each_weight = (weights * spec.dtype.itemsize - sizes.saved_bytes) / weights / read
        layers, kv = ranks.number, kv_share(ranks, sizes)  # cards that share a layer's weights, and a token's KV
        head = sizes.num_head_weights
        return RooflineStepTime(
            base=self.layer_gap * spec.num_layers / ranks.pipeline,
            weights=((weights - stacked - head) / layers + head / ranks.tensor) * each_weight,
            per_token=2 * (sizes.num_layer_weights - stacked + multiplied) / multiply / layers,
            per_request=2 * head / multiply / ranks.tensor,
            per_kv_token=spec.kv_bytes_per_token / read / kv,
            per_attention_pair=pair_operations / (self.flops * self.attention_efficiency) / layers,
            per_copied_block=self.copy_gap + block_size * spec.kv_bytes_per_token / self.copy_bandwidth / kv,
            per_expert=each * each_weight / layers,
            experts=load,
        )

    def check_overlap(self, overlap: bool) -> None:
        """A card's host time is apart from its device time: right with and without overlap."""

    def facts(
        self, sizes: ModelSizes, block_size: int, expert_skew: float = 0.0, ranks: Ranks = ONE_CARD
    ) -> dict[str, Any]:
        """Figures and the step time that they give; of several cards that of one card's share."""
        step_time = asdict(self.share(sizes, block_size, expert_skew, ranks))
        figures = asdict(self) | {"collectives": None if self.collectives is None else self.collectives.source}
        more = {} if ranks.number == 1 else {"ranks": asdict(ranks)}
        return {"kind": "analytic", "figures": figures, "step_time": step_time} | more


@dataclass(frozen=True)
class MeasuredProfile:
    """Step times that were fitted to recorded runs of one model on one machine (`experiment=calibrate`).

    Args:
        source: machine, commit and runs that it comes from.
        error: in words, how far it was off on runs that were held out; empty where none were.
        fitted: what it was fitted to; steps beyond that are extrapolated, and a run with such steps says so.
        model: name of the model.
        kv_bytes_per_token: of that model in the dtype that was measured.
        overlap: whether the runs were overlapped: without, preparing a step is part of the device's time.
        decode: of steps that only decode.
        prefill: of steps with prompts.
        host: seconds of the host around a step.

    Raises:
        ConfigError: a figure out of range.
    """

    source: str
    error: str
    model: str
    kv_bytes_per_token: int
    overlap: bool
    fitted: FittedRange
    decode: TableStepTime
    prefill: TableStepTime
    host: HostTime

    def __post_init__(self) -> None:
        check_int("profile.kv_bytes_per_token", self.kv_bytes_per_token, 1)
        check_bool("profile.overlap", self.overlap)
        if self.prefill.slope <= 0:
            raise ConfigError(
                "profile.prefill.seconds is the same for all its tokens, so that longer prompts would cost nothing; "
                "give it entries over a range in which time rises"
            )

    @property
    def device(self) -> TwoPhaseStepTime:
        """The fitted function."""
        return TwoPhaseStepTime(self.decode, self.prefill)

    @property
    def shares(self) -> bool:
        """Whether decodes of the runs that it was fitted to read once what they have in common."""
        return self.decode.per_distinct_kv_token > 0

    def step_time(
        self,
        sizes: ModelSizes,
        block_size: int,  # noqa: ARG002 - as of Card
        expert_skew: float = 0.0,
        ranks: Ranks = ONE_CARD,
    ) -> StepTime:
        """The fitted function. Raises ConfigError when the model is another one, or its routing was not measured."""
        if ranks.number > 1:
            raise ConfigError(
                f"runner.profile was measured on one card, and {ranks.number} are asked for; take h200 or h200-tables"
            )
        if expert_skew:
            raise ConfigError(
                f"runner.expert_skew={expert_skew} is for a card: a measured profile has the routing of the runs that "
                "it was fitted to; leave it out"
            )
        found, measured = sizes.spec.kv_bytes_per_token, self.kv_bytes_per_token
        if found != measured:
            raise ConfigError(
                f"runner.profile was measured with model {self.model!r} ({measured} bytes of KV a token), and model "
                f"{sizes.spec.name!r} in {_dtype_name(sizes)} has {found}; set model and engine.dtype to what was "
                "measured, or take a card's profile"
            )
        return self.device

    def check_overlap(self, overlap: bool) -> None:
        """Raise ConfigError unless the profile is of runs with, or without, overlap as asked for."""
        if overlap != self.overlap:
            raise ConfigError(
                f"runner.profile was measured with engine.overlap={str(self.overlap).lower()}; set the same, or take a "
                "profile measured with the other"
            )

    def facts(
        self, sizes: ModelSizes, block_size: int, expert_skew: float = 0.0, ranks: Ranks = ONE_CARD
    ) -> dict[str, Any]:
        """Figures and their source."""
        self.step_time(sizes, block_size, expert_skew, ranks)
        return {"kind": "measured"} | asdict(self)


Profile = Card | MeasuredProfile | TablesProfile
PARTS: dict[str, type] = {
    "host": HostTime, "decode": TableStepTime, "prefill": TableStepTime, "fitted": FittedRange,
    "collectives": Collectives,
}  # fmt: skip
KINDS: dict[str, type[Profile]] = {"card": Card, "measured": MeasuredProfile, "tables": TablesProfile}


def load_profile(name: str) -> Profile:
    """The profile of conf/profile/NAME.yaml, or of a file.

    Raises:
        ConfigError: there is none, or it is not a profile.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = CONF_DIR / "profile" / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in (CONF_DIR / "profile").glob("*.yaml")))
        raise ConfigError(f"runner.profile={name} is neither a profile ({known}) nor a YAML file")
    try:
        content = OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"runner.profile={path} cannot be read as YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict) or content.get("kind") not in KINDS:
        raise ConfigError(f"runner.profile={path} must be a mapping with kind: {' or '.join(KINDS)}")
    values = {str(key): value for key, value in content.items()}
    kind = KINDS[values.pop("kind")]
    if isinstance(exchange := values.get("collectives"), dict) and isinstance(exchange.get("all_reduce"), dict):
        tables = {
            ranks: _build(AllReduce, f"{path}: all_reduce", table) for ranks, table in exchange["all_reduce"].items()
        }
        values["collectives"] = exchange | {"all_reduce": tables}
    if kind is TablesProfile and isinstance(values.get("tables"), str):
        values["tables"] = str(path.parent / values["tables"])
    for key, part in PARTS.items():
        if values.get(key) is not None:
            values[key] = _build(part, f"{path}: {key}", values[key])
    return _build(kind, str(path), values)


def write_profile(profile: Profile, path: Path) -> None:
    """Write a profile as `load_profile` reads it."""
    kind = next(name for name, kind in KINDS.items() if isinstance(profile, kind))
    values = {key: value for key, value in asdict(profile).items() if value is not None}
    how = "Fitted by experiment=calibrate" if kind == "measured" else "Made by an experiment"
    path.write_text(f"# {how} (docs/simulator.md); all times in seconds.\n{OmegaConf.to_yaml({'kind': kind} | values)}")


def _build(kind: type, where: str, values: Any) -> Any:
    """A dataclass from a mapping of its fields."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where} must be a mapping")
    known = [field.name for field in fields(kind)]
    unknown = [key for key in values if key not in known]
    if unknown:
        raise ConfigError(f"{where} has an unknown key {unknown[0]!r}; known here: {', '.join(known)}")
    try:
        return kind(**values)
    except TypeError as error:
        raise ConfigError(f"{where} lacks a key: {error}") from error


def _dtype_name(sizes: ModelSizes) -> str:
    return str(sizes.spec.dtype).removeprefix("torch.")
