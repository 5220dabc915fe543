"""Frames between fronts and engine: a 4-byte big-endian length, then msgpack.

Token ids and stream handles travel as packed int32 arrays: a step of 256 requests is one frame of a few kilobytes.
What is checked where it is made (`SamplingParams`, `EngineInfo`) arrives as the same object, and is not checked again.
A *handle* is an integer that the front picks for each choice of each request; it is unique per front.
"""

from __future__ import annotations

import socket
import struct
from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from operator import attrgetter
from typing import Any, NamedTuple

import msgpack

from kvarena.engine.errors import EngineError
from kvarena.engine.request import ImageSpan, SamplingParams

_LENGTH = struct.Struct(">I")
IDENTITY_BYTES = 33
MAX_FRAME_BYTES = 1 << 28
BAD_CONSTRAINT = "bad_constraint"  # how a choice ended: the structured output turned out to be impossible
# Why a request was refused: its API key has all that it may have; an operator has paused the engine, or ended it.
KEY_LIMIT, PAUSED, ABORTED = "key_limit", "paused", "aborted"
OUTBOX_LIMIT_BYTES = 64 << 20
_RECV_BYTES = 1 << 18
_MAX_RECV = 32  # some megabytes: the tiles of an image


class ToEngine(IntEnum):
    """Kinds of frames that fronts send."""

    ADD = 0
    ABORT = 1  # handles, and whether their text is complete: a stop string ended it
    WATCH = 2
    CONSTRAINT = 3  # key, kind, grammar, seconds: see `CheckedGrammar`; comes before the requests that name its key
    ORDER = 4  # token, kind, what is ordered: see `engine/orders.py`


class ToFront(IntEnum):
    """Kinds of frames that the engine sends."""

    READY = 0
    STEP = 1
    POOL_MAP = 2
    ORDER = 3  # token, what came of it


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What an engine can do, as it tells the fronts when it is ready, and what requests must keep to.

    Attributes:
        max_model_len: prompt + output, in tokens.
        max_request_tokens: what an empty KV pool holds.
        vocab_size: token ids are below it.
        eos_token_ids: the model's end-of-sequence tokens.
        num_blocks, block_size: the pool's.
        constraints: whether tokens can be constrained.
        prompt_logprobs: whether log-probabilities of prompt tokens are returned.
        priorities: whether the scheduler looks at them.
        facts: labels of the cache's configuration in `/metrics`.
        about: what the pages call this engine.
        defaults: sampling parameters of the model's generation_config.json; the front's own, where they are read.
        kv_events: how it publishes what its prefix cache holds; empty: it does not.
    """

    max_model_len: int
    max_request_tokens: int
    vocab_size: int
    eos_token_ids: tuple[int, ...] = ()
    num_blocks: int = 0
    block_size: int = 0
    constraints: bool = False
    prompt_logprobs: bool = False
    priorities: bool = False
    facts: dict[str, str] = field(default_factory=dict)
    about: dict[str, str] = field(default_factory=dict)
    defaults: dict[str, float] = field(default_factory=dict)
    kv_events: dict[str, Any] = field(default_factory=dict)

    def default_length(self, fallback: int | None) -> int | None:
        """Output tokens of a request that asks for no number: the model's own, else `fallback`."""
        given = int(self.defaults.get("max_new_tokens", 0))
        return given if given > 0 else fallback


PackedImage = tuple[int, int, bytes, int, Sequence[int], int, Sequence[int] | None, bytes | memoryview]


class AddFrame(NamedTuple):
    """A new prompt with `sampling.n` choices, whose handles are `handle`, `handle + 1`, ...

    `handle` is picked by the front's client; `arrival` is on the machine's monotonic clock; `prompt` is packed int32;
    `constraint` is the key of a grammar that came before, or None. `shown_id` and `key` are the HTTP request's
    X-Request-Id and the position of its API key, or -1. `images` of the prompt: see `pack_image`.
    """

    handle: int
    request_id: str
    prompt: bytes
    sampling: SamplingParams
    arrival: float
    priority: int
    client_id: str
    cache_salt: str
    constraint: str | None
    shown_id: str = ""
    key: int = -1
    images: Sequence[PackedImage] = ()


def pack_ids(ids: Sequence[int]) -> bytes:
    """Pack integers below 2**31 as int32."""
    return array("i", ids).tobytes()


def unpack_ids(data: bytes) -> list[int]:
    """The inverse of `pack_ids`."""
    ids = array("i")
    ids.frombytes(data)
    return ids.tolist()


