"""Builds a simulated engine: the strategy of the config over a model's sizes and a profile, with no weights."""

from __future__ import annotations

from kvarena.engine.clock import VirtualClock
from kvarena.engine.core import Engine
from kvarena.engine.errors import ConfigError
from kvarena.engine.ledger import MemoryLedger
from kvarena.engine.models.sizes import ModelSizes
from kvarena.engine.pool.kv_pool import blocks_for_budget
from kvarena.experiments.building.parts import (
    EngineParts,
    check_window,
    make_strategy,
    pool_facts,
    resolve_max_model_len,
    say_chosen_pages,
    sizes_of,
)
from kvarena.experiments.settings.config import RunConfig, SimulatedRunnerConfig
from kvarena.experiments.simulation.profiles import Card, Profile, load_profile
from kvarena.experiments.simulation.runner import SimulatedRunner


def build_simulated_engine(config: RunConfig) -> EngineParts:
    """Build the engine that `config` describes, without a workload.

    Raises:
        ConfigError: a setting is out of range or does not fit another one.
        ModelError: the model's config is missing, broken, or not of standard attention.
    """
    assert isinstance(config.runner, SimulatedRunnerConfig)
    profile_name, overlap = config.runner.profile, config.engine.overlap
    profile = load_profile(profile_name)
    profile.check_overlap(overlap)
    sizes = sizes_of(config)
    spec, block_size = sizes.spec, config.allocator.need("block_size")
    max_model_len = resolve_max_model_len(config.engine, spec)
    num_blocks = _num_blocks(config, profile_name, sizes, profile)
    allocator, scheduler = make_strategy(config, num_blocks, max_model_len, spec)
    say_chosen_pages(allocator)
    check_window(allocator, spec)
    clock, ledger = VirtualClock(), MemoryLedger()
    runner = SimulatedRunner(profile.step_time(sizes, block_size), clock, _harmless_token(sizes), host=profile.host)
    return EngineParts(
        engine=Engine(scheduler, allocator, runner, clock, overlap=overlap, ledger=ledger),
        clock=clock,
        ledger=ledger,
        spec=spec,
        special_token_ids=sizes.special_token_ids,
        model=None,
        max_model_len=max_model_len,
        pool_facts=pool_facts(allocator, spec, {"simulated": True}),
        config=config.engine,
        simulator=runner,
        simulation_facts={"profile": profile_name} | profile.facts(sizes, block_size),
        outside=None if isinstance(profile, Card) else profile.fitted.outside,
    )


def _num_blocks(config: RunConfig, profile_name: str, sizes: ModelSizes, profile: Profile) -> int:
    """Usable blocks: what the config states, or what the weights leave of the profile's memory."""
    size, share, available = config.kv_cache, config.engine.gpu_memory_utilization, None
    if size.sized_by is None and not isinstance(profile, Card):
        raise ConfigError(
            f"runner.profile={profile_name} is a measured one, which does not say how much memory its card has; "
            "set kv_cache.num_slots"
        )
    if size.sized_by is None and isinstance(profile, Card):
        available = int(profile.memory_bytes * share) - sizes.weight_bytes
        if available <= 0:
            raise ConfigError(
                f"model {sizes.spec.name!r} has {sizes.weight_bytes / 1e9:.1f} GB of weights, which do not fit into "
                f"engine.gpu_memory_utilization={share} of the profile's "
                f"{profile.memory_bytes / 1e9:.0f} GB; take a larger card, or state kv_cache.num_slots"
            )
    return blocks_for_budget(
        config.allocator.need("block_size"),
        sizes.spec.kv_bytes_per_token,
        num_blocks=size.num_blocks,
        num_slots=size.num_slots,
        memory_gib=size.memory_gib,
        available_bytes=available,
    )


def _harmless_token(sizes: ModelSizes) -> int:
    """The smallest token that is text: it ends no request."""
    return next(token for token in range(sizes.spec.vocab_size) if token not in sizes.special_token_ids)
