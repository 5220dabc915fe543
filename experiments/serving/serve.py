"""Serves what a config describes: `python run.py mode=serve allocator=paged scheduler=chunked model.path=DIR`.

The same config builds the same engine as in a benchmark; only the web front is added. The engine is built in its own
process, from the config as plain values.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from engine.errors import ConfigError, KvarenaError
from engine.importing import importing
from engine.server.config import ServerConfig
from engine.server.process import ModelFiles
from engine.server.served import ServedEngine
from engine.server.supervisor import serve as run_server
from experiments.building.model_files import check_model
from experiments.config import check_values
from experiments.explain import explain

logger = logging.getLogger("kvarena.engine")

CPU_SLOTS = 32768  # of the pool, where neither the config nor a GPU says how large it is


def serve(cfg: DictConfig, choices: Mapping[str, str]) -> int:
    """Serve until told to stop; returns the exit code.

    Args:
        cfg: the composed config.
        choices: what its groups were set to, `allocator` and `scheduler` among them.

    Raises:
        ConfigError: a setting is out of range. Faults of the model are found in the engine's process, which prints
            one line; the exit code is then 2.
    """
    server = ServerConfig.from_dict(OmegaConf.to_container(cfg.server, resolve=True))  # type: ignore[arg-type]
    check_values(cfg)
    directory = check_model(cfg, tokenizer=True)
    if directory is None:
        raise ConfigError("mode=serve needs a tokenizer: set model.path to a model directory")
    values: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    values.pop("hydra", None)
    strategy = {group: choices[group] for group in ("allocator", "scheduler")}
    if not server.served_model_names and cfg.model.name:
        server = ServerConfig.from_dict({**vars(server), "served_model_names": [cfg.model.name]})
    server = server.with_keys(os.environ)
    model = ModelFiles(str(directory), bool(cfg.model.trust_remote_code))
    return run_server(server, model, functools.partial(build_served_engine, values, strategy))


def build_served_engine(values: dict[str, Any], strategy: dict[str, str]) -> ServedEngine:
    """Build the engine in this process.

    Args:
        values: the resolved config.
        strategy: names of the allocator and the scheduler.

    Raises:
        KvarenaError: a setting or the model is wrong.
    """
    try:
        return _build(values, strategy)
    except Exception as error:
        # Hydra wraps what a component's own check says; anything that is not the user's doing keeps its trace.
        reason = explain(error)
        if reason is None or isinstance(error, KvarenaError):
            raise
        raise ConfigError(reason) from error


def _build(values: dict[str, Any], strategy: dict[str, str]) -> ServedEngine:
    with importing():
        import torch

        from engine.checkpoints.tokenizer import load_tokenizer
        from engine.server.compiled import make_compiler
        from experiments.building.build import build_engine
        from experiments.building.warm_up import SERVED, warm_up

    cfg = OmegaConf.create(values)
    if all(size is None for size in values["kv_cache"].values()) and not torch.cuda.is_available():
        cfg.kv_cache.num_slots = CPU_SLOTS
    # Before the weights: a tokenizer that cannot be read must not wait for them.
    tokenizer = load_tokenizer(cfg.model.path, bool(cfg.model.trust_remote_code))
    parts = build_engine(cfg)
    # A ledger keeps every step; a server runs for ever.
    parts.engine.ledger = None
    logger.info("the engine has warmed up in %.1f s", warm_up(cfg, parts, SERVED))
    spec = parts.spec
    eos = frozenset(spec.eos_token_ids)
    allocator = parts.engine.allocator
    facts = {
        "cache_dtype": "auto",
        "gpu_memory_utilization": str(cfg.engine.gpu_memory_utilization),
        "enable_prefix_caching": str(allocator.reads_tokens),
        "num_cpu_blocks": str(allocator.num_host_blocks),
        "sliding_window": str(spec.sliding_window),
    }
    return ServedEngine(
        engine=parts.engine,
        max_model_len=parts.max_model_len,
        vocab_size=spec.vocab_size,
        eos_token_ids=eos,
        compile_grammar=make_compiler(tokenizer, spec.vocab_size, eos),
        prompt_logprobs=True,
        facts=facts,
        about=strategy | {"dtype": str(spec.dtype).removeprefix("torch.")},
    )
