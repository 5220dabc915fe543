"""From an image to what a vision tower reads: the contract of all families, and what they share.

    size    -> layout      tiles, tokens and bytes: known from a header, no pixel is looked at
    pixels  -> cut         uint8 [tiles, 3, height, width], by the processor of transformers
            -> identity    a digest of them and of how they were made

The division by 255 and the normalisation wait for the tower (`byte_values`), so that pixels travel as bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
from PIL import Image

from kvarena.engine.errors import ModelError
from kvarena.engine.request import ImageSpan

# An identity is above any token id.
_ABOVE_TOKENS = 1 << 256
# The tower's own batch, in tiles' worth: all of a step by default. InternVL's have 1,025 rows: four of them are whole
# waves of the library's products on 132 multiprocessors.
TILES_AT_ONCE = 16


_BICUBIC, _FILTERS = 3, range(6)


class Normalisation(NamedTuple):
    """What is done to an image's values: see `Processing`."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: int


def normalisation(preprocessor: Mapping[str, Any], mean: tuple[float, ...], std: tuple[float, ...]) -> Normalisation:
    """What a checkpoint says of it; `mean`, `std` and the bicubic filter where it says nothing. Raises ModelError."""
    value = preprocessor.get("resample")
    if isinstance(value, bool) or (value is not None and value not in _FILTERS):
        raise ModelError(f"resample={value} of the images' config is none of the filters 0 to {max(_FILTERS)}")
    return Normalisation(
        _channels(preprocessor, "image_mean", mean),
        _channels(preprocessor, "image_std", std),
        _BICUBIC if value is None else int(value),
    )


def _channels(preprocessor: Mapping[str, Any], name: str, usual: tuple[float, ...]) -> tuple[float, ...]:
    """A number for each of three channels."""
    value = preprocessor.get(name)
    if value is None:
        return usual
    numbers = [one for one in value if isinstance(one, (int, float))] if isinstance(value, (list, tuple)) else []
    if len(numbers) != 3 or len(value) != 3 or not all(math.isfinite(one) for one in numbers):
        raise ModelError(f"{name}={value} of the images' config is not a number for each of three channels")
    if name == "image_std" and 0 in numbers:
        raise ModelError(f"{name}={value} of the images' config divides by 0")
    return tuple(float(one) for one in numbers)


class Layout(NamedTuple):
    """What an image of some size takes.

    Attributes:
        num_tiles: pieces that are encoded apart.
        tile_tokens: positions of each in a prompt.
        tile_bytes: of each one's pixels.
        weight, grid: see `ImageSpan`.
    """

    num_tiles: int
    tile_tokens: int
    tile_bytes: int
    weight: int = 1
    grid: tuple[int, int] | None = None

    @property
    def num_tokens(self) -> int:
        """Positions in a prompt."""
        return self.num_tiles * self.tile_tokens

    @property
    def num_bytes(self) -> int:
        """Of all its pixels."""
        return self.num_tiles * self.tile_bytes


class NoLayout(ValueError):
    """An image of a size that the model does not take; says why, without the image's name."""


@dataclass(frozen=True)
class Processing(ABC):
    """How a checkpoint's images are prepared. Two that are equal prepare alike.

    Attributes:
        mean, std: of each channel, after the division by 255.
        resample: filter, as PIL numbers them.
        has_grids: images have positions of three dimensions.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: int
    has_grids: ClassVar[bool] = False

    @property
    @abstractmethod
    def library(self) -> Any:
        """The processor of transformers. Its import takes seconds, and torch with it."""

    @property
    @abstractmethod
    def page_rows(self) -> int:
        """Rows in which the encoder cache keeps what was encoded: a divisor of most tiles' tokens."""

    @abstractmethod
    def layout(self, width: int, height: int) -> Layout:
        """What an image of that size takes. Raises NoLayout."""

    @abstractmethod
    def cut(self, image: Image.Image) -> np.ndarray:
        """The tiles of an RGB image as its layout has them: uint8 [tiles, 3, height, width]."""

    @abstractmethod
    def largest(self, most_tokens: int) -> list[tuple[int, int]]:
        """Height and width of tiles that take the most memory at once, of prompts up to `most_tokens`."""

    @abstractmethod
    def describe(self) -> str:
        """How images are cut, for the line at start."""


def image_span(processing: Processing, image: Image.Image, start: int = 0) -> ImageSpan:
    """What the engine gets of an RGB image whose positions begin at `start`. Raises NoLayout."""
    layout, pixels = processing.layout(*image.size), processing.cut(image)
    name = identity(processing, image.size, pixels)
    return ImageSpan(start, start + layout.num_tokens, name, layout.num_tiles, pixels, layout.weight, layout.grid)


def identity(processing: Processing, size: tuple[int, int], pixels: np.ndarray) -> int:
    """A digest of an image's tiles and of how they were made, above any token id.

    Every field has its length before it, so that no two inputs are the same bytes.

    Args:
        processing: how they were made.
        size: width and height of the image.
        pixels: its tiles.
    """
    digest = hashlib.sha256()
    made = json.dumps([type(processing).__name__, asdict(processing), size, pixels.shape], sort_keys=True).encode()
    for field in (b"kvarena image 2", made, pixels.data.cast("B")):
        digest.update(len(field).to_bytes(8, "big"))
        digest.update(field)
    return _ABOVE_TOKENS | int.from_bytes(digest.digest(), "big")


def byte_values(processing: Processing) -> np.ndarray:
    """What each byte of each channel becomes, float32 [3, 256]: by the library's own rescaling and normalisation."""
    every = np.arange(256, dtype=np.uint8)[None, None].repeat(len(processing.mean), 0)
    maker = processing.library
    scaled = maker.normalize(maker.rescale(every, maker.rescale_factor), maker.image_mean, maker.image_std)
    return np.ascontiguousarray(scaled[:, 0], dtype=np.float32)
