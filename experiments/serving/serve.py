"""Serves what a config describes: `python run.py mode=serve allocator=paged scheduler=chunked model.path=DIR`.

The same config builds the same engine as in a benchmark; only the web front is added. The engine is built in its own
process, from the same config.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from kvarena.engine.checkpoints.directory import is_model_name
from kvarena.engine.errors import ConfigError
from kvarena.engine.importing import importing
from kvarena.engine.server.engine.served import ServedEngine
from kvarena.engine.server.processes.engine import ALONE, Place
from kvarena.engine.server.processes.process import ModelFiles
from kvarena.engine.server.processes.supervisor import serve as run_server
from kvarena.engine.server.shared.ipc import EngineInfo
from kvarena.experiments.building.model_files import check_model
from kvarena.experiments.folders.recordings import check_recording_place, engine_folder
from kvarena.experiments.recording.served.prefixes import KEY_BYTES
from kvarena.experiments.serving.router import make_router
from kvarena.experiments.settings.config import RunConfig
from kvarena.experiments.settings.explain import explain
from kvarena.reports.reading.names import cell_name
from kvarena.reports.reading.packages import missing_extra

if TYPE_CHECKING:  # torch
    from kvarena.experiments.building.parts import EngineParts

logger = logging.getLogger("kvarena.engine")


def serve(config: RunConfig, choices: Mapping[str, str], words: Callable[[str], str] = str) -> int:
    """Serve until told to stop; returns the exit code.

    Args:
        config: with mode=serve.
        choices: what its groups were set to, `allocator` and `scheduler` among them.
        words: turns the settings that an error names into the words of the command that was given; must pickle.

    Raises:
        ConfigError: a setting does not do. Faults of the model are found in the engine's process, which prints
            one line; the exit code is then 2.
    """
    server = config.server
    assert server is not None
    directory = check_model(config, tokenizer=True)
    if directory is None:
        raise ConfigError("mode=serve needs a tokenizer: set model.path to a model directory")
    strategy = {group: choices[group] for group in ("allocator", "scheduler")}
    if not server.served_model_names:
        shown, *others = _names(config, directory)
        server = replace(server, served_model_names=(shown,), model_aliases=(*server.model_aliases, *others))
    server = server.with_keys(os.environ)
    if server.kv_events.is_on and (missing := missing_extra("events")):
        raise ConfigError(f"server.kv_events: {missing}")
    if server.record is not None:
        count = 1 if config.router is None else int(config.router.need("num_replicas"))
        for rank in range(count):
            check_recording_place(engine_folder(server.record, rank, count))
    model = ModelFiles(str(directory), config.model.trust_remote_code, words)
    # Drawn here, for several engines and those that take another's place hash alike.
    factory = functools.partial(build_served_engine, config, strategy, words, record_key=os.urandom(KEY_BYTES))
    return run_server(server, model, factory, None if config.router is None else make_router(config.router))


def _names(config: RunConfig, directory: Path) -> tuple[str, ...]:
    """What a model answers to without --served-model-name; the first is the one that is shown."""
    path = str(config.model.path)
    names = [path, path.rpartition("/")[2]] if is_model_name(path) else [directory.name, path]
    if config.model.name is not None:
        names.insert(0, str(config.model.name))
    return tuple(dict.fromkeys(names))


def build_served_engine(
    config: RunConfig,
    strategy: dict[str, str],
    words: Callable[[str], str] = str,
    place: Place = ALONE,
    record_key: bytes = b"",
) -> ServedEngine:
    """Build an engine in this process.

    Args:
        config: of the server.
        strategy: names of the allocator and the scheduler; empty where nobody asks for them.
        words: turns the settings that an error names into the words of the command that was given.
        place: which of the server's engines it is.
        record_key: of the hashes of what is recorded.

    Raises:
        KvarenaError: a setting or the model is wrong.
    """
    try:
        if place.num_engines > 1:
            _take_devices(config, place)
        return _build(config, strategy, words, place, record_key)
    except Exception as error:
        # Hydra wraps what a component's own check says; anything that is not the user's doing keeps its trace.
        reason = explain(error)
        if reason is None:
            raise
        raise ConfigError(words(reason)) from error


def _take_devices(config: RunConfig, place: Place) -> None:
    """Leave this process, and its ranks, the GPUs that are its own. Nothing has touched one before."""
    device, size = config.engine.device, config.parallel.world_size
    if device == "cpu" or config.parallel.executor == "ray":
        return
    with importing():
        import torch

    given = [one.strip() for one in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if one.strip()]
    count = torch.cuda.device_count()
    if not count and device == "auto":
        return
    if place.num_engines * size > count:
        raise ConfigError(
            f"router.num_replicas={place.num_engines} engines of {size} GPUs each need {place.num_engines * size}, and "
            f"this machine has {count}; lower it"
        )
    visible = given or [str(number) for number in range(count)]
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(visible[place.rank * size : (place.rank + 1) * size])


def _build(
    config: RunConfig, strategy: dict[str, str], words: Callable[[str], str], place: Place, record_key: bytes
) -> ServedEngine:
    with importing():
        from kvarena.engine.checkpoints.tokenizer import load_tokenizer
        from kvarena.engine.server.engine.compiled import make_compiler
        from kvarena.experiments.building.build import build_engine
        from kvarena.experiments.building.warm_up import SERVED, tell_step_times, warm_up

    # Before the weights: a tokenizer that cannot be read must not wait for them.
    tokenizer = load_tokenizer(str(config.model.path), config.model.trust_remote_code)
    parts = build_engine(config, whole_context=True)
    parts.engine.ledger = None  # the loop's own takes its place: this one keeps every step, and a server runs for ever
    warm = warm_up(config, parts, SERVED)
    tell_step_times(config, parts)
    logger.info(
        "the engine has warmed up in %.1f s, of which %.1f s for %d shapes of steps",
        warm.seconds, warm.shape_seconds, warm.num_shapes,
    )  # fmt: skip
    spec = parts.spec
    allocator = parts.engine.allocator
    compiler = make_compiler(tokenizer, spec.vocab_size, frozenset(spec.eos_token_ids))
    logger.info("%s", serving_line(parts, strategy))
    info = EngineInfo(
        max_model_len=parts.max_model_len,
        max_request_tokens=allocator.max_request_tokens,
        vocab_size=spec.vocab_size,
        eos_token_ids=tuple(sorted(spec.eos_token_ids)),
        num_blocks=allocator.num_blocks,
        block_size=allocator.block_size,
        constraints=compiler is not None,
        prompt_logprobs=True,
        priorities=parts.engine.scheduler.has_priorities,
        facts={
            "cache_dtype": "auto",
            "gpu_memory_utilization": str(config.engine.gpu_memory_utilization),
            "enable_prefix_caching": str(allocator.reads_tokens),
            "num_cpu_blocks": str(allocator.num_host_blocks),
            "kv_offloading_size": str(config.kv_cache.host_gib or None),
            "kv_offloading_backend": "native" if config.kv_cache.host_gib else "None",
            "sliding_window": str(spec.sliding_window),
        },
        about=strategy | {"dtype": str(spec.dtype).removeprefix("torch.")},
    )
    images = None if parts.model is None else parts.model.images
    image_counts = None if images is None else lambda: images.counts
    peers = None if parts.model is None else parts.model.peers
    recorder = None
    if config.server is not None and config.server.record is not None:
        from kvarena.experiments.serving.served_recording import make_recorder

        recorder = make_recorder(config, strategy, parts, place, record_key)
    return ServedEngine(parts.engine, info, compiler, words, image_counts=image_counts, peers=peers, recorder=recorder)


def serving_line(parts: EngineParts, strategy: Mapping[str, str]) -> str:
    """What a server has to give, for its log: model, strategy, pool."""
    from kvarena.engine.pool.memory_limits import size_text

    spec, slots = parts.spec, parts.pool_facts["num_slots"]
    device = parts.config.device if parts.model is None else parts.model.device.type
    dtype = str(spec.dtype).removeprefix("torch.") + (f" ({spec.quantization})" if spec.quantization else "")
    named = ", " + cell_name(strategy["allocator"], strategy["scheduler"]) if strategy else ""
    if parts.model is not None and parts.model.shard is not None:
        layout = parts.model.shard.layout
        device += f", a rank of {layout.world_size} ({layout.tensor} x {layout.pipeline})"
    return (
        f"{spec.name}: {spec.num_parameters / 1e6:,.1f}M weights in {dtype} on {device}{named}; KV pool of "
        f"{slots:,} tokens ({size_text(parts.pool_facts['bytes'])}), room for "
        f"{parts.engine.allocator.max_requests(parts.max_model_len):,} requests of {parts.max_model_len:,} tokens"
        f"{_images_text(parts)}"
    )


def _images_text(parts: EngineParts) -> str:
    """How images are cut, and how much of what was encoded is kept; empty for a model that reads text only."""
    from kvarena.engine.pool.memory_limits import size_text

    if parts.model is None or parts.model.images is None:
        return ""
    images = parts.model.images
    cache = images.cache
    return (
        f"; {images.tower.processing.describe()}, the last {cache.num_rows:,} tokens of them kept "
        f"({size_text(cache.num_bytes)})"
    )
