"""The ranks that share a model: started by the planning one, and what each of the others builds from the same config.

planning rank     start | load | num_blocks      | prepare: pool, runner | warm up | steps
the others              | load | num_blocks      | prepare: pool, runner | warm up | steps
                                 the least of all: one pool size for every rank
"""

from __future__ import annotations

import base64
import functools
import pickle
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any, cast

import torch

from kvarena.engine.clock import WallClock
from kvarena.engine.contract import KVAllocator
from kvarena.engine.errors import ConfigError, NotDefined
from kvarena.engine.fusions.ops import Norm
from kvarena.engine.models import LoadedModel
from kvarena.engine.models.parts import check_parts
from kvarena.engine.parallel.groups import Groups
from kvarena.engine.parallel.layout import Layout
from kvarena.engine.parallel.shard import PIPELINE, TENSOR
from kvarena.engine.pool.gpu_memory import GpuMemory
from kvarena.engine.ranks.peers import Peers, ThreadPeers
from kvarena.engine.runner.fused_runner import FusedRunner
from kvarena.engine.runner.torch_runner import TorchRunner
from kvarena.experiments.building.loading import load, num_blocks
from kvarena.experiments.building.parts import target_device
from kvarena.experiments.building.pools import make_pool
from kvarena.experiments.building.runners import attention_backend, make_runner
from kvarena.experiments.building.shared import give_memory_back
from kvarena.experiments.settings.config import RunConfig, RunnerConfig

# What a pool's shape is read from.
_POOL_FIELDS = ("num_blocks", "num_virtual_blocks", "num_host_blocks", "block_size", "contiguous")


def layout_of(config: RunConfig) -> Layout:
    """How the config shares the model out; raises ConfigError where this machine has too few devices."""
    parallel = config.parallel
    layout = Layout(parallel.tensor_parallel_size, parallel.pipeline_parallel_size)
    if layout.world_size > 1 and target_device(config.engine.device) == "cuda" and parallel.executor != "ray":
        count = torch.cuda.device_count()
        if layout.world_size > count:
            name = TENSOR if layout.tensor > count or layout.pipeline == 1 else PIPELINE
            size = layout.tensor if name == TENSOR else layout.pipeline
            raise ConfigError(
                f"{name}={size} needs {layout.world_size} GPUs ({layout}), and this machine has {count}; lower it"
            )
    return layout


def start_peers(config: RunConfig, layout: Layout) -> Peers:
    """Start the other ranks. Raises RankFailed, ConfigError."""
    parallel, device, model = config.parallel, target_device(config.engine.device), config.model
    name = cast(str | None, model.name)
    check_parts(layout, model.path, model.shape, name, model.trust_remote_code, model.load_format, model.quantization)
    factory = functools.partial(BuiltRank, config)
    if parallel.executor == "threads":
        if device == "cuda":
            raise ConfigError("parallel.executor=threads is for a CPU; use auto")
        return ThreadPeers(layout, factory, parallel.timeout, check_plans=parallel.check_plans)
    # Imported here: of one process nothing of it is needed.
    if parallel.executor == "ray":
        if find_spec("ray") is None:
            raise ConfigError("parallel.executor=ray needs Ray: pip install 'kvarena[ray]', or use auto")
        from kvarena.engine.ranks.actors import ActorPeers as kind
    else:
        from kvarena.engine.ranks.processes import ProcessPeers as kind  # type: ignore[assignment]
    return kind(layout, factory, device, parallel.timeout, check_plans=parallel.check_plans)


