"""Builds what a config describes: model, pool, strategy, engine and requests.

    model + engine --> LoadedModel --> pool size --> allocator --> scheduler --> Engine      `build_engine`
    workload + arrival --> requests                                                          `build_load`
    runner=simulated: the model's sizes and a profile in place of model and pool (experiments/building/simulated.py)

Whatever runs an engine has it from `build_engine`: runs, sweeps and studies, the server, `kvarena.LLM`, benchmarks and
checks. They differ in their config alone; those that build several hand over the same `SharedParts`.

The strategy's classes are named by `_target_` in conf/allocator and conf/scheduler; nothing here knows them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch

from kvarena.engine.clock import MovableClock, WallClock
from kvarena.engine.contract import KVAllocator
from kvarena.engine.core import Engine
from kvarena.engine.errors import ConfigError, NotDefined
from kvarena.engine.ledger import MemoryLedger
from kvarena.engine.models import LoadedModel, ModelSpec
from kvarena.engine.pool.gpu_memory import GpuMemory
from kvarena.engine.request import Request, SamplingParams, expand
from kvarena.engine.runner.profile import SETTING, card_memory
from kvarena.experiments.building.context import check_context_fits
from kvarena.experiments.building.loading import load, num_blocks
from kvarena.experiments.building.parts import (
    EngineParts,
    first_strategy,
    overlaps,
    pool_facts,
    resolve_max_model_len,
    target_device,
)
from kvarena.experiments.building.pools import make_pool, room_beside_pool
from kvarena.experiments.building.runners import attention_backend, make_runner
from kvarena.experiments.building.shared import PreparedRunner, SharedParts
from kvarena.experiments.building.simulated import build_simulated_engine
from kvarena.experiments.load.driver import ClosedLoop
from kvarena.experiments.load.replies import RepliedRequest, reply_as_recorded
from kvarena.experiments.settings.config import DriverConfig, RunConfig, RunnerConfig
from kvarena.experiments.settings.targets import instantiate
from kvarena.experiments.workloads.parts.base import WorkloadItem

LAST_ARRIVAL = 1e9  # s, 30 years


@dataclass
class Load:
    """What is asked of an engine, and when.

    Attributes:
        requests: with their arrival times.
        closed_loop: where the requests come from when users wait for answers.
        description: the workload's, one line.
        seed: the workload's.
        cache: whether the prefix cache has seen the prompts before: cold or warm.
    """

    requests: RequestStream
    closed_loop: ClosedLoop | None
    description: str
    seed: int
    cache: str

    def prepare(self, engine: Engine, num_scores: int = 0) -> None:
        """Let an engine answer as the workload says, where it does; before the first request, and after the warm-up.

        Raises:
            ConfigError: scores of sampled tokens are asked for, and the workload says which tokens there are.
        """
        if not self.requests.has_replies:
            return
        if num_scores:
            raise ConfigError(
                f"driver.scores={num_scores} would be of other tokens than the recorded ones; set workload.replies=own"
            )
        reply_as_recorded(engine)

    def manifest(self) -> dict[str, Any]:
        """What the manifest says of the workload, but for its name."""
        count = len(self.requests)
        workload = {"seed": self.seed, "num_requests": count, "description": self.description}
        return {"workload": workload, "cache": self.cache}


@dataclass
class Setup:
    """One cell, ready to run."""

    parts: EngineParts
    load: Load
    driver: DriverConfig


def build(config: RunConfig, shared: SharedParts | None = None) -> Setup:
    """Build the cell that `config` describes.

    Args:
        config: of the run.
        shared: of the cells that run one after the other in this process; None: the cell has everything to itself.

    Raises:
        ConfigError: a setting is out of range or does not fit another one.
        ModelError: the model directory is missing, broken, or cannot be driven.
        TraceError: the workload's file is malformed.
    """
    driver = config.driver
    # The workload is built before the model where it can fail: a typing error in a path must not wait for weights.
    if config.runner.kind == "simulated":
        driver.check_scores("runner=simulated computes no tokens")
    parts = build_engine(config, shared)
    # Nobody reads what is in a prompt where nothing is computed, no prefix is looked for and no token recorded.
    blank = parts.simulator is not None and driver.record != "full" and not parts.engine.allocator.reads_tokens
    load = build_load(config, parts.spec, parts.special_token_ids, blank=blank)
    if needs_future(parts.engine.allocator):
        cast(Any, parts.engine.allocator).foresee(load.requests)
    return Setup(parts, load, driver)


def needs_future(allocator: KVAllocator) -> bool:
    """Whether cached blocks go by what will be asked, which only a workload can tell."""
    policy = getattr(allocator, "policy", None)
    return policy is not None and bool(policy.needs_future)


def refuse_future(allocator: KVAllocator, where: str) -> None:
    """Raises ConfigError where an allocator needs to know what nobody does."""
    if needs_future(allocator):
        raise ConfigError(
            f"{where}, and allocator.eviction={type(allocator.policy).__module__.rpartition('.')[2]} "  # type: ignore[attr-defined]
            "goes by what will be asked; take another policy"
        )


def build_load(config: RunConfig, spec: ModelSpec, special_token_ids: frozenset[int], *, blank: bool = False) -> Load:
    """The workload and its arrivals.

    Args:
        config: of the run.
        spec: sizes of the model that will answer.
        special_token_ids: never drawn into a prompt.
        blank: requests of equal length may share a prompt of blank tokens.
    """
    seed, sampling = config.workload.need("seed"), config.sampling
    workload = instantiate(config.workload, vocab_size=spec.vocab_size, reserved_token_ids=list(special_token_ids))
    arrival = instantiate(config.arrival)
    items = list(workload.items_iter(with_token_ids=not blank))
    times = arrival.times(items, seed)
    if times is not None and len(times) and not times[-1] <= LAST_ARRIVAL:
        raise ConfigError(
            f"the last request would arrive after {times[-1]:.3g} s, and a run may last {LAST_ARRIVAL:.0g} s; raise "
            "the rate of section arrival, or lower workload.num_requests"
        )
    requests = RequestStream(items, times, sampling, frozenset(spec.eos_token_ids))
    if times is None and (sampling.n > 1 or sampling.beams):
        name = "sampling.beams" if sampling.beams else "sampling.n"
        raise ConfigError(
            f"{name}={sampling.num_sequences} with users who wait is not defined; use another arrival than closed_loop"
        )
    least = sampling.beams + len(spec.eos_token_ids)
    if sampling.beams and least > spec.vocab_size:
        raise ConfigError(f"sampling.beams={sampling.beams} needs a vocabulary of {least} tokens; search fewer beams")
    closed_loop = None if times is not None else ClosedLoop(requests, arrival.num_users, arrival.think_time)
    return Load(requests, closed_loop, workload.description, seed, config.driver.cache)


def build_engine(
    config: RunConfig,
    shared: SharedParts | None = None,
    *,
    whole_context: bool = False,
    clock: MovableClock | None = None,
) -> EngineParts:
    """Build the engine that `config` describes, ready for requests; `warm_up` runs it a little.

    Args:
        config: of the run.
        shared: see `build`.
        whole_context: refuse a pool that cannot hold the longest request that is allowed, as a server must.
        clock: of a simulated engine; None: one of its own.

    Raises:
        KvarenaError: see `build`.
    """
    runner_config, engine_config, device_name = config.runner, config.engine, target_device(config.engine.device)
    if not isinstance(runner_config, RunnerConfig):
        if whole_context:
            raise ConfigError("runner=simulated computes no tokens and cannot serve; set runner=torch")
        return build_simulated_engine(config, clock)
    shared = SharedParts() if shared is None else shared
    model, memory = load_shared(config, shared)
    if model.peers is not None:
        from kvarena.experiments.building.ranks import configure

        configure(model.peers, config)
    spec = model.spec
    max_model_len = resolve_max_model_len(engine_config, spec)
    prepared = shared.runner(config)
    blocks = _num_blocks(config, model, shared, max_model_len) if prepared is None else prepared.num_blocks
    strategy = first_strategy(config, blocks, max_model_len, spec, device_name)
    allocator = strategy.allocator
    if whole_context:
        refuse_future(allocator, "nobody knows what a server will be asked")
        check_context_fits(engine_config, config.kv_cache, allocator, spec, max_model_len, memory)
    _check_layout(runner_config, allocator)
    if prepared is not None and not prepared.fits(allocator):
        shared.drop_runner()
        prepared = None
    if prepared is None:
        prepared = _prepare_runner(config, runner_config, model, allocator, max_model_len)
        shared.keep(config, prepared)
    ledger, overlap = MemoryLedger(), overlaps(engine_config, auto=device_name == "cuda")
    engine = strategy.engine(prepared.runner, prepared.clock, overlap=overlap, ledger=ledger)
    facts = pool_facts(allocator, spec, prepared.facts)
    if model.images is not None:
        facts["image_cache"] = {"bytes": model.image_cache_bytes, "num_tokens": model.images.cache.num_rows}
    if memory is not None:
        memory.set_pool(prepared.pool, prepared.pool_in_torch)
    return EngineParts(
        engine,
        prepared.clock,
        ledger,
        spec,
        model.special_token_ids,
        model,
        max_model_len,
        facts,
        engine_config,
        gpu_memory=memory,
    )


def load_shared(config: RunConfig, shared: SharedParts) -> tuple[LoadedModel, GpuMemory | None]:
    """The model that `config` describes, as `build_engine` will find it in `shared`, and what follows the GPU's memory.

    Raises:
        KvarenaError: see `build`.
    """
    memory = None
    if target_device(config.engine.device) == "cuda":
        device = torch.device("cuda")
        memory = GpuMemory(device, shared.context_bytes)
        shared.context_bytes = memory.context
        if config.kv_cache.sized_by is None:
            card_memory(device, memory.context).check_share(config.engine.gpu_memory_utilization)
    return shared.model(config, lambda: _load(config)), memory


def _load(config: RunConfig) -> LoadedModel:
    if config.parallel.world_size == 1:
        return load(config)
    # Imported here, as below: of one device nothing of it is needed.
    from kvarena.experiments.building.ranks import layout_of, start_peers

    peers = start_peers(config, layout_of(config))
    try:
        model = replace(load(config, peers.groups), peers=peers)
        peers.ready()
        return model
    except BaseException:
        peers.close()
        raise


def _num_blocks(config: RunConfig, model: LoadedModel, shared: SharedParts, max_model_len: int) -> int:
    """Usable blocks of the pool: what the rank with the least room has room for."""
    if model.peers is None:
        return num_blocks(config, model, shared.context_bytes or 0, max_model_len)
    from kvarena.experiments.building.ranks import least_blocks

    model.peers.tell("num_blocks", max_model_len=max_model_len)
    return least_blocks(model, num_blocks(config, model, shared.context_bytes or 0, max_model_len))


def _prepare_runner(
    config: RunConfig, runner_config: RunnerConfig, model: LoadedModel, allocator: KVAllocator, max_model_len: int
) -> PreparedRunner:
    """Pool and runner for `allocator`."""
    device, max_num_seqs = target_device(config.engine.device), config.scheduler.need("max_num_seqs")
    sized_by = config.kv_cache.sized_by or SETTING
    allocated = torch.cuda.memory_allocated() if device == "cuda" else 0
    if model.peers is not None:
        from kvarena.experiments.building.ranks import prepare_peers

        prepare_peers(model, allocator, max_model_len, sized_by, device)
    pool = make_pool(runner_config, allocator, model.spec, device, sized_by)
    pool_in_torch = torch.cuda.memory_allocated() - allocated if device == "cuda" else 0
    clock = WallClock()
    with room_beside_pool(max_num_seqs, pool, max_model_len):
        runner, facts = make_runner(
            runner_config,
            model,
            pool,
            attention_backend(runner_config, model, pool),
            seed=config.engine.seed,
            clock=clock,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            num_scores=config.driver.scores,
            all_reduce=config.parallel.all_reduce,
        )
    if model.peers is not None:
        model.peers.answers()
        cast(Any, runner).drive(model.peers)  # the planning rank's
    return PreparedRunner(runner, facts, pool, clock, allocator.num_blocks, pool_in_torch)


def _check_layout(config: RunnerConfig, allocator: KVAllocator) -> None:
    if config.layout == "contiguous" and not allocator.contiguous:
        raise NotDefined(
            "runner.layout=contiguous addresses a region by its start, and this allocator scatters blocks; use "
            "runner.layout=paged, or a contiguous allocator"
        )


class RequestStream:
    """A workload's requests, made as they are asked for: the same for every strategy, and fresh on each pass.

    With `sampling.n` above 1, or beams, each item gives that many requests, which share its prompt and its arrival.

    Args:
        items: the workload, in order of arrival.
        times: arrival times in seconds, or None when users wait for answers.
        sampling: how tokens are picked; `max_tokens` comes from each item.
        eos_token_ids: the model's end-of-sequence tokens.

    Attributes:
        has_replies: the workload knows outputs.
    """

    def __init__(
        self,
        items: Sequence[WorkloadItem],
        times: np.ndarray | None,
        sampling: SamplingParams,
        eos_token_ids: frozenset[int],
    ) -> None:
        self._items = items
        self._times = times
        self._eos_token_ids = eos_token_ids
        self._num_samples = sampling.num_sequences
        self.has_replies = any(item.reply_token_ids is not None for item in items)
        self._sampling = {
            length: replace(sampling, max_tokens=length) for length in {item.output_len for item in items}
        }

    def __len__(self) -> int:
        return len(self._items) * self._num_samples

    def __iter__(self) -> Iterator[Request]:
        for i, item in enumerate(self._items):
            known: dict[str, Any] = {} if item.reply_token_ids is None else {"reply": item.reply_token_ids}
            req = (RepliedRequest if known else Request)(
                request_id=item.request_id or f"request-{i}",
                prompt_token_ids=item.prompt_token_ids,
                sampling=self._sampling[item.output_len],
                arrival_time=0.0 if self._times is None else float(self._times[i]),
                priority=item.priority,
                client_id=item.client_id,
                kind=item.kind,
                eos_token_ids=self._eos_token_ids,
                oracle_output_len=item.output_len,
                **known,
            )
            yield from expand(req)
