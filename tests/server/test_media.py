"""Images: what is taken in, and what is never opened (reliability items 23 and 24)."""

from __future__ import annotations

import asyncio
import base64
import io
import ipaddress
import os
import struct
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kvarena.engine.errors import ConfigError
from kvarena.engine.server.api.protocol import Message
from kvarena.engine.server.media.fetch import ImageLoader, is_public
from kvarena.engine.server.media.parts import ImagePart, MediaPolicy, check_parts, decode_image, find_parts, policy_of
from kvarena.engine.server.shared.config import ServerConfig
from kvarena.engine.server.shared.errors import ApiError


def _image(fmt: str = "PNG", size: tuple[int, int] = (3, 2), frames: int = 1) -> bytes:
    file = io.BytesIO()
    images = [Image.new("RGB", size, (200, 10 * i, 30)) for i in range(frames)]
    images[0].save(file, fmt, **({"save_all": True, "append_images": images[1:]} if frames > 1 else {}))
    return file.getvalue()


def _uri(data: bytes, mime: str = "image/png") -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def _promised(width: int, height: int) -> bytes:
    """A PNG header that promises an image of this size."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = b"IDAT" + zlib.compress(b"\0")
    parts = (struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in (header, pixels))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _load(url: str, policy: MediaPolicy | None = None, *, everywhere: bool = True) -> Image.Image:
    """Load one image; `everywhere` lets the loader connect to any address, so that it can reach this machine."""
    loader = ImageLoader(policy or MediaPolicy(), *([lambda address: True] if everywhere else []))
    [loaded] = asyncio.run(loader.load([ImagePart("messages[0]", url)]))
    image = decode_image(loaded.data, loaded.place)
    assert image.size == loaded.size
    return image


def _refusal(url: str, policy: MediaPolicy | None = None, *, everywhere: bool = True) -> str:
    with pytest.raises(ApiError) as caught:
        _load(url, policy, everywhere=everywhere)
    assert caught.value.status == 400
    return caught.value.message


class Site(BaseHTTPRequestHandler):
    """Answers of a web server, by path; `seen` are the paths that were asked for."""

    seen: list[str]

    def do_GET(self):
        self.seen.append(self.path)
        kind, body, headers = "image/png", _image(), {}
        status = 200
        if self.path.startswith("/to?"):
            status, headers = 302, {"Location": self.path[4:]}
        elif self.path == "/html":
            kind, body = "text/html", b"<p>secret</p>"
        elif self.path == "/gzip":
            headers = {"Content-Encoding": "gzip"}
        elif self.path == "/404":
            status = 404
        elif self.path == "/large":
            body = b"x" * 300_000
        elif self.path == "/slow":
            time.sleep(1.5)
        self.send_response(status)
        for key, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        try:
            self.wfile.write(body)
        except ConnectionError:
            return

    def log_message(self, *args):
        return


@pytest.fixture(scope="module")
def site():
    handler = type("Handler", (Site,), {"seen": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()


def _address(site, timeout: float = 120.0) -> tuple[str, MediaPolicy]:
    host = f"127.0.0.1:{site.server_address[1]}"
    return f"http://{host}", MediaPolicy(domains=frozenset({host}), max_bytes=200_000, timeout=timeout)


@pytest.mark.parametrize(("fmt", "mime"), (("PNG", "image/png"), ("JPEG", "image/jpeg"), ("JPEG", "image/jpg"),
                                           ("WEBP", "image/webp"), ("GIF", "image/gif")))  # fmt: skip
def test_data_uris_are_decoded(fmt, mime):
    image = _load(_uri(_image(fmt), mime))
    assert (image.mode, image.size) == ("RGB", (3, 2))
    assert abs(image.getpixel((0, 0))[0] - 200) < 12


def _saved(image: Image.Image, fmt: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, fmt, **options)
    return file.getvalue()


def test_what_cameras_scanners_and_editors_write():
    """Sixteen bits in grey, inks, palettes and transparency: the picture, not black or white."""
    ramp = np.linspace(0, 65535, 40 * 30).astype(np.uint16).reshape(30, 40)
    grey = np.asarray(_load(_uri(_saved(Image.fromarray(ramp), "PNG"))))
    assert (grey == (ramp >> 8)[..., None]).all()
    colours = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    image = Image.fromarray(colours)
    clear = image.copy()
    clear.putalpha(0)
    for made in (image.convert("P"), image.convert("L"), image.convert("LA"), image.convert("1"), clear):
        assert abs(np.asarray(_load(_uri(_saved(made, "PNG")))).mean() - 127) < 20
    inks = _load(_uri(_saved(image.convert("CMYK"), "JPEG"), "image/jpeg"))
    assert inks.mode == "RGB" and abs(np.asarray(inks).mean() - 127) < 20
    noted = Image.Exif()
    noted[0x0112] = 99
    assert _load(_uri(_saved(image, "JPEG", exif=noted), "image/jpeg")).size == (40, 30)


def _png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A black PNG with further chunks before its pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"\0" * (height * (1 + 3 * width))))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunk(*one) for one in chunks) + pixels + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", [b"zTXt", b"iCCP"])
def test_a_note_that_unpacks_to_megabytes_is_not_unpacked(kind):
    bomb = _png(10, 10, (kind, b"a\0\0" + zlib.compress(b"x" * 30_000_000)))
    assert len(bomb) < 50_000
    with pytest.raises(ApiError, match="no image of a known format") as caught:
        check_parts([ImagePart("messages[0]", _uri(bomb))], MediaPolicy())
    assert caught.value.status == 400


@pytest.mark.parametrize(
    ("url", "words"),
    (
        ("data:image/png;base64,%%%%", "base64"),
        ("data:image/png;base64,AAA", "base64"),
        ("data:image/png,abc", "data:image/..."),
        ("data:;base64,AAAA", "data:image/..."),
        (_uri(b""), "known format"),
        (_uri(b"not an image"), "known format"),
        (_uri(_image("BMP"), "image/bmp"), "known format"),
        (_uri(_image("TIFF", frames=2), "image/tiff"), "known format"),
        (_uri(_image("JPEG"), "image/png"), "not of the type"),
        (_uri(_image(), "text/html"), "not of the type"),
        (_uri(_promised(0, 0)), "size"),
        (_uri(_promised(30000, 30000)), "size"),
        (_uri(_promised(9000, 9000)), "9000 x 9000 pixels"),
        (_uri(_image("GIF", frames=3), "image/gif"), "animation"),
        (_uri(_image("WEBP", frames=2), "image/webp"), "animation"),
    ),
)
def test_23_a_bad_image_is_refused_by_its_header(url, words):
    with pytest.raises(ApiError) as caught:
        check_parts([ImagePart("messages[0]", url)], MediaPolicy())
    assert caught.value.status == 400
    assert words in caught.value.message
    assert caught.value.message.startswith("messages[0]")


def test_23_truncated_data_are_refused_when_they_are_decoded():
    noise = Image.frombytes("RGB", (64, 64), os.urandom(64 * 64 * 3))
    file = io.BytesIO()
    noise.save(file, "PNG")
    assert "broken" in _refusal(_uri(file.getvalue()[:2000]))


def test_23_limits_hold_for_a_request_as_a_whole():
    data = _uri(_image(size=(40, 40)))
    content = [{"type": "image_url", "image_url": {"url": data}}] * 3
    messages = [Message(role="user", content=content)] * 2
    with pytest.raises(ApiError, match="at most 5"):
        find_parts(messages, MediaPolicy(max_images=5))
    parts = find_parts(messages, MediaPolicy())
    assert len(parts) == 6
    size = len(_image(size=(40, 40)))
    check_parts(parts, MediaPolicy(max_bytes=6 * size))
    with pytest.raises(ApiError, match="together"):
        check_parts(parts, MediaPolicy(max_bytes=6 * size - 1))


def test_every_spelling_of_an_image_part_is_found_and_other_media_are_refused():
    url = _uri(_image())
    spellings = [{"type": "image_url", "image_url": url}, {"type": "image_url", "image_url": {"url": url}},
                 {"type": "input_image", "image_url": url}, {"type": "image", "image": url}]  # fmt: skip
    assert [part.url for part in find_parts([Message(role="user", content=spellings)], MediaPolicy())] == [url] * 4
    for part in (
        {"type": "video_url", "video_url": {"url": url}},
        {"type": "image_url"},
        {"type": "image_url", "image_url": 7},
    ):
        with pytest.raises(ApiError):
            find_parts([Message(role="user", content=[part])], MediaPolicy())


@pytest.mark.parametrize(
    "url",
    (
        "http://127.0.0.1/x.png", "http://169.254.169.254/latest", "http://[::1]/", "http://2130706433/",
        "http://0x7f.1/", "http:\\\\127.0.0.1\\x", "file:///etc/passwd", "/etc/passwd", "ftp://x/y", "", "gopher://x",
        "http://user@127.0.0.1/", "https://example.com/x.png", "javascript:1", "http://[", "http://a b/",
        "http://" + "a" * 4000,
    ),
)  # fmt: skip
def test_24_nothing_is_opened_by_default(url, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", fail)
    monkeypatch.setattr(asyncio.BaseEventLoop, "create_connection", fail)
    message = _refusal(url, everywhere=False)
    assert "root:" not in message
    with pytest.raises(ApiError):
        check_parts([ImagePart("messages[0]", url)], MediaPolicy())


def test_an_allowed_host_is_fetched(site):
    base, policy = _address(site)
    assert _load(f"{base}/x.png", policy).size == (3, 2)
    assert _load(f"{base}/to?/x.png", policy).size == (3, 2)


def test_24_an_allowed_host_with_a_private_address_is_not_connected_to(site):
    base, policy = _address(site)
    before = len(site.RequestHandlerClass.seen)
    assert "cannot be fetched" in _refusal(f"{base}/x.png", policy, everywhere=False)
    assert len(site.RequestHandlerClass.seen) == before


@pytest.mark.parametrize(
    "target",
    ("http://127.0.0.1:1/x", "http://localhost/x", "file:///etc/passwd", "//127.0.0.1:1/x", "http://169.254.169.254/",
     "data:image/png;base64,AAAA"),
)  # fmt: skip
def test_24_a_redirect_is_checked_like_the_url_itself(site, target):
    base, policy = _address(site)
    assert "not allowed" in _refusal(f"{base}/to?{target}", policy)


def test_24_redirects_end(site):
    base, policy = _address(site)
    before = len(site.RequestHandlerClass.seen)
    url = f"{base}/to?" * 6 + "/x"
    assert "redirects more than 3 times" in _refusal(url, policy)
    assert len(site.RequestHandlerClass.seen) - before == 4


@pytest.mark.parametrize(
    ("path", "words"),
    (("/html", "does not answer with an image"), ("/404", "does not answer with an image"),
     ("/gzip", "does not answer with an image"), ("/large", "larger than"), ("/slow", "did not arrive")),
)  # fmt: skip
def test_what_a_server_answers_is_bounded_and_never_shown(site, path, words):
    base, policy = _address(site, 0.7 if path == "/slow" else 120.0)
    message = _refusal(base + path, policy)
    assert words in message
    assert "secret" not in message


def test_a_closed_port_and_an_unknown_host_look_the_same():
    policy = MediaPolicy(domains=frozenset({"127.0.0.1:9", "no-such-host.invalid"}))
    first = _refusal("http://127.0.0.1:9/x", policy)
    assert (
        first
        == _refusal("http://no-such-host.invalid/x", policy)
        == _refusal("http://127.0.0.1:9/x", policy, everywhere=False)
    )


@pytest.mark.parametrize(
    ("address", "public"),
    (
        ("93.184.215.14", True), ("2606:4700::1111", True), ("10.0.0.1", False), ("127.8.8.8", False),
        ("0.0.0.0", False),
        ("169.254.169.254", False), ("100.64.0.1", False), ("224.0.0.1", False), ("::1", False), ("fe80::1", False),
        ("fc00::1", False), ("::ffff:127.0.0.1", False), ("::ffff:93.184.215.14", True), ("64:ff9b::7f00:1", False),
        ("2002:7f00:1::", False), ("ff02::1", False), ("::7f00:1", False), ("::5db8:d70e", False),
        ("64:ff9b:1::5db8:d70e", False), ("fec0::1", False), ("feff::1", False), ("64:ff9b::5db8:d70e", True),
    ),
)  # fmt: skip
def test_24_only_addresses_of_the_open_internet_are_public(address, public):
    assert is_public(ipaddress.ip_address(address)) is public


def test_files_are_read_below_the_allowed_folder_only(tmp_path: Path):
    folder, outside = tmp_path / "images", tmp_path / "outside.png"
    folder.mkdir()
    (folder / "a b.png").write_bytes(_image())
    outside.write_bytes(_image())
    (folder / "link.png").symlink_to(outside)
    os.mkfifo(folder / "pipe.png")
    policy = MediaPolicy(local_path=folder)
    assert _load(f"file://{folder}/a%20b.png", policy).size == (3, 2)
    assert _load(f"file://localhost{folder}/a%20b.png", policy).size == (3, 2)
    assert "larger" in _refusal(f"file://{folder}/a%20b.png", MediaPolicy(local_path=folder, max_bytes=10))
    refusals = {
        _refusal(f"file://{path}", policy)
        for path in (outside, f"{folder}/../outside.png", f"{folder}/%2e%2e/outside.png", f"{folder}/link.png",
                     f"{folder}/pipe.png", f"{folder}/missing.png", folder, "/etc/passwd", f"evil{folder}/a%20b.png")
    }  # fmt: skip
    assert refusals == {"messages[0]: file urls are not allowed here"}


def test_the_operators_settings(tmp_path: Path):
    config = ServerConfig.from_dict({"allowed_media_domains": "CDN.example.com", "max_media_mib": 0.5,
                                     "allowed_local_media_path": str(tmp_path)})  # fmt: skip
    policy = policy_of(config)
    assert policy.domains == {"cdn.example.com"}
    assert (policy.max_bytes, policy.local_path) == (2**19, tmp_path)
    for wrong in ({"allowed_media_domains": "http://x"}, {"allowed_media_domains": "*.x"}, {"max_images": -1},
                  {"allowed_local_media_path": "/nonexistent"}, {"media_timeout": 0}):  # fmt: skip
        with pytest.raises(ConfigError):
            ServerConfig.from_dict(wrong)
