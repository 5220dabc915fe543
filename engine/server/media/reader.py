"""A chat's images on their way to the engine, for models that read them.

    parts -> bytes -> headers: sizes, layouts, tokens of the prompt -> (limits hold?) -> pixels -> tiles -> ImageSpan

Until the prompt is known to fit nothing is decoded: how many tokens an image takes follows from its header.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

from kvarena.engine.checkpoints.directory import read_config, resolve_directory
from kvarena.engine.checkpoints.images import Marker, markers, reads_images
from kvarena.engine.errors import ModelError
from kvarena.engine.importing import importing
from kvarena.engine.request import ImageSpan
from kvarena.engine.server.media.fetch import ImageLoader, LoadedImage
from kvarena.engine.server.media.parts import MediaPolicy, check_parts, decode_image, find_parts
from kvarena.engine.server.shared.errors import bad_request
from kvarena.engine.server.text.image_tokens import ImageTokens

if TYPE_CHECKING:  # of a model that reads text nothing of it is imported
    from kvarena.engine.vision.processing import Layout, Processing

# Images that are decoded at once, whoever's they are: each may take hundreds of megabytes on its way.
_DECODERS = 2
# Tiles of one request on their way to the engine, in bytes.
MAX_TILE_BYTES = 192 << 20


class ImageInputs(NamedTuple):
    """What a model makes of images: `tokens` in its prompts, and how they are prepared."""

    tokens: ImageTokens
    processing: Processing


class ImageReader:
    """Takes in the images of chats.

    Args:
        policy: what the operator allows.
        inputs: what the model makes of images; None: it reads text only.
        loader: reads files and URLs; None: one for `policy`.
    """

    def __init__(self, policy: MediaPolicy, inputs: ImageInputs | None, loader: ImageLoader | None = None) -> None:
        self._policy, self._inputs = policy, inputs
        self._loader = ImageLoader(policy) if loader is None else loader
        self._threads = ThreadPoolExecutor(_DECODERS, thread_name_prefix="images")

    @property
    def tokens(self) -> ImageTokens | None:
        """What the model's prompts have around an image; None: it reads text only."""
        return None if self._inputs is None else self._inputs.tokens

    async def open(self, messages: Sequence[Any]) -> list[LoadedImage]:
        """The images of a chat, in order: bytes and sizes; no pixel is decoded.

        Raises:
            ApiError: a 400: the model reads text only, or an image is not allowed, not there, or not one.
        """
        parts = find_parts(messages, self._policy)
        if not parts:
            return []
        if self._inputs is None:
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
        assert self._inputs is not None
        processing = self._inputs.processing
        num_bytes = sum(layout.num_bytes for layout in self._layouts(images))
        if num_bytes > MAX_TILE_BYTES:
            raise bad_request(
                f"the messages' images make {num_bytes >> 20} MiB of tiles; at most {MAX_TILE_BYTES >> 20} are taken "
                "in a request",
                "messages",
            )
        loop = asyncio.get_running_loop()
        return tuple(
            [
                await loop.run_in_executor(self._threads, _span, image, place, processing)
                for image, place in zip(images, places, strict=True)
            ]
        )

    def num_tokens(self, images: Sequence[LoadedImage]) -> list[int]:
        """Positions that each image takes in a prompt, by its size. Raises ApiError: a 400."""
        return [layout.num_tokens for layout in self._layouts(images)]

    def _layouts(self, images: Sequence[LoadedImage]) -> list[Layout]:
        if not images:
            return []
        from kvarena.engine.vision.processing import NoLayout

        assert self._inputs is not None
        made = []
        for image in images:
            try:
                made.append(self._inputs.processing.layout(*image.size))
            except NoLayout as error:
                raise bad_request(f"{image.place}: {error}", "messages") from None
        return made

    def close(self) -> None:
        """End the threads; what they do is not waited for."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def _span(image: LoadedImage, place: tuple[int, int], processing: Processing) -> ImageSpan:
    from kvarena.engine.vision.processing import image_span

    pixels = decode_image(image.data, image.place)
    if pixels.size != image.size:
        raise bad_request(f"{image.place}: the image's data are broken: its size is not its header's", "messages")
    return image_span(processing, pixels, place[0])


def image_inputs(path: str, tokenizer: Any) -> ImageInputs | None:
    """What a model makes of images; None: it reads text only. Loads what cuts images.

    Args:
        path: the model directory.
        tokenizer: its tokenizer, of transformers.

    Raises:
        ModelError: the config of images does not fit together, or the tokenizer lacks a token that stands for one.
    """
    directory = resolve_directory(path)
    config = read_config(directory)
    if not reads_images(config):
        return None

    def token(marker: Marker) -> tuple[str, int]:
        name = getattr(tokenizer, marker.attribute, None) or marker.name
        found = tokenizer.convert_tokens_to_ids(name)
        if found is None or found == tokenizer.unk_token_id:
            raise ModelError(f"the tokenizer in {directory} has no token {name!r}, which stands for an image")
        return name, found

    around = markers(config)
    name, image = token(around.image)
    before, behind = (() if one is None else (token(one)[1],) for one in (around.before, around.behind))
    tokens = ImageTokens(name, image, before, behind)
    with importing():
        from kvarena.engine.vision.processors import processing_of

        processing = processing_of(directory)
        processing.library  # noqa: B018 - its import takes seconds: now, and not with the first image
    return ImageInputs(tokens, processing)
