"""An engine's process: built, connected to the fronts, and stepped until the supervisor leaves."""

from __future__ import annotations

import logging
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import NamedTuple

from kvarena.engine.errors import ConfigError, KvarenaError
from kvarena.engine.server.engine.loop import EngineLoop
from kvarena.engine.server.engine.orders import Pause
from kvarena.engine.server.engine.served import ServedEngine
from kvarena.engine.server.engine.tenants import Tenants
from kvarena.engine.server.processes.process import end_process, freeze_heap, start_log
from kvarena.engine.server.shared.config import ServerConfig
from kvarena.engine.server.shared.kv_events import KVEventsConfig
from kvarena.engine.server.shared.metrics import PAUSED, Row
from kvarena.engine.server.shared.page import Page

logger = logging.getLogger("kvarena.engine")

ENGINE_FAILED, USER_ERROR = 1, 2


class Place(NamedTuple):
    """Which of a server's engines one is: `rank` of `num_engines`."""

    rank: int
    num_engines: int


ALONE = Place(0, 1)
EngineFactory = Callable[[Place], ServedEngine]


def run_engine(
    factory: EngineFactory,
    place: Place,
    fronts: list[socket.socket],
    control: socket.socket,
    page: Page,
    config: ServerConfig,
) -> None:
    """The process's main function; does not return."""
    start_log()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    try:
        served = with_feed(factory(place), config.kv_events, place.rank)
        tenants = Tenants(config.max_requests_per_key, config.tokens_per_minute_per_key)
        loop = EngineLoop(
            served,
            fronts,
            control,
            page,
            config.max_num_queued_requests,
            place.rank,
            tenants,
            _pause_of_others(page, place),
            config.ledger,
        )
    except KvarenaError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(USER_ERROR)
    freeze_heap()
    loop.announce()
    try:
        loop.run()
    except KvarenaError as error:
        logger.error("the engine has failed: %s", error)
        loop.close()
        sys.exit(ENGINE_FAILED)
    loop.close()
    end_process()


def _pause_of_others(page: Page, place: Place) -> Pause:
    """How the server's other engines stand: one that takes another's place does as they do."""
    others = [Row(page, number) for number in range(place.num_engines) if number != place.rank]
    return Pause(max((int(row.get(PAUSED)) for row in others if row.get("kvarena:engine_up")), default=0))


def with_feed(served: ServedEngine, config: KVEventsConfig, rank: int) -> ServedEngine:
    """`served`, publishing what its prefix cache holds where that is asked for. Raises ConfigError."""
    if not config.is_on:
        return served
    from kvarena.engine.server.engine.event_publisher import CacheFeed  # ZeroMQ

    try:
        feed = CacheFeed(served.engine.allocator, config.of_rank(rank), rank)
    except ConfigError as error:
        raise ConfigError(served.words(str(error))) from error
    logger.info("KV events are published at %s", feed.config.endpoint)
    return replace(served, feed=feed, info=replace(served.info, kv_events=asdict(feed.config)))
