"""The sockets that a server listens on: its own alone, from before anything is loaded."""

from __future__ import annotations

import contextlib
import errno
import socket
import sys
import time
from collections.abc import Iterator

from kvarena.engine.errors import ConfigError

BACKLOG = 4096
_TURN_SECONDS = 5.0
_RETRY_SECONDS = 0.01


def open_listeners(host: str, port: int, count: int) -> list[socket.socket]:
    """`count` sockets that listen on one address, among which the kernel deals connections out.

    They listen at once: a bound socket that does not listen keeps nobody away, and two servers that load at the same
    time would share the port. Whoever connects meanwhile waits for the server.

    Raises:
        ConfigError: the address is taken or not ours.
    """
    family, _, _, _, address = _resolve(host, port)
    with contextlib.ExitStack() as opened:
        try:
            first = opened.enter_context(_listen(family, address))
            if count == 1:
                opened.pop_all()
                return [first]
            # SO_REUSEPORT lets any server of this user in: the port is known to be free, and is taken again at once,
            # with no other server between.
            address = first.getsockname()
            first.close()
            with _turn(address[1]):
                opened.enter_context(_listen(family, address)).close()
                made = [opened.enter_context(_listen(family, address, shared=True)) for _ in range(count)]
        except OSError as error:
            raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}; choose another --port") from error
        opened.pop_all()
        return made


def _listen(family: int, address: tuple[str, int], shared: bool = False) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock


@contextlib.contextmanager
def _turn(port: int) -> Iterator[None]:
    """One server of this network at a time looks whether `port` is free and takes it. Raises OSError."""
    if sys.platform != "linux":  # no names that vanish with their owner
        yield
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as turn:
        deadline = time.monotonic() + _TURN_SECONDS
        while True:
            try:
                turn.bind(f"\0kvarena-listen-{port}")
                break
            except OSError as error:
                if error.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                    raise
                time.sleep(_RETRY_SECONDS)
        yield


def _resolve(host: str, port: int) -> tuple[int, int, int, str, tuple[str, int]]:
    try:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]  # type: ignore[return-value]
    except OSError as error:
        raise ConfigError(f"cannot resolve host {host!r}: {error}") from error
