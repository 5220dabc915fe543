"""Publishes KV events over ZeroMQ, in vLLM's wire format.

    allocator -> CacheEvents -> CacheFeed, once a step -> EventPublisher -> subscribers

    PUB     topic | sequence number, 8 bytes | msgpack of [time, events, rank]
    ROUTER  asked (empty | first number): the batches from there on, then (empty topic | -1 | empty)

A thread of its own sends; the engine's loop only queues, and waits for nothing.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections import deque
from dataclasses import replace
from itertools import count
from typing import Any

import msgpack
import zmq

from kvarena.engine.contract import KVAllocator
from kvarena.engine.errors import ConfigError
from kvarena.engine.server.engine.cache_events import Both, CacheEvents
from kvarena.engine.server.shared.kv_events import KVEventsConfig

logger = logging.getLogger("kvarena.engine")

END = (-1).to_bytes(8, "big", signed=True)
_CLOSE_SECONDS = 1.0


class EventPublisher:
    """The sockets and their thread.

    Args:
        config: as of `KVEventsConfig.of_rank`.
        rank: of the engine, told in every batch.

    Attributes:
        config: with the addresses that were bound, where the system picked them.

    Raises:
        ConfigError: an address is taken, or cannot be one.
    """

    def __init__(self, config: KVEventsConfig, rank: int) -> None:
        self._rank, self._topic = rank, config.topic.encode()
        self._numbers = count()
        self._waiting: deque[tuple[int, bytes]] = deque()
        self._kept: deque[tuple[int, bytes]] = deque(maxlen=config.buffer_steps)
        self._max_waiting, self._has_lost, self._is_closed = config.max_queue_size, False, False
        self._bell, self._rung = socket.socketpair()
        for end in (self._bell, self._rung):
            end.setblocking(False)
        self._context = zmq.Context()
        self._pub = self._context.socket(zmq.PUB)
        self._pub.set_hwm(config.hwm)
        bound = _open(self._pub, "endpoint", config.endpoint)
        self._replay: zmq.Socket[bytes] | None = None
        replay_bound = None
        if config.replay_endpoint is not None:
            self._replay = self._context.socket(zmq.ROUTER)
            self._replay.set(zmq.SNDHWM, 2 * (config.buffer_steps + 1))  # a whole replay and its end always fit
            replay_bound = _open(self._replay, "replay_endpoint", config.replay_endpoint, binds=True)
        self.config = replace(config, endpoint=bound, replay_endpoint=replay_bound)
        self._thread = threading.Thread(target=self._run, name="kv-events", daemon=True)
        self._thread.start()

    def publish(self, events: list[dict[str, Any]]) -> None:
        """Queue a batch. One that finds the queue full is lost: subscribers see that its number is missing."""
        number = next(self._numbers)
        if len(self._waiting) >= self._max_waiting:
            if not self._has_lost:
                logger.warning("KV events are lost: %d batches wait to be published", self._max_waiting)
            self._has_lost = True
            return
        self._has_lost = False
        self._waiting.append((number, msgpack.packb([time.time(), events, self._rank])))
        with contextlib.suppress(BlockingIOError):  # full of rings: it will be heard
            self._bell.send(b".")

    def close(self) -> None:
        """Send what waits, and end the thread."""
        self._is_closed = True
        with contextlib.suppress(BlockingIOError):
            self._bell.send(b".")
        self._thread.join(_CLOSE_SECONDS)

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._rung, zmq.POLLIN)
        if self._replay is not None:
            poller.register(self._replay, zmq.POLLIN)
        while not self._is_closed or self._waiting:
            ready = dict(poller.poll())
            if self._rung.fileno() in ready:
                self._rung.recv(4096)
            while self._waiting:
                number, payload = self._waiting.popleft()
                self._kept.append((number, payload))
                self._pub.send_multipart((self._topic, number.to_bytes(8, "big"), payload))
            if self._replay is not None and self._replay in ready:
                self._answer(self._replay)
        self._context.destroy(linger=100)

    def _answer(self, replay: zmq.Socket[bytes]) -> None:
        frames = replay.recv_multipart()
        if len(frames) != 3 or len(frames[2]) != 8:
            logger.warning("a request to repeat KV events is not (empty, 8 bytes): %d frames", len(frames) - 1)
            return
        who, first = frames[0], int.from_bytes(frames[2], "big")
        for number, payload in self._kept:
            if number >= first:
                replay.send_multipart((who, b"", self._topic, number.to_bytes(8, "big"), payload))
        replay.send_multipart((who, b"", b"", END, b""))


class CacheFeed:
    """An allocator's prefix cache, published: at most one batch a step. It begins with an empty cache, and says so.

    Args:
        allocator: no request owns anything of it.
        config: of this engine.
        rank: of the engine.

    Raises:
        ConfigError: the allocator has no prefix cache, or an address is taken.
    """

    def __init__(self, allocator: KVAllocator, config: KVEventsConfig, rank: int) -> None:
        if not allocator.reads_tokens:
            raise ConfigError(
                f"{config.section} tells what a prefix cache holds, and this allocator has none; take "
                "allocator=paged_prefix or allocator=radix"
            )
        self._publisher = EventPublisher(config, rank)
        self._events = CacheEvents(allocator.block_size)
        allocator.clear_cache()
        self._events.cleared()
        before = allocator.observer
        allocator.observer = self._events if before is None else Both(before, self._events)
        self.flush()

    @property
    def config(self) -> KVEventsConfig:
        """With the addresses that were bound."""
        return self._publisher.config

    def flush(self) -> None:
        """Publish what has changed since the last call."""
        events = self._events.take()
        if events:
            self._publisher.publish(events)

    def close(self) -> None:
        """Send what waits, and end the publisher."""
        self._publisher.close()


def _open(sock: zmq.Socket[bytes], name: str, endpoint: str, binds: bool = False) -> str:
    """Bind or connect; the address, with the port that the system picked."""
    key = f"{KVEventsConfig.section}.{name}"
    try:
        if not (binds or "*" in endpoint or "::" in endpoint or endpoint.startswith(("ipc://", "inproc://"))):
            sock.connect(endpoint)
            return endpoint
        sock.bind(endpoint)
    except zmq.ZMQError as error:
        raise ConfigError(f"{key}={endpoint}: {error.strerror}; choose another address") from error
    if not endpoint.endswith(":0"):
        return endpoint
    port = sock.get_string(zmq.LAST_ENDPOINT).rstrip("\0").rpartition(":")[2]
    return f"{endpoint.rpartition(':')[0]}:{port}"