def pack_image(image: ImageSpan) -> PackedImage:
    """An image as it travels: place, identity, tiles and their shape, weight, grid, and their bytes."""
    name, pixels = image.identity.to_bytes(IDENTITY_BYTES, "big"), image.pixels
    data = memoryview(pixels).cast("B")
    return image.start, image.stop, name, image.num_tiles, pixels.shape, image.tile_weight, image.grid, data


def unpack_image(packed: PackedImage) -> ImageSpan:
    """The inverse of `pack_image`: the pixels are uint8 [tiles, 3, height, width]."""
    import numpy as np  # not with the module, which the supervisor imports too

    start, stop, name, num_tiles, shape, weight, grid, data = packed
    pixels = np.frombuffer(data, dtype=np.uint8).reshape(shape)
    identity = int.from_bytes(name, "big")
    return ImageSpan(start, stop, identity, num_tiles, pixels, weight, None if grid is None else (grid[0], grid[1]))


_ITEMS: tuple[type[Any], ...] = (SamplingParams, EngineInfo)  # travel as themselves, by their place here
_READ = [attrgetter(*kind.__slots__) for kind in _ITEMS]
_WRITE = [[getattr(kind, name).__set__ for name in kind.__slots__] for kind in _ITEMS]  # past frozen's own
_packer = msgpack.Packer(use_bin_type=True)  # a new one costs more than what it packs


def _pack(item: Any) -> msgpack.ExtType:
    place = _ITEMS.index(type(item))
    return msgpack.ExtType(place, _packer.pack(_READ[place](item)))


def _unpack(place: int, data: bytes) -> Any:
    item = object.__new__(_ITEMS[place])
    values = msgpack.unpackb(data, raw=False, use_list=False, strict_map_key=False)
    for put, value in zip(_WRITE[place], values, strict=True):
        put(item, value)
    return item


def encode(message: Sequence[Any]) -> bytes:
    """One frame, its length in front."""
    body = msgpack.packb(message, use_bin_type=True, default=_pack)
    return _LENGTH.pack(len(body)) + body


class FrameDecoder:
    """Cuts a byte stream into messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Any]:
        """Take bytes in; return the messages that are complete. Raises EngineError on a frame above the limit."""
        buffer = self._buffer
        buffer += data
        messages = []
        start = 0
        while len(buffer) - start >= 4:
            (length,) = _LENGTH.unpack_from(buffer, start)
            if length > MAX_FRAME_BYTES:
                raise EngineError(f"a frame of {length} bytes between server processes; this is a bug")
            end = start + 4 + length
            if len(buffer) < end:
                break
            with memoryview(buffer)[start + 4 : end] as body:
                messages.append(msgpack.unpackb(body, raw=False, strict_map_key=False, ext_hook=_unpack))
            start = end
        if start:
            del buffer[:start]
        return messages


class Link:
    """The engine's end of a socket: never blocks, in neither direction."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.closed = False
        self._decoder = FrameDecoder()
        self._outbox: deque[memoryview] = deque()
        self._outbox_bytes = 0

    def receive(self) -> list[Any]:
        """Messages that have arrived, up to some megabytes; sets `closed` at the end of the stream."""
        messages: list[Any] = []
        for _ in range(_MAX_RECV):
            if self.closed:
                break
            try:
                data = self.sock.recv(_RECV_BYTES)
            except BlockingIOError:
                break
            except OSError:
                self.closed = True
                break
            if not data:
                self.closed = True
                break
            messages += self._decoder.feed(data)
            if len(data) < _RECV_BYTES:
                break
        return messages

    def send(self, message: Sequence[Any]) -> None:
        """Queue a message and send what the socket takes. A reader that never reads is cut off (`closed`)."""
        if self.closed:
            return
        data = encode(message)
        self._outbox.append(memoryview(data))
        self._outbox_bytes += len(data)
        self.flush()
        if self._outbox_bytes > OUTBOX_LIMIT_BYTES:
            self.closed = True

    def flush(self) -> None:
        """Send queued bytes as far as the socket takes them."""
        while self._outbox and not self.closed:
            head = self._outbox[0]
            try:
                sent = self.sock.send(head)
            except BlockingIOError:
                return
            except OSError:
                self.closed = True
                return
            self._outbox_bytes -= sent
            if sent == len(head):
                self._outbox.popleft()
            else:
                self._outbox[0] = head[sent:]

    def close(self) -> None:
        """Let go of the socket and of what waits for the reader."""
        self.closed = True
        self.sock.close()
        self._outbox.clear()
        self._outbox_bytes = 0

    @property
    def num_queued_bytes(self) -> int:
        """Bytes that wait for the reader."""
        return self._outbox_bytes


def socket_pair() -> tuple[socket.socket, socket.socket]:
    """A connected pair with large buffers."""
    pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    for sock in pair:
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, 1 << 20)
    return pair
