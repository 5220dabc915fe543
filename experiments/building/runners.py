"""Which runner a config gets: on a GPU the fused one with CUDA graphs, where model and settings allow it.

Every choice that `auto` makes is a fact of the run: it stands in the manifest with its reason.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from transformers import PretrainedConfig

from kvarena.engine.attention.base import AttentionBackend, SharingBackend
from kvarena.engine.attention.reference import ReferenceBackend
from kvarena.engine.clock import Clock
from kvarena.engine.errors import ConfigError
from kvarena.engine.fusions.decoder import FusedDecoder
from kvarena.engine.fusions.detect import NotFusable, fuse
from kvarena.engine.fusions.ops import Ops, TorchOps
from kvarena.engine.fusions.panels import in_panels, restore
from kvarena.engine.fusions.reducing_ops import Reducer
from kvarena.engine.models import LoadedModel
from kvarena.engine.pool.kv_pool import KVPool
from kvarena.engine.quantization.hopper import PROMPT_ROWS
from kvarena.engine.quantization.linear import prepare_products, settle_products
from kvarena.engine.runner.fused_runner import FusedRunner
from kvarena.engine.runner.graphs import ReservingBackend
from kvarena.engine.runner.step_graphs import decode_buckets, graph_tokens
from kvarena.engine.runner.torch_runner import TorchRunner
from kvarena.experiments.settings.config import RunnerConfig
from kvarena.experiments.settings.explain import first_line

Facts = dict[str, Any]


def make_runner(
    config: RunnerConfig,
    model: LoadedModel,
    pool: KVPool,
    backend: AttentionBackend,
    *,
    seed: int,
    clock: Clock,
    max_num_seqs: int,
    max_model_len: int,
    num_scores: int = 0,
    all_reduce: str = "auto",
) -> tuple[TorchRunner, Facts]:
    """The runner that section `runner` asks for, and what the manifest says of it.

    `auto` means: if possible; on a CPU only with `runner.cpu=fused`. With `runner.cpu=modules` the fused forward runs
    on a CPU when it is asked for, in plain torch. Graphs do not exist there.

    Raises:
        ConfigError: `true` cannot be had; says why.
    """
    on_gpu = pool.device.type == "cuda"
    if on_gpu and config.cpu != "fused":
        raise ConfigError(f"runner.cpu={config.cpu} is of a CPU, and this run is on a GPU; leave it out")
    if not on_gpu:
        others = {"graphs": config.graphs, "share_reads": config.share_reads, **_gemm_settings(config)}
        for name, value in others.items():
            if value not in ("auto", False):
                raise ConfigError(f"runner.{name}={_word(value)} needs a GPU; leave it out")
    restore(model)  # what an earlier runner took of it
    wants_fused = config.fusions is True or on_gpu or (config.cpu == "fused" and model.shard is None)
    reducer = _reducer(model, all_reduce) if wants_fused else None
    decoder, reason = _fused(config, model, max_model_len, reducer) if wants_fused else (None, None)
    if reason is not None and config.fusions is True:
        raise ConfigError(f"runner.fusions=true, and {reason}; use auto or false")
    if decoder is None and (stated := _gemm_settings(config)):
        name, value = next(iter(stated.items()))
        raise ConfigError(f"runner.{name}={value} is of the fused forward, which this run has not; leave it out")
    kernels = settle_products(model.module, model.spec.dtype)
    graphs, no_graphs = _graphs(config, backend, decoder) if on_gpu else (False, None)
    facts: Facts = {"fusions": decoder is not None, "graphs": graphs, "attention": type(backend).__name__}
    shares = _shares(config, model, backend)
    if model.shard is not None:
        facts["ranks"] = _ranks(model, reducer)
    if kernels:
        facts["packed_kernels"] = kernels
        if graphs:
            prepare_products(model.module, model.spec.dtype, (*decode_buckets(max_num_seqs), *PROMPT_ROWS))
    if on_gpu:
        facts["share_reads"] = shares
        # Imported here, as in `_ops`.
        from kvarena.engine.attention.triton_backend import TritonBackend

        if isinstance(backend, TritonBackend):
            facts |= {"decode_kernel": backend.decode_kernel, "prefill_kernel": backend.prefill_kernel}
    else:
        facts["cpu"] = config.cpu
    if model.spec.experts is not None:
        fused = decoder is not None and decoder.num_read is not None
        # What transformers chose of its own: torch's grouped product wherever the class can take it.
        facts["experts"] = "fused" if fused else getattr(model.module.config, "_experts_implementation", None)
    facts |= {key: why for key, why in (("no_fusions", reason), ("no_graphs", no_graphs)) if why is not None}
    if not on_gpu and config.cpu == "fused" and model.shard is None:
        # Imported here: numba is not needed, and takes its time, without such kernels.
        from kvarena.engine.runner.cpu_runner import CpuRunner

        runner: TorchRunner = CpuRunner(model, pool, backend, decoder, seed=seed, clock=clock, num_scores=num_scores)
        return runner, facts
    if decoder is None and (not on_gpu or _is_staged(model)):
        runner = _plain_runner(model, pool, backend, seed=seed, clock=clock, num_scores=num_scores, shares=shares)
        return runner, facts
    mixed = graphs and config.graphs != "decode"
    runner = _fused_runner(
        model, pool, backend, decoder, seed=seed, max_num_seqs=max_num_seqs, max_model_len=max_model_len,
        graphs=graphs, mixed_tokens=graph_tokens(model.spec.active_parameters) if mixed else 0, clock=clock,
        num_scores=num_scores, shares=shares,
    )  # fmt: skip
    if reducer is not None:
        runner.reducer = reducer  # type: ignore[attr-defined] # for whoever times it
    return runner, facts


def attention_backend(config: RunnerConfig, model: LoadedModel, pool: KVPool) -> AttentionBackend:
    """The attention that section `runner` asks for, over `pool`. Raises ConfigError."""
    on_gpu = pool.device.type == "cuda"
    contiguous = config.layout == "contiguous"
    if config.attention == "triton" and not on_gpu:
        raise ConfigError("runner.attention=triton needs a GPU; use reference or auto")
    if config.attention == "reference" or not (on_gpu or config.cpu == "fused"):
        return ReferenceBackend(pool, contiguous=contiguous)
    if not on_gpu:
        # Imported here: numba is not needed, and takes its time, without such kernels.
        from kvarena.engine.attention.cpu_backend import CpuBackend

        return CpuBackend(pool, contiguous=contiguous)
    # Imported here: Triton is not needed, and may not be there, without a GPU.
    from kvarena.engine.attention.triton_backend import TritonBackend

    text_config = cast(PretrainedConfig, model.module.config).get_text_config()
    # The CUDA kernels do plain layers; where there is none, contexts are better cut for the others.
    use_hopper = config.attention == "auto" and model.spec.has_plain_layers
    return TritonBackend(pool, text_config.num_attention_heads, contiguous=contiguous, use_hopper=use_hopper)


def _plain_runner(model: LoadedModel, *parts: Any, **options: Any) -> TorchRunner:
    """A runner on modules: of one device, of the planning rank, or of another one."""
    if model.shard is None:
        return TorchRunner(model, *parts, **options)
    # Imported here: of one device nothing of it is needed.
    from kvarena.engine.ranks.runners import PlanningRunner, RankRunner

    kind = PlanningRunner if model.shard.layout.rank == 0 else RankRunner
    return kind(model, *parts, **options)


def _fused_runner(model: LoadedModel, *parts: Any, **options: Any) -> FusedRunner:
    """The same on fused layers."""
    if model.shard is None:
        return FusedRunner(model, *parts, **options)
    from kvarena.engine.ranks.runners import FusedPlanningRunner, FusedRankRunner

    kind = FusedPlanningRunner if model.shard.layout.rank == 0 else FusedRankRunner
    return kind(model, *parts, **options)


def _ranks(model: LoadedModel, reducer: Reducer | None) -> Facts:
    """What the manifest says of the ranks: how many, and how they add up, with what that took here."""
    assert model.shard is not None
    layout = model.shard.layout
    found: Facts = {"tensor": layout.tensor, "pipeline": layout.pipeline}
    chosen, table = getattr(reducer, "chosen", None), getattr(reducer, "table", None)
    if chosen:
        found["all_reduce"] = {str(size): way for size, way in chosen.items()}
    if left_out := getattr(reducer, "left_out", None):
        found["all_reduce_left_out"] = left_out
    if table:
        found["all_reduce_us"] = {str(size): times for size, times in table.items()}
    return found


def _reducer(model: LoadedModel, way: str) -> Reducer | None:
    """What adds up the parts of a stage's ranks, for the fused forward; None where one rank has all."""
    if model.groups is None:
        return None
    # Imported here: of one device nothing of it is needed.
    from kvarena.engine.ranks.all_reduce import make_reducer

    text = cast(PretrainedConfig, model.module.config).get_text_config()
    return make_reducer(model.groups, text.hidden_size, model.spec.dtype, way)


