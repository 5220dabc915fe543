"""What a server's recording says of the engine, and the recorder that makes it."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvarena.engine.pool.gpu_memory import NO_GPU
from kvarena.engine.server.processes.engine import Place
from kvarena.experiments.building.parts import EngineParts
from kvarena.experiments.caching.accesses import num_blocks_in_all
from kvarena.experiments.folders.recordings import engine_folder
from kvarena.experiments.jobs.cell_facts import engine_facts, model_facts
from kvarena.experiments.jobs.manifest import manifest_of
from kvarena.experiments.recording.served.recorder import ServedRecorder, WriterProcess
from kvarena.experiments.recording.served.window import Bounds
from kvarena.experiments.recording.served.writer import Opening
from kvarena.experiments.serving.flags import literal
from kvarena.experiments.settings.compose import load_run
from kvarena.experiments.settings.config import RunConfig
from kvarena.experiments.settings.targets import leaves
from kvarena.reports.reading.names import cell_name

logger = logging.getLogger("kvarena.engine")

# Of the config: what was not asked for, and what holds keys.
LEFT_OUT = ("server", "http", "tracking", "study", "workload", "arrival")
# Sections that decide what an engine does; of `kv_cache`, whose pool has its size from the machine, two keys.
REPLAYED = ("engine", "allocator", "scheduler", "parallel")
REPLAYED_KEYS = ("kv_cache.host_gib", "kv_cache.load")
STORED = {
    "tokens": "token ids of prompts and outputs, for this user's eyes alone",
    "hashes": "lengths and hashes of blocks, no token and no client's name",
}


def make_recorder(
    config: RunConfig, strategy: Mapping[str, str], parts: EngineParts, place: Place, key: bytes
) -> ServedRecorder:
    """The recorder of a server's engine, whose writer has started.

    Args:
        config: of the server, with `server.record`.
        strategy: names of the allocator and the scheduler.
        parts: the engine, warm.
        place: which of the server's engines it is.
        key: of the hashes.
    """
    server = config.server
    assert server is not None and server.record is not None
    folder = engine_folder(server.record, place.rank, place.num_engines)
    bounds = Bounds(
        int(server.record_mib * 2**20), 60 * server.record_minutes, server.record_content,
        parts.engine.allocator.block_size, key, num_blocks_in_all(parts.engine.allocator),
    )  # fmt: skip
    manifest = manifest_of(
        config, f"{cell_name(strategy['allocator'], strategy['scheduler'])}, served",
        {**strategy, "arrival": "served", "router": ""}, replay_command(config, strategy, parts, folder),
    ) | {
        "cache": "cold",
        "model": model_facts(parts),
        "engine": engine_facts(parts),
        "pool": parts.pool_facts,
        "simulation": None,
        "memory": NO_GPU,
        "contention": None,
    }  # fmt: skip
    manifest["config"] = {name: section for name, section in config.values.items() if name not in LEFT_OUT}
    # One engine's requests and steps are in a folder: whoever reads it need not know of the others.
    manifest["strategy"] = {name: manifest["strategy"][name] for name in ("allocator", "scheduler", "details")}
    logger.info(
        "recording into %s: %s; the latest %g minutes, at most %g MiB", folder, STORED[server.record_content],
        server.record_minutes, server.record_mib,
    )  # fmt: skip
    opening = Opening(manifest, bounds, time.time() - parts.clock.now())
    return ServedRecorder(parts.engine, opening, WriterProcess(folder))


def replay_command(config: RunConfig, strategy: Mapping[str, str], parts: EngineParts, folder: Path) -> list[str]:
    """The words that replay a recording on the same engine: what differs from the defaults, and the pool as it is."""
    names = [f"{group}={strategy[group]}" for group in ("allocator", "scheduler")]
    model = [] if config.model.path is None else [f"model.path={literal(str(config.model.path))}"]
    usual = dict(leaves(load_run([*names, *model]).values))
    set_here: dict[str, Any] = {
        key: value
        for section in (*REPLAYED, "kv_cache")
        for key, value in leaves(config.values[section], section)
        if (section in REPLAYED or key in REPLAYED_KEYS) and usual.get(key) != value and not key.endswith("_target_")
    }
    set_here |= {"engine.max_model_len": parts.max_model_len, "kv_cache.num_blocks": parts.pool_facts["num_blocks"]}
    settings = [f"{key}={'null' if value is None else literal(value)}" for key, value in set_here.items()]
    return ["python", "run.py", *names, *model, *settings, "workload=recorded", f"workload.path={literal(str(folder))}"]
