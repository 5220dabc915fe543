"""A chat's images on their way to the engine, for models that read them.

    parts -> bytes -> headers: sizes, tiles, tokens of the prompt -> (limits hold?) -> pixels -> tiles -> ImageSpan

Until the prompt is known to fit nothing is decoded: how many tokens an image takes follows from its header.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from kvarena.engine.checkpoints.directory import read_config, resolve_directory
from kvarena.engine.checkpoints.internvl import END_TOKEN, IMAGE_TOKEN, START_TOKEN, Tiling, reads_images, tiling_of
from kvarena.engine.errors import ModelError
from kvarena.engine.importing import importing
from kvarena.engine.request import ImageSpan
from kvarena.engine.server.media.fetch import ImageLoader, LoadedImage
from kvarena.engine.server.media.parts import MediaPolicy, check_parts, decode_image, find_parts
from kvarena.engine.server.shared.errors import bad_request
from kvarena.engine.server.text.image_tokens import ImageTokens

# Images that are decoded at once, whoever's they are: each may take hundreds of megabytes on its way.
_DECODERS = 2
# Tiles of one request on their way to the engine, in bytes.
MAX_TILE_BYTES = 192 << 20


class ImageReader:
    """Takes in the images of chats.

    Args:
        policy: what the operator allows.
        tokens: what the model's prompts have around an image, and how images are cut; None: it reads text only.
        loader: reads files and URLs; None: one for `policy`.
    """

    def __init__(self, policy: MediaPolicy, tokens: ImageTokens | None, loader: ImageLoader | None = None) -> None:
        self._policy, self.tokens = policy, tokens
        self._loader = ImageLoader(policy) if loader is None else loader
        self._threads = ThreadPoolExecutor(_DECODERS, thread_name_prefix="images")

    async def open(self, messages: Sequence[Any]) -> list[LoadedImage]:
        """The images of a chat, in order: bytes and sizes; no pixel is decoded.

        Raises:
            ApiError: a 400: the model reads text only, or an image is not allowed, not there, or not one.
        """
        parts = find_parts(messages, self._policy)
        if not parts:
            return []
        if self.tokens is None:
            await asyncio.to_thread(check_parts, parts, self._policy)
            raise bad_request(f"{parts[0].place} holds an image; this model reads text only", "messages")
        return await self._loader.load(parts)

    async def spans(self, images: Sequence[LoadedImage], places: Sequence[tuple[int, int]]) -> tuple[ImageSpan, ...]:
        """What the engine gets of a prompt's images.

        Args:
            images: from `open`.
            places: first position and end of each in the prompt.

        Raises:
            ApiError: a 400: an image's data are broken or cut off, or all tiles together are too many.
        """
        if not images:
            return ()
        assert self.tokens is not None
        tiling = self.tokens.tiling
        num_bytes = sum((stop - start) // tiling.tokens for start, stop in places) * 3 * tiling.size**2
        if num_bytes > MAX_TILE_BYTES:
            raise bad_request(
                f"the messages' images make {num_bytes >> 20} MiB of tiles; at most {MAX_TILE_BYTES >> 20} are taken "
                "in a request",
                "messages",
            )
        loop = asyncio.get_running_loop()
        return tuple(
            [
                await loop.run_in_executor(self._threads, _span, image, place, tiling)
                for image, place in zip(images, places, strict=True)
            ]
        )

    def num_tiles(self, images: Sequence[LoadedImage]) -> list[int]:
        """Tiles of each image, by its size."""
        if not images:
            return []
        from kvarena.engine.vision.tiles import num_tiles

        assert self.tokens is not None
        return [num_tiles(self.tokens.tiling, *image.size) for image in images]

    def close(self) -> None:
        """End the threads; what they do is not waited for."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def _span(image: LoadedImage, place: tuple[int, int], tiling: Tiling) -> ImageSpan:
    from kvarena.engine.vision.tiles import identity, make_tiles

    pixels = decode_image(image.data, image.place)
    if pixels.size != image.size:
        raise bad_request(f"{image.place}: the image's data are broken: its size is not its header's", "messages")
    tiles = make_tiles(tiling, pixels)
    return ImageSpan(*place, identity(tiling, image.size, tiles), len(tiles), tiles)


def image_tokens(path: str, tokenizer: Any) -> ImageTokens | None:
    """What a model's prompts have around an image; None: it reads text only. Loads what cuts images.

    Args:
        path: the model directory.
        tokenizer: its tokenizer, of transformers.

    Raises:
        ModelError: the config of images does not fit together, or the tokenizer lacks a token that stands for one.
    """
    directory = resolve_directory(path)
    if not reads_images(read_config(directory)):
        return None
    names = [
        getattr(tokenizer, attribute, None) or name
        for attribute, name in (
            ("context_image_token", IMAGE_TOKEN), ("start_image_token", START_TOKEN), ("end_image_token", END_TOKEN)
        )
    ]  # fmt: skip
    ids = [tokenizer.convert_tokens_to_ids(name) for name in names]
    for name, token in zip(names, ids, strict=True):
        if token is None or token == tokenizer.unk_token_id:
            raise ModelError(f"the tokenizer in {directory} has no token {name!r}, which stands for an image")
    tiling = tiling_of(directory)
    with importing():
        from kvarena.engine.vision.tiles import processor

        processor(tiling)  # its import takes seconds: now, and not with the first image
    image, start, end = ids
    return ImageTokens(names[0], image, start, end, tiling)
