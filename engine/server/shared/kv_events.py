"""How a server tells the world what its prefix cache holds: the settings of `--kv-events-config`, vLLM's names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Annotated

from kvarena.engine.checks import TRUTH, Must, Section, integer, one_of
from kvarena.engine.errors import ConfigError

KINDS = ("tcp://", "ipc://", "inproc://")
ENDPOINT = Must(
    "an address of ZeroMQ, such as tcp://*:5557 or ipc:///run/kv",
    lambda value: isinstance(value, str) and value.startswith(KINDS) and (value[:3] != "tcp" or _port(value) >= 0),
)


def _port(endpoint: str) -> int:
    port = endpoint.rpartition(":")[2]
    return int(port) if port.isdecimal() and int(port) < 1 << 16 else -1


@dataclass(frozen=True)
class KVEventsConfig(Section):
    """Where and how KV events are published. Each engine of a server has a publisher of its own, at `of_rank`.

    Attributes:
        enable_kv_cache_events: whether any are.
        publisher: `zmq`, or `null`: none; None: what `enable_kv_cache_events` says.
        endpoint: of the PUB socket. With a wildcard (`*`, `::`) or by `ipc` and `inproc` it is bound, else connected.
        replay_endpoint: of the ROUTER socket that repeats batches; None: none. Always bound.
        buffer_steps: batches that can be repeated.
        hwm: batches that a subscriber may lag behind before it loses some.
        max_queue_size: batches that may wait for the publisher's thread; more are lost, and show as a gap.
        topic: what subscribers filter by.

    Raises:
        ConfigError: a value out of range.
    """

    section = "server.kv_events"
    enable_kv_cache_events: Annotated[bool, TRUTH] = False
    publisher: Annotated[str | None, one_of("zmq", "null").or_null] = None
    endpoint: Annotated[str, ENDPOINT] = "tcp://*:5557"
    replay_endpoint: Annotated[str | None, ENDPOINT.or_null] = None
    buffer_steps: Annotated[int, integer(1)] = 10_000
    hwm: Annotated[int, integer(0)] = 100_000
    max_queue_size: Annotated[int, integer(1)] = 100_000
    topic: Annotated[str, Must("text", lambda value: isinstance(value, str))] = ""

    @classmethod
    def read(cls, given: object) -> KVEventsConfig:
        """From JSON, or a mapping of these names; None: all off. Raises ConfigError."""
        if isinstance(given, str):
            try:
                given = json.loads(given)
            except ValueError as error:
                raise ConfigError(f"{cls.section}={given!r} is not JSON: {error}") from None
        if given is None:
            return cls()
        if not isinstance(given, Mapping):
            raise ConfigError(f'{cls.section}={given} must be an object, such as {{"enable_kv_cache_events": true}}')
        known = [one.name for one in fields(cls)]
        for name in given:
            if name not in known:
                raise ConfigError(f"unknown key {cls.section}.{name}; known: {', '.join(known)}")
        return cls(**{str(name): value for name, value in given.items()})

    @property
    def is_on(self) -> bool:
        """Whether events are published."""
        return self.enable_kv_cache_events and self.publisher != "null"

    def of_rank(self, rank: int) -> KVEventsConfig:
        """The settings of a server's engine number `rank`, whose ports are `rank` higher. Raises ConfigError."""
        values = asdict(self) | {"publisher": "zmq" if self.is_on else "null"}
        for name in ("endpoint", "replay_endpoint"):
            if rank and values[name] is not None:
                values[name] = _of_rank(f"{self.section}.{name}", values[name], rank)
        return KVEventsConfig(**values)


def _of_rank(key: str, endpoint: str, rank: int) -> str:
    if endpoint.startswith("inproc://"):
        return f"{endpoint}_dp{rank}"
    if not endpoint.startswith("tcp://"):
        raise ConfigError(f"{key}={endpoint} has room for one engine; several take tcp://, with a port each")
    port = _port(endpoint)
    if port == 0:  # the system picks one for each
        return endpoint
    if port + rank >= 1 << 16:
        raise ConfigError(f"{key}={endpoint}: engine {rank} would publish on port {port + rank}; take a lower port")
    return f"{endpoint.rpartition(':')[0]}:{port + rank}"
