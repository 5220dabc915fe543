"""Messages from one process to several through shared memory, in order, without a copy for each reader.

    page    | written | read by 0 | read by 1 | ... | beats of 0 | ... |  bytes, round and round ...  |
    doorbell of each reader: a byte on its socket, for a reader that sleeps

Counters only grow; a byte's place is its number modulo the size. The writer goes on as long as the slowest reader is
less than the size behind. A message larger than half of it goes in pieces.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import struct
import time
from collections.abc import Callable

SIZE = 1 << 22
FULL_SECONDS = 60.0
_HEADER = 4096
_COUNTER = struct.Struct("<Q")
_BEAT = struct.Struct("<d")
_LENGTH = struct.Struct("<I")
_MORE = 1 << 31
_PIECE = SIZE // 2
_POLL_SECONDS = 1e-4


def make_page() -> int:
    """A file descriptor of shared memory without a name: however processes end, nothing of it is left."""
    file = os.memfd_create("kvarena-ring")
    os.truncate(file, _HEADER + SIZE)
    return file


class RingPage:
    """The mapped page.

    Args:
        file: from `make_page`.
        num_readers: of the ring.
    """

    def __init__(self, file: int, num_readers: int) -> None:
        self.memory = mmap.mmap(file, _HEADER + SIZE)
        self.num_readers = num_readers

    def written(self) -> int:
        """Bytes written so far."""
        return int(_COUNTER.unpack_from(self.memory, 0)[0])

    def set_written(self, count: int) -> None:
        """Let readers have all bytes before `count`."""
        _COUNTER.pack_into(self.memory, 0, count)

    def read_by(self, reader: int) -> int:
        """Bytes that a reader has taken."""
        return int(_COUNTER.unpack_from(self.memory, 8 * (1 + reader))[0])

    def set_read_by(self, reader: int, count: int) -> None:
        """A reader has taken all bytes before `count`."""
        _COUNTER.pack_into(self.memory, 8 * (1 + reader), count)

    def beat(self, reader: int) -> None:
        """A reader's process runs."""
        _BEAT.pack_into(self.memory, 8 * (1 + self.num_readers + reader), time.monotonic())

    def last_beat(self, reader: int) -> float:
        """When it last said so; 0: not yet."""
        return float(_BEAT.unpack_from(self.memory, 8 * (1 + self.num_readers + reader))[0])

    def put(self, at: int, data: bytes) -> None:
        """Store bytes from number `at` on."""
        start = at % SIZE
        first = min(len(data), SIZE - start)
        self.memory[_HEADER + start : _HEADER + start + first] = data[:first]
        if first < len(data):
            self.memory[_HEADER : _HEADER + len(data) - first] = data[first:]

    def get(self, at: int, count: int) -> bytes:
        """`count` bytes from number `at` on."""
        start = at % SIZE
        first = min(count, SIZE - start)
        part = self.memory[_HEADER + start : _HEADER + start + first]
        return part if first == count else part + self.memory[_HEADER : _HEADER + count - first]


class SlowReader(Exception):
    """A reader has left the ring full for too long: `reader`."""

    def __init__(self, reader: int) -> None:
        super().__init__(f"reader {reader} does not read")
        self.reader = reader


class RingWriter:
    """The one writer.

    Args:
        page: of the ring.
        bells: of each reader.
        timeout: seconds for which readers may leave it full: one may be busy with a long step.
        check: called while it is full; raises where a reader is known to be gone.
    """

    def __init__(
        self,
        page: RingPage,
        bells: list[socket.socket],
        timeout: float = FULL_SECONDS,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._page, self._bells, self._timeout, self._check = page, bells, timeout, check
        self._written = 0

    def send(self, message: bytes) -> None:
        """To all readers. Raises SlowReader."""
        if len(message) <= _PIECE:
            self._send(message, 0)
            return
        for at in range(0, len(message), _PIECE):
            self._send(message[at : at + _PIECE], _MORE if at + _PIECE < len(message) else 0)

    def _send(self, piece: bytes, flag: int) -> None:
        page, end = self._page, self._written + _LENGTH.size + len(piece)
        deadline = 0.0
        while True:
            behind = [reader for reader in range(page.num_readers) if end - page.read_by(reader) > SIZE]
            if not behind:
                break
            now = time.monotonic()
            deadline = deadline or now + self._timeout
            if now > deadline:
                raise SlowReader(behind[0])
            self._check()
            time.sleep(_POLL_SECONDS)
        page.put(self._written, _LENGTH.pack(len(piece) | flag) + piece)
        self._written = end
        page.set_written(end)
        for bell in self._bells:
            # A full socket has rung enough; one whose process is gone is its watcher's to find.
            with contextlib.suppress(OSError):
                bell.send(b"\0", socket.MSG_DONTWAIT)


class RingReader:
    """One of the readers.

    Args:
        page: of the ring.
        reader: which.
        bell: its end of the doorbell.
        spin: seconds for which it looks for a message before it sleeps.
    """

    def __init__(self, page: RingPage, reader: int, bell: socket.socket, spin: float = 0.0) -> None:
        self._page, self._reader, self._bell, self._spin = page, reader, bell, spin
        self._read = 0

    def receive(self) -> bytes | None:
        """The next message; None when the writer has gone."""
        pieces: list[bytes] = []
        while True:
            if not self._wait():
                return None
            page = self._page
            length = int(_LENGTH.unpack(page.get(self._read, _LENGTH.size))[0])
            size = length & ~_MORE
            pieces.append(page.get(self._read + _LENGTH.size, size))
            self._read += _LENGTH.size + size
            page.set_read_by(self._reader, self._read)
            if not length & _MORE:
                return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _wait(self) -> bool:
        """Until there is something to read; False when the writer has gone."""
        if self._page.written() != self._read:
            return True
        if self._spin:
            end = time.perf_counter() + self._spin
            while time.perf_counter() < end:
                if self._page.written() != self._read:
                    return True
        while self._page.written() == self._read:
            try:
                if not self._bell.recv(4096):
                    return False
            except OSError:
                return False
        return True
