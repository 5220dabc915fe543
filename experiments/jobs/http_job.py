"""Runs one cell against a server: `target=http://host:port` in place of this process's engine.

    the same workload, arrivals and seeds --> HttpDriver --> requests.parquet, no steps --> the same report

The server's steps and KV memory are not seen from outside, so the run has no ledger; the report says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx

from kvarena.engine.errors import ConfigError, EngineError
from kvarena.engine.ledger import MemoryLedger
from kvarena.engine.request import Request
from kvarena.experiments.building.build import Load, build_load
from kvarena.experiments.building.parts import sizes_of
from kvarena.experiments.folders.provenance import utc_now
from kvarena.experiments.folders.run_folder import Measured
from kvarena.experiments.load.connection import HttpClient, run_async
from kvarena.experiments.load.http_client import HttpServer
from kvarena.experiments.load.http_driver import HttpDriver
from kvarena.experiments.load.http_metrics import GaugeReader
from kvarena.experiments.recording.contention import Contention
from kvarena.experiments.recording.interruption import Signals, name_of
from kvarena.experiments.recording.record import RunRecorder, write_requests, write_steps
from kvarena.experiments.settings.config import DriverConfig, HttpConfig, RunConfig
from kvarena.reports.reading.names import REQUESTS_FILE, STEPS_FILE

EXTENSIONS = ("top_k", "min_p", "ignore_eos")  # of section `sampling`, beyond OpenAI's API
ENDPOINTS = ("/completions", "/chat", "/v1")  # what clients' addresses end with, in the order in which it is cut off
ENGINE_SECTIONS = ("allocator", "scheduler", "router", "engine", "kv_cache", "runner", "server", "mode", "study")


def run_http(run: RunConfig, progress: Callable[[int], Callable[[int], None]], signals: Signals) -> Measured:
    """Drive the server that `run.target` names, until all requests have ended or a signal comes.

    Args:
        run: what to run. `model` says which vocabulary the prompts are drawn from.
        progress: given the number of requests, what is to be told how many have ended.
        signals: end the load; the answers that are not whole then are aborted.

    Raises:
        ConfigError: a bad setting.
        EngineError: the server cannot be reached, or cannot answer at all.
    """
    config, driver_config = run.http, run.driver
    driver_config.check_scores("a server shows none")
    target = _target(str(run.target))
    if run.sampling.n != 1 or run.sampling.beams:
        name, least = ("beams", 0) if run.sampling.beams else ("n", 1)
        raise ConfigError(
            f"sampling.{name}={run.sampling.num_sequences} needs this process's engine; set it to {least} with target"
        )
    sizes = sizes_of(run)  # of the model that the server is said to serve: prompts are ids of its vocabulary
    load = build_load(run, sizes.spec, sizes.special_token_ids)
    headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"} | config.authorization()
    extensions = {key: run.values["sampling"][key] for key in EXTENSIONS} | {"return_token_ids": True}
    contention = Contention(driver_config.probe, cuda=False)
    contention.before()
    driver, server, gauges, warmup_time = run_async(
        _drive(
            load, driver_config, config, target, headers, extensions, progress(len(load.requests)), contention, signals
        )
    )
    ended = utc_now()
    interrupted = None
    if signals.number is not None and driver.num_ended < len(load.requests):
        interrupted = {"by": name_of(signals.number), "num_requests": len(load.requests),
                       "num_submitted": len(driver.rows), "num_ended": driver.num_ended}  # fmt: skip
    # Before the files, whose writing is no part of the run.
    found = contention.after() if interrupted is None else None
    name = config.name or f"{target.host}:{target.port or target.scheme}"
    facts = {
        "name": f"{name} over HTTP",
        "strategy": {"allocator": name, "scheduler": "HTTP", "details": {}},
        # Without what only this process's engine would read.
        "config": {key: value for key, value in run.values.items() if key not in ENGINE_SECTIONS},
        "model": {"name": sizes.spec.name, "num_parameters": sizes.spec.num_parameters, "kv_bytes_per_token": None,
                  "max_model_len": None, "dtype": "as served"},
        "pool": {"num_blocks": None, "block_size": None, "num_slots": None, "bytes": None},
        "simulation": None,
        "contention": found,
        "target": {
            "url": str(target),
            "model": server.model,
            "extensions": sorted(server.extensions),
            "extensions_refused": sorted(extensions.keys() - server.extensions.keys()),
            "num_other_prompt_lens": driver.num_other_prompt_lens,
            "token_counts": driver.token_counts,
            "gauges": {"url": config.metrics, "num_failed": gauges.num_failed, "error": gauges.error or None},
        },
        "run": {
            "ended": ended,
            "wall_time": driver.wall_time,
            "num_steps": 0,
            "peak_rss_bytes": None,
            "max_lateness": driver.max_lateness,
            "lateness_bound": driver_config.max_lateness,
            "warmup_time": warmup_time,
            "interrupted": interrupted,
        },
    } | load.manifest()  # fmt: skip

    def write(folder: Path) -> None:
        write_requests(folder / REQUESTS_FILE, driver.rows)
        gauges.write(folder)
        write_steps(folder / STEPS_FILE, RunRecorder().step_columns() | MemoryLedger().settle())

    return Measured(facts, write)


def _target(text: str) -> httpx.URL:
    """The server's address, with or without the `/v1` that OpenAI's clients take. Raises ConfigError."""
    try:
        target = httpx.URL(text)
    except httpx.InvalidURL as error:
        raise ConfigError(f"target={text} is no address ({error}); give http://host:port, or null") from error
    if target.scheme not in ("http", "https") or not target.host:
        raise ConfigError(f"target={text} must be http://host:port or https://host:port, or null")
    if target.port is not None and not 0 < target.port < 2**16:
        raise ConfigError(f"target={text} has port {target.port}; give one from 1 to 65535")
    if target.query or target.fragment:
        raise ConfigError(f"target={text} must end with the server's address or /v1; leave out what is behind it")
    path = target.path.rstrip("/")
    for end in ENDPOINTS:
        path = path.removesuffix(end)
    return target.copy_with(path=path) if path != target.path.rstrip("/") else target


async def _drive(
    load: Load,
    driver_config: DriverConfig,
    config: HttpConfig,
    target: httpx.URL,
    headers: dict[str, str],
    extensions: dict[str, Any],
    on_progress: Callable[[int], None],
    contention: Contention,
    signals: Signals,
) -> tuple[HttpDriver, HttpServer, GaugeReader, float]:
    with contextlib.closing(HttpClient(target, headers, patience=config.timeout)) as client:
        start = time.perf_counter()
        requests = list(load.requests)
        server = await HttpServer.connect(client, config.model, extensions, [1] * 8)
        if driver_config.cache == "warm":
            await _send_prompts(server, requests)
        warmup_time = time.perf_counter() - start
        driver = HttpDriver(server, driver_config.record == "full", on_progress)
        gauges = GaugeReader(client, config.metrics or "", config.metrics_interval)
        reading = asyncio.create_task(gauges.run()) if config.metrics else None
        signals.hold()  # until the files are written: nothing of what is measured from here on is to be lost
        with contention:
            await driver.run(requests, load.closed_loop, signals)
        signals.hold(sealed=True)
        if reading is not None:
            reading.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reading
        return driver, server, gauges, warmup_time


async def _send_prompts(server: HttpServer, requests: list[Request]) -> None:
    """Each prompt once, one after the other, so that the server's prefix cache has seen it.

    Raises:
        EngineError: a prompt that the server took broke off. One that it refuses is refused and recorded later too.
    """
    for req in requests:
        answer = await server.complete(req.prompt_token_ids, replace(req.sampling, max_tokens=1))
        if answer.error and not answer.refused:
            raise EngineError(f"driver.cache=warm: the prompt of {req.request_id!r} failed: {answer.error}")