def _is_staged(model: LoadedModel) -> bool:
    return model.shard is not None and model.shard.layout.pipeline > 1


def _fused(
    config: RunnerConfig, model: LoadedModel, max_model_len: int, reducer: Reducer | None
) -> tuple[FusedDecoder | None, str | None]:
    """The fused decoder, or why there is none."""
    if config.fusions is False:
        return None, None
    ops = _ops(config, model.device, model.spec.dtype)
    try:
        decoder = fuse(model, ops, max_model_len, reducer)
    except NotFusable as error:
        return None, f"the model runs on its modules: {error}"
    if model.device.type == "cpu" and config.cpu == "fused" and decoder.ops is ops:
        # Imported here: numba is not needed, and takes its time, without such kernels.
        from kvarena.engine.cpu.compiler import has_team
        from kvarena.engine.cpu.panels import WIDTH

        # Where kernels have one thread, torch's products have all.
        if has_team() or torch.get_num_threads() == 1:
            decoder = in_panels(decoder, model, WIDTH)
    return decoder, None


def _shares(config: RunnerConfig, model: LoadedModel, backend: AttentionBackend) -> bool:
    """Whether decodes read once what they have in common. `auto` does not: no device has timed it yet."""
    if config.share_reads is not True:
        return False
    reason = None
    if not isinstance(backend, SharingBackend):
        reason = "the attention backend reads each context by itself; runner.attention=triton does not"
    elif config.layout == "contiguous":
        reason = "contiguous regions have no block in common; use runner.layout=paged"
    elif model.shard is not None:
        reason = "the ranks of a model read each context by itself"
    if reason is not None:
        raise ConfigError(f"runner.share_reads=true, and {reason}; use auto or false")
    return True


