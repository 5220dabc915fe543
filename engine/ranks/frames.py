"""Small messages over a stream socket: a length, then bytes."""

from __future__ import annotations

import socket
import struct

_LENGTH = struct.Struct("<I")


def send_frame(sock: socket.socket, data: bytes) -> None:
    """Send one; waits. Raises OSError when the other side is gone."""
    sock.sendall(_LENGTH.pack(len(data)) + data)


def receive_frame(sock: socket.socket) -> bytes | None:
    """Wait for one; None when the other side is gone."""
    head = _exactly(sock, _LENGTH.size)
    return None if head is None else _exactly(sock, int(_LENGTH.unpack(head)[0]))


def _exactly(sock: socket.socket, count: int) -> bytes | None:
    data = bytearray()
    while len(data) < count:
        try:
            part = sock.recv(min(count - len(data), 1 << 20))
        except OSError:
            return None
        if not part:
            return None
        data += part
    return bytes(data)
