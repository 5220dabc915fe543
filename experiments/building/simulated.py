"""Builds a simulated engine: the strategy of the config over a model's sizes and a profile, with no weights."""

from __future__ import annotations

from itertools import islice

from kvarena.engine.clock import MovableClock, VirtualClock
from kvarena.engine.errors import ConfigError
from kvarena.engine.ledger import MemoryLedger
from kvarena.engine.models.sizes import ModelSizes
from kvarena.experiments.building.parts import (
    EngineParts,
    first_strategy,
    overlaps,
    pool_blocks,
    pool_facts,
    resolve_max_model_len,
    sizes_of,
)
from kvarena.experiments.settings.config import RunConfig, SimulatedRunnerConfig
from kvarena.experiments.simulation.collectives import Ranks, kv_share
from kvarena.experiments.simulation.expert_load import expert_load
from kvarena.experiments.simulation.profiles import MeasuredProfile, Profile, load_profile
from kvarena.experiments.simulation.runner import SimulatedRunner
from kvarena.experiments.workloads.parts.beam_scores import BeamScores


def build_simulated_engine(config: RunConfig, clock: MovableClock | None = None) -> EngineParts:
    """Build the engine that `config` describes, without a workload.

    Args:
        config: of the run.
        clock: of the engine and its runner; None: one of its own.

    Raises:
        ConfigError: a setting is out of range or does not fit another one.
        ModelError: the model's config is missing, broken, or not of standard attention.
    """
    assert isinstance(config.runner, SimulatedRunnerConfig)
    profile_name = config.runner.profile
    profile = load_profile(profile_name)
    overlap = overlaps(config.engine, auto=isinstance(profile, MeasuredProfile) and profile.overlap)
    profile.check_overlap(overlap)
    sizes = sizes_of(config)
    spec, block_size = sizes.spec, config.allocator.need("block_size")
    max_model_len = resolve_max_model_len(config.engine, spec)
    num_blocks = pool_blocks(config, spec, available=_available_bytes(config, profile_name, sizes, profile))
    strategy = first_strategy(config, num_blocks, max_model_len, spec)
    ranks = Ranks(config.parallel.tensor_parallel_size, config.parallel.pipeline_parallel_size)
    ledger = MemoryLedger()
    if clock is None:
        clock = VirtualClock()
    skew = config.runner.expert_skew
    if config.runner.share_reads is True and isinstance(profile, MeasuredProfile) and not profile.shares:
        raise ConfigError(
            f"runner.share_reads=true, and runner.profile={profile_name} was fitted to runs in which each request read "
            "its own context; take a card's profile, or leave it out"
        )
    shares = config.runner.share_reads is True
    tokens = _harmless_tokens(sizes)
    if config.sampling.beams >= len(tokens) - len(spec.eos_token_ids):
        raise ConfigError(
            f"sampling.beams={config.sampling.beams} is more than a simulated model has tokens for, {len(tokens)}; "
            "search fewer beams"
        )
    runner = SimulatedRunner(
        profile.step_time(sizes, block_size, skew, ranks), clock, tokens[0], host=profile.host,
        experts=None if sizes.spec.experts is None else expert_load(sizes, skew), shares=shares,
        beam_scores=BeamScores(tokens) if config.sampling.beams else None,
    )  # fmt: skip
    return EngineParts(
        engine=strategy.engine(runner, clock, overlap=overlap, ledger=ledger),
        clock=clock,
        ledger=ledger,
        spec=spec,
        special_token_ids=sizes.special_token_ids,
        model=None,
        max_model_len=max_model_len,
        pool_facts=pool_facts(strategy.allocator, spec, {"simulated": True, "share_reads": shares}),
        config=config.engine,
        simulator=runner,
        simulation_facts={"profile": profile_name} | profile.facts(sizes, block_size, skew, ranks),
        outside=profile.fitted.outside if isinstance(profile, MeasuredProfile) else None,
    )


def _available_bytes(config: RunConfig, profile_name: str, sizes: ModelSizes, profile: Profile) -> int | None:
    """What the weights leave of the memory of all cards; None where the config says how large the pool is.

    KV heads that several cards keep alike take their memory on each of them.
    """
    if config.kv_cache.sized_by is not None:
        return None
    if isinstance(profile, MeasuredProfile):
        raise ConfigError(
            f"runner.profile={profile_name} is a measured one, which does not say how much memory its card has; "
            "set kv_cache.num_slots"
        )
    share = config.engine.gpu_memory_utilization
    ranks = Ranks(config.parallel.tensor_parallel_size, config.parallel.pipeline_parallel_size)
    available = int(profile.memory_bytes * share) * ranks.number - sizes.weight_bytes
    if available <= 0:
        cards = "the profile's" if ranks.number == 1 else f"the {ranks.number} cards'"
        raise ConfigError(
            f"model {sizes.spec.name!r} has {sizes.weight_bytes / 1e9:.1f} GB of weights, which do not fit into "
            f"engine.gpu_memory_utilization={share} of {cards} {ranks.number * profile.memory_bytes / 1e9:.0f} GB; "
            "take a larger card, more of them (parallel.tensor_parallel_size), or state kv_cache.num_slots"
        )
    return available * kv_share(ranks, sizes) // ranks.number


def _harmless_tokens(sizes: ModelSizes) -> list[int]:
    """The smallest tokens that are text: they end no request."""
    found = (token for token in range(sizes.spec.vocab_size) if token not in sizes.special_token_ids)
    return list(islice(found, 256))