class BuiltRank:
    """A rank that does not plan. See `kvarena.engine.ranks.worker.Rank`.

    Args:
        config: of the run, the same on every rank.
        groups: of this rank.
    """

    def __init__(self, config: RunConfig, groups: Groups) -> None:
        self.groups = groups
        self._config = config
        self._in_use_before = 0
        if target_device(config.engine.device) == "cuda":
            self._in_use_before = GpuMemory(torch.device("cuda"), None).context
        self._model = load(config, groups)
        self.runner: TorchRunner | None = None
        self.block_size = 0

    def call(self, name: str, arguments: dict[str, Any]) -> dict[str, Any] | None:
        """See `Rank.call`."""
        if name == "configure":
            self._config = pickle.loads(base64.b64decode(arguments["config"]))
            return None
        if name == "num_blocks":
            longest = arguments["max_model_len"]
            return {"num_blocks": num_blocks(self._config, self._model, self._in_use_before, longest)}
        if name == "prepare":
            if self.runner is not None:  # both pools do not fit
                self.runner.finish()
                self.runner = None
                give_memory_back()
            self.runner = self._prepare(**arguments)
            return {}
        assert self.runner is not None
        if name == "fill_pool":
            self.runner.pool.fill_randomly()
            return None
        if name == "time_all_reduce":
            time_all_reduce(self.runner, **arguments)
            return None
        assert name == "warm_up"
        assert isinstance(self.runner, FusedRunner)
        self.runner.warm_up(**arguments)
        return None

    def _prepare(self, pool_shape: dict[str, Any], max_model_len: int, sized_by: str) -> TorchRunner:
        config, model = self._config, self._model
        runner_config = config.runner
        assert isinstance(runner_config, RunnerConfig)
        allocator = cast(KVAllocator, SimpleNamespace(**pool_shape))
        self.block_size = allocator.block_size
        pool = make_pool(runner_config, allocator, model.spec, target_device(config.engine.device), sized_by)
        return make_runner(
            runner_config, model, pool, attention_backend(runner_config, model, pool), seed=config.engine.seed,
            clock=WallClock(), max_num_seqs=config.scheduler.need("max_num_seqs"), max_model_len=max_model_len,
            num_scores=config.driver.scores,
            all_reduce=config.parallel.all_reduce,
        )[0]  # fmt: skip


def time_all_reduce(runner: TorchRunner, way: str, num_rows: int, *, with_norm: bool) -> float:
    """Microseconds of a sum over the ranks, all of which call this at once; see `AllReduce.time`."""
    reducer: Any = runner.reducer  # type: ignore[attr-defined]
    spec, device = runner.model.spec, runner.pool.device
    size = cast(Any, runner.model.module).config.hidden_size
    x = torch.zeros(num_rows, size, dtype=spec.dtype, device=device)
    norm = Norm(torch.ones(size, dtype=spec.dtype, device=device), 1e-5) if with_norm else None
    with torch.inference_mode():
        return float(reducer.time(way, x, norm=norm))


def configure(peers: Peers, config: RunConfig) -> None:
    """Tell the other ranks which of the configs that share a model comes next."""
    peers.tell("configure", config=base64.b64encode(pickle.dumps(config)).decode())


def least_blocks(model: LoadedModel, own: int) -> int:
    """The blocks that every rank has room for; they have been asked for theirs."""
    peers = peers_of(model)
    return own if peers is None else min([own, *(answer["num_blocks"] for answer in peers.answers())])


def prepare_peers(model: LoadedModel, allocator: KVAllocator, max_model_len: int, sized_by: str, device: str) -> None:
    """Let the other ranks make pool and runner; `Peers.answers` says when they have."""
    peers = peers_of(model)
    if peers is None:
        return
    if device == "cuda" and allocator.num_virtual_blocks != allocator.num_blocks:
        raise NotDefined(
            f"allocator=virtual maps the memory of one GPU, and {TENSOR} and {PIPELINE} share a model between several; "
            "use allocator=paged"
        )
    shape = {name: getattr(allocator, name) for name in _POOL_FIELDS}
    peers.tell("prepare", pool_shape=shape, max_model_len=max_model_len, sized_by=sized_by)


def peers_of(model: LoadedModel) -> Peers | None:
    """The other ranks, where this one plans for them."""
    return cast("Peers | None", model.peers)