def _gemm_settings(config: RunnerConfig) -> dict[str, Any]:
    """What the config says of the products' kernels that is not the default."""
    defaults = {"gemm": "auto", "gemm_rows": None, "gemm_table": None}
    return {name: value for name, default in defaults.items() if (value := getattr(config, name)) != default}


def _word(value: bool | str | int) -> str:
    """As a command line says it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _ops(config: RunnerConfig, device: torch.device, dtype: torch.dtype) -> Ops:
    if device.type != "cuda":
        if config.cpu == "modules":
            return TorchOps()
        from kvarena.engine.fusions.cpu_ops import CpuOps

        return CpuOps(dtype, dtype)
    # Imported here: Triton is not needed, and may not be there, without a GPU.
    from kvarena.engine.fusions.triton_ops import TritonOps
    from kvarena.engine.kernels.gemm.table import ROW_BUCKETS, GemmTable

    if config.gemm == "library" or dtype.itemsize != 2:
        return TritonOps(device, None)
    file = config.gemm_table
    limits = config.gemm_rows or ROW_BUCKETS[-1], torch.cuda.get_device_properties(device).multi_processor_count
    try:
        table = GemmTable(*limits) if file is None else GemmTable.from_json(Path(file).read_text(), *limits)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"runner.gemm_table={file} is no table of kvarena benchmark gemm ({first_line(error)}); give its --out file"
        ) from error
    return TritonOps(device, table, hopper=config.gemm == "auto")


def _graphs(config: RunnerConfig, backend: AttentionBackend, decoder: FusedDecoder | None) -> tuple[bool, str | None]:
    """Whether decode steps are captured, and why not where `auto` decides against it."""
    if config.graphs is False:
        return False, None
    reason = None
    if not isinstance(backend, ReservingBackend):
        reason = "the attention backend has no plan of fixed address; runner.attention=triton has"
    elif decoder is None:
        # transformers' own code may wait for the device in the middle of a forward.
        reason = "graphs hold the fused forward, which this run has not"
    elif not decoder.is_capturable:
        reason = "the model's experts are transformers modules, which may wait for the device"
    if reason is not None and config.graphs != "auto":
        raise ConfigError(f"runner.graphs={_word(config.graphs)}, and {reason}; use auto or false")
    return reason is None, reason
