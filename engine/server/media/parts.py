"""Images in chat messages: which parts there are, where their bytes come from, and what an image may be.

    message part -> find_parts -> source (data | file | http) -> bytes -> check_image -> decode_image

`check_parts` opens nothing and decodes nothing: a model that reads text only goes no further. Bytes of
files and URLs are read in fetch.py, only for a model that reads images and only as the operator allows.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from PIL import ExifTags, Image

from kvarena.engine.server.shared.config import ServerConfig
from kvarena.engine.server.shared.errors import ApiError, bad_request
from kvarena.engine.server.text.tokenization import IMAGE_PARTS

OTHER_MEDIA = ("video_url", "audio_url", "input_audio", "file")
FORMATS = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp", "GIF": "image/gif"}
MAX_URL_CHARS = 2048
# EXIF's orientation, by what makes the image upright (as `PIL.ImageOps.exif_transpose`).
_TURNS = dict(
    enumerate(
        (Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
         Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE,
         Image.Transpose.ROTATE_90), start=2,
    )
)  # fmt: skip
_LYING = [_TURNS[number] for number in (5, 6, 7, 8)]
_DATA_HEAD = re.compile(r"data:([a-z]+/[a-z0-9.+-]+)?((?:;[a-z0-9-]+=[^;,]*)*)(;base64)?,", re.IGNORECASE)


@dataclass(frozen=True)
class MediaPolicy:
    """What the operator allows.

    Attributes:
        domains: hosts (`cdn.example.com`, or `host:port` for a port that is not the scheme's own) whose http(s) URLs
            may be fetched; empty: none.
        local_path: folder below which file URLs may be read; None: none.
        max_images: most images of a request.
        max_bytes: most bytes of all images of a request together.
        max_pixels: most pixels of an image.
        timeout: seconds for fetching all images of a request.
    """

    domains: frozenset[str] = frozenset()
    local_path: Path | None = None
    max_images: int = 16
    max_bytes: int = 32 << 20
    max_pixels: int = 1 << 26
    timeout: float = 5.0


@dataclass(frozen=True)
class ImagePart:
    """An image of a message; `place` names it in errors."""

    place: str
    url: str


@dataclass(frozen=True)
class DataSource:
    """The bytes came with the request; `mime` is what the caller says they are."""

    data: bytes
    mime: str


@dataclass(frozen=True)
class FileSource:
    """A file below the allowed folder, links followed."""

    path: Path


@dataclass(frozen=True)
class HttpSource:
    """A URL on an allowed host."""

    url: str


Source = DataSource | FileSource | HttpSource


def policy_of(config: ServerConfig) -> MediaPolicy:
    """The operator's settings about media."""
    return MediaPolicy(
        domains=frozenset(domain.lower() for domain in config.allowed_media_domains),
        local_path=None if config.allowed_local_media_path is None else Path(config.allowed_local_media_path),
        max_images=config.max_images,
        max_bytes=int(config.max_media_mib * 2**20),
        max_pixels=config.max_image_pixels,
        timeout=config.media_timeout,
    )


def check_parts(parts: Sequence[ImagePart], policy: MediaPolicy) -> None:
    """Judge images as far as that is possible without opening a file or a connection. Raises a 400."""
    left = policy.max_bytes
    for part in parts:
        source = read_source(part, policy)
        if isinstance(source, DataSource):
            left -= len(source.data)
            if left < 0:
                raise too_many_bytes(policy)
            check_image(source.data, source.mime, part.place, policy)


def find_parts(messages: Sequence[Any], policy: MediaPolicy) -> list[ImagePart]:
    """The images of a chat's messages (`protocol.Message`).

    Raises a 400 for other media, a part without a URL, and too many images.
    """
    found = []
    for index, message in enumerate(messages):
        parts: Any = message.content if isinstance(message.content, list) else ()
        for part in parts:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind in OTHER_MEDIA:
                raise bad_request(
                    f"messages[{index}] holds a part of type {kind!r}; images are the only media", "messages"
                )
            if kind in IMAGE_PARTS:
                found.append(ImagePart(f"messages[{index}]", _url(part, index)))
    if len(found) > policy.max_images:
        raise bad_request(f"the messages hold {len(found)} images; at most {policy.max_images} are allowed", "messages")
    return found


def _url(part: dict[str, Any], index: int) -> str:
    value = part.get("image_url", part.get("image"))
    if isinstance(value, dict):
        value = value.get("url")
    if not isinstance(value, str):
        raise bad_request(f"messages[{index}] holds an image without a url", "messages")
    return value


def read_source(part: ImagePart, policy: MediaPolicy) -> Source:
    """Where an image's bytes are. Opens nothing. Raises a 400 for what the policy or the URL's form does not allow."""
    scheme = part.url[:16].partition(":")[0].lower()
    if scheme == "data":
        return _read_data(part, policy)
    if len(part.url) > MAX_URL_CHARS:
        raise bad_request(f"{part.place}: the image's url is longer than {MAX_URL_CHARS} characters", "messages")
    if scheme == "file":
        return _read_file(part, policy)
    if scheme in ("http", "https"):
        check_url(part.url, part.place, policy)
        return HttpSource(part.url)
    raise bad_request(f"{part.place}: an image must be a data: URI, or a url that this server allows", "messages")


def _read_data(part: ImagePart, policy: MediaPolicy) -> DataSource:
    head = _DATA_HEAD.match(part.url, 0, 512)
    if head is None or not head[1] or not head[3]:
        raise bad_request(f"{part.place}: the data: URI must be data:image/...;base64,...", "messages")
    if (len(part.url) - head.end()) * 3 // 4 > policy.max_bytes:
        raise too_many_bytes(policy)
    try:
        data = base64.b64decode(part.url[head.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise bad_request(f"{part.place}: the data: URI is not valid base64", "messages") from None
    return DataSource(data, head[1].lower())


def _read_file(part: ImagePart, policy: MediaPolicy) -> FileSource:
    refused = bad_request(f"{part.place}: file urls are not allowed here", "messages")
    if policy.local_path is None:
        raise refused
    address = urlsplit(part.url)
    if address.netloc not in ("", "localhost") or "\0" in unquote(address.path):
        raise refused
    root = policy.local_path.resolve()
    path = Path(unquote(address.path)).resolve()
    # The same answer whether or not there is such a file: the server is no way to look around on the disk.
    if not path.is_relative_to(root) or not path.is_file():
        raise refused
    return FileSource(path)


def check_url(url: str, place: str, policy: MediaPolicy) -> tuple[str, int]:
    """The host and port of a URL that the allow-list has. Raises a 400; the addresses are checked when it is opened."""
    # Parsers disagree about these, and what one checks another fetches.
    if "\\" in url or not url.isprintable() or " " in url:
        raise bad_request(f"{place}: the image's url holds characters that a url may not hold", "messages")
    try:
        address = urlsplit(url)
        host, port = (address.hostname or "").rstrip("."), address.port
    except ValueError:
        raise bad_request(f"{place}: the image's url is malformed", "messages") from None
    own_port = {"http": 80, "https": 443}.get(address.scheme)
    name = host if port in (None, own_port) else f"{host}:{port}"
    if own_port is None or not host or address.username is not None or name not in policy.domains:
        raise bad_request(f"{place}: images from this url are not allowed here; send a data: URI", "messages")
    return host, port or own_port


def too_many_bytes(policy: MediaPolicy) -> ApiError:
    """400."""
    return bad_request(f"the images are larger than {policy.max_bytes} bytes together", "messages")


def check_image(data: bytes, mime: str | None, place: str, policy: MediaPolicy) -> tuple[int, int]:
    """Judge an image by its header; no pixel is decoded.

    Args:
        data: the file.
        mime: what the sender says it is, or None.
        place: named in errors.
        policy: limits.

    Returns:
        Width and height, as it is meant to be seen.

    Raises:
        ApiError: 400: no image of a known format, another format than said, no pixels, too many, or an animation.
    """
    with _open(data, place) as image:
        width, height = image.size
        if mime is not None and FORMATS.get(_kind(image)) != mime.replace("image/jpg", "image/jpeg"):
            raise bad_request(f"{place}: the image is not of the type {mime[:50]!r} that it is said to be", "messages")
        if width < 1 or height < 1 or width * height > policy.max_pixels:
            raise bad_request(
                f"{place}: the image has {width} x {height} pixels; 1 to {policy.max_pixels} are allowed", "messages"
            )
        if getattr(image, "is_animated", False) and image.format != "MPO":
            raise bad_request(f"{place}: the image is an animation; send one frame", "messages")
        return (height, width) if _turn(image, place) in _LYING else (width, height)


def _kind(image: Image.Image) -> str:
    """The format. Phones put a preview or a map of brightness behind a JPEG (MPO): the first picture is the photo."""
    return "JPEG" if image.format == "MPO" else image.format or ""


def _turn(image: Image.Image, place: str) -> Image.Transpose | None:
    """How the image is to be turned before it is looked at, as cameras note it."""
    if _kind(image) not in ("JPEG", "WEBP"):  # a PNG's note may lie behind its pixels
        return None
    try:
        noted: Any = image.getexif().get(ExifTags.Base.Orientation)
        return _TURNS.get(noted)
    except Exception as error:  # as in decode_image
        if isinstance(error, MemoryError):
            raise
        raise bad_request(f"{place}: the image's notes (EXIF) are broken", "messages") from error


def decode_image(data: bytes, place: str) -> Image.Image:
    """The pixels, as RGB and upright, of an image that `check_image` has let pass.

    Raises a 400 when its data are broken or cut off.
    """
    try:
        with _open(data, place) as image:
            turn = _turn(image, place)
            pixels = _eight_bits(image).convert("RGB")
            return pixels if turn is None else pixels.transpose(turn)
    # What a decoder raises on hostile data is not documented: OSError, SyntaxError, ValueError, struct.error, ...
    except Exception as error:
        if isinstance(error, (ApiError, MemoryError)):
            raise
        raise bad_request(f"{place}: the image's data are broken or cut off", "messages") from error


def _eight_bits(image: Image.Image) -> Image.Image:
    """An image of 16 bits a pixel (a PNG in grey) in 8; the library would make all but the darkest white."""
    if not image.mode.startswith("I"):
        return image
    import numpy as np

    return Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))


def _open(data: bytes, place: str) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=tuple(FORMATS))
    except Exception as error:  # as in decode_image
        if isinstance(error, MemoryError):
            raise
        raise bad_request(
            f"{place}: the data are no image of a known format ({', '.join(FORMATS)}) and size", "messages"
        ) from error
