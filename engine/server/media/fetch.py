"""Reads the bytes of images from files and URLs that the operator allows, for models that read images.

A URL is a way to make the server open connections in its own network (SSRF), so every connection is checked where it
is made: the host is resolved once, every address it has must be public, and that very address is connected to. A
redirect is a new URL and is checked like the first. Nothing that a server answers is shown to the caller.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import socket
import stat
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple
from urllib.parse import urljoin

import httpcore

from kvarena.engine.server.media.parts import (
    DataSource,
    FileSource,
    ImagePart,
    MediaPolicy,
    Source,
    check_image,
    check_url,
    read_source,
    too_many_bytes,
)
from kvarena.engine.server.shared.errors import ApiError, bad_request

MAX_REDIRECTS = 3
_REDIRECTS = (301, 302, 303, 307, 308)
_HEADERS = [("Accept", "image/*"), ("Accept-Encoding", "identity"), ("User-Agent", "kvarena")]

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class LoadedImage(NamedTuple):
    """An image's file; `place` names it in errors, `size` is its width and height."""

    data: bytes
    place: str
    size: tuple[int, int]


class NotAllowed(Exception):
    """A host has an address that is not public."""


# Ranges that lead into a site's own network and that the library takes for public: IPv4-compatible addresses
# (RFC 4291 2.5.5.1), translation within a site (RFC 8215), and site-local ones (RFC 3879).
_OF_A_SITE = tuple(map(ipaddress.IPv6Network, ("::/96", "64:ff9b:1::/48", "fec0::/10")))


def is_public(address: Address) -> bool:
    """Whether an address is one of the open internet, also when IPv6 wraps an IPv4 address."""
    if isinstance(address, ipaddress.IPv6Address):
        if any(address in network for network in _OF_A_SITE):
            return False
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo or (None, None))[1]
        if inner is None and address in ipaddress.ip_network("64:ff9b::/96"):
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(inner)
    return address.is_global and not address.is_multicast


class _GuardedBackend(httpcore.AsyncNetworkBackend):
    """Connects to public addresses only, and to the address that was checked."""

    def __init__(self, permits: Callable[[Address], bool]) -> None:
        self._permits = permits
        self._inner = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Resolve, check every address, connect to the first."""
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = [ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found]
        if not addresses or not all(map(self._permits, addresses)):
            raise NotAllowed
        return await self._inner.connect_tcp(str(addresses[0]), port, timeout, local_address, socket_options)


class ImageLoader:
    """Loads the images of a chat.

    Args:
        policy: what is allowed.
        permits: which addresses may be connected to.
    """

    def __init__(self, policy: MediaPolicy, permits: Callable[[Address], bool] = is_public) -> None:
        self._policy = policy
        self._backend = _GuardedBackend(permits)

    async def load(self, parts: Sequence[ImagePart]) -> list[LoadedImage]:
        """The images in order, judged by their headers. Raises a 400 that names the part which cannot be had."""
        # Base64 of megabytes: not on the event loop.
        read = [await asyncio.to_thread(read_source, part, self._policy) for part in parts]
        sources = [(part.place, source) for part, source in zip(parts, read, strict=True)]
        files: list[bytes] = []
        try:
            async with asyncio.timeout(self._policy.timeout):
                for place, source in sources:
                    left = self._policy.max_bytes - sum(map(len, files))
                    files.append(await self._read(source, place, left))
        except TimeoutError:
            raise bad_request(f"the images did not arrive within {self._policy.timeout:g} s", "messages") from None
        made = []
        for data, (place, source) in zip(files, sources, strict=True):
            mime = source.mime if isinstance(source, DataSource) else None
            size = await asyncio.to_thread(check_image, data, mime, place, self._policy)
            made.append(LoadedImage(data, place, size))
        return made

    async def _read(self, source: Source, place: str, max_bytes: int) -> bytes:
        if isinstance(source, DataSource):
            if len(source.data) > max_bytes:
                raise too_many_bytes(self._policy)
            return source.data
        if isinstance(source, FileSource):
            return await asyncio.to_thread(self._read_file, source, place, max_bytes)
        try:
            return await self._fetch(source.url, place, max_bytes)
        except (NotAllowed, OSError, httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException):
            # One answer for all: which hosts and ports exist in the server's network is nobody's business.
            raise bad_request(f"{place}: the image's url cannot be fetched", "messages") from None

    def _read_file(self, source: FileSource, place: str, max_bytes: int) -> bytes:
        try:
            # The path was resolved: a link in its place now is another file. A pipe must not block.
            descriptor = os.open(source.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            with open(descriptor, "rb") as file:
                facts = os.fstat(descriptor)
                if not stat.S_ISREG(facts.st_mode):
                    raise bad_request(f"{place}: file urls are not allowed here", "messages")
                if facts.st_size > max_bytes:
                    raise too_many_bytes(self._policy)
                return file.read(max_bytes)
        except OSError:
            raise bad_request(f"{place}: file urls are not allowed here", "messages") from None

    async def _fetch(self, url: str, place: str, max_bytes: int) -> bytes:
        async with httpcore.AsyncConnectionPool(network_backend=self._backend, retries=0) as pool:
            for _ in range(MAX_REDIRECTS + 1):
                check_url(url, place, self._policy)
                async with pool.stream("GET", url, headers=_HEADERS) as response:
                    headers = {key.lower(): value for key, value in response.headers}
                    if response.status in _REDIRECTS and b"location" in headers:
                        url = urljoin(url, headers[b"location"].decode("latin-1"))
                        continue
                    self._check_answer(response.status, headers, place)
                    data = bytearray()
                    async for chunk in response.aiter_stream():
                        data += chunk
                        if len(data) > max_bytes:
                            raise too_many_bytes(self._policy)
                    return bytes(data)
        raise bad_request(f"{place}: the image's url redirects more than {MAX_REDIRECTS} times", "messages")

    def _check_answer(self, status: int, headers: dict[bytes, bytes], place: str) -> None:
        kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        plain = headers.get(b"content-encoding", b"identity") == b"identity"
        if status != 200 or not plain or not (kind.startswith(b"image/") or kind == b"application/octet-stream"):
            raise ApiError(400, f"{place}: the image's url does not answer with an image", "messages")
