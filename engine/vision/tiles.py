"""InternVL's images: square tiles of one size, as many as the shape of the image asks for, and the whole in one more.

Which grid of tiles an image gets is said by transformers' `GotOcr2ImageProcessorPil`; PIL resizes to it, and once more
to the thumbnail, as that class does: the bytes are the same, without its copies between PIL, NumPy and other orders of
channels, a third of the time.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from kvarena.engine.checkpoints.internvl import NATIVE
from kvarena.engine.errors import ModelError
from kvarena.engine.vision.processing import TILES_AT_ONCE, Layout, Processing, normalisation

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as both formats state it


@dataclass(frozen=True)
class Tiling(Processing):
    """How images are cut.

    Attributes:
        size: pixels of a tile's side.
        min_tiles, max_tiles: tiles of an image, the thumbnail not counted.
        thumbnail: the whole image in one more tile, where it has several.
        tokens: positions of a tile in a prompt.
    """

    size: int
    min_tiles: int
    max_tiles: int
    thumbnail: bool
    tokens: int

    @property
    def library(self) -> Any:
        """See `Processing.library`."""
        return _library(self)

    @property
    def page_rows(self) -> int:
        """A tile's."""
        return self.tokens

    def layout(self, width: int, height: int) -> Layout:
        """See `Processing.layout`; there is one for every size."""
        columns, rows = self._grid(width, height)
        return Layout(self._count(columns * rows), self.tokens, 3 * self.size**2)

    def cut(self, image: Image.Image) -> np.ndarray:
        """See `Processing.cut`: row by row, and the thumbnail."""
        columns, rows = self._grid(image.width, image.height)
        size, count = self.size, columns * rows
        tiles = np.empty((self._count(count), 3, size, size), dtype=np.uint8)
        _put_bands(image.resize((columns * size, rows * size), self.resample), tiles[:count], columns)
        if len(tiles) > count:
            _put_bands(image.resize((size, size), self.resample), tiles[count:], 1)
        return tiles

    def _grid(self, width: int, height: int) -> tuple[int, int]:
        """Columns and rows of tiles."""
        # Imported here: it takes seconds, and torch with it.
        from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

        columns, rows = get_optimal_tiled_canvas(
            (height, width), (self.size, self.size), self.min_tiles, self.max_tiles
        )
        return columns, rows

    def _count(self, tiles: int) -> int:
        """With the thumbnail."""
        return tiles + int(tiles > 1 and self.thumbnail)

    def largest(self, most_tokens: int) -> list[tuple[int, int]]:  # noqa: ARG002 - tiles are of one size
        """As many tiles as are ever encoded at once."""
        return [(self.size, self.size)] * TILES_AT_ONCE

    def describe(self) -> str:
        """See `Processing.describe`."""
        most = self.max_tiles + (self.thumbnail and self.max_tiles > 1)
        return f"images in up to {most} tiles of {self.tokens} tokens"


@functools.cache
def _library(tiling: Tiling) -> Any:
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    return GotOcr2ImageProcessorPil(
        size={"height": tiling.size, "width": tiling.size},
        crop_to_patches=True,
        min_patches=tiling.min_tiles,
        max_patches=tiling.max_tiles,
        image_mean=list(tiling.mean),
        image_std=list(tiling.std),
        resample=tiling.resample,
        do_convert_rgb=True,
    )


def _put_bands(image: Image.Image, tiles: np.ndarray, columns: int) -> None:
    """Cut an image whose sides are multiples of a tile's into `tiles`, a channel at a time: no pixel is moved twice."""
    num, channels, size = tiles.shape[:3]
    cut = tiles.reshape(num // columns, columns, channels, size, size)
    for channel, band in enumerate(image.split()):
        cut[:, :, channel] = np.asarray(band).reshape(-1, size, columns, size).swapaxes(1, 2)


def tiling(config: Mapping[str, Any], processor: Mapping[str, Any]) -> Tiling:
    """How a checkpoint's images are cut; see `make_processing`."""
    vision = config.get("vision_config") or {}
    native = config.get("model_type") == NATIVE
    size = _side(vision.get("image_size", 448), "image_size")
    least, most, thumbnail = processor.get("min_patches", 1), processor.get("max_patches", 12), True
    if native and processor.get("size"):
        size = _side(processor["size"], "size")
    if not native:
        size = _side(config.get("force_image_size") or size, "force_image_size")
        least, most = config.get("min_dynamic_patch", 1), config.get("max_dynamic_patch", 12)
        thumbnail = config.get("use_thumbnail") is not False
        if config.get("dynamic_image_size") is False:
            least = most = 1
    patch, ratio = _side(vision.get("patch_size", 14), "patch_size"), config.get("downsample_ratio", 0.5)
    side = size / patch * ratio
    numbers = isinstance(least, int) and isinstance(most, int)
    if not numbers or not 1 <= least <= most or side != int(side) or side < 1:
        raise ModelError(
            f"the config of images does not fit together: tiles of {size} pixels, patches of {patch}, downsample_ratio "
            f"{ratio}, {least} to {most} tiles"
        )
    return Tiling(
        *normalisation(processor, _MEAN, _STD),
        size=size,
        min_tiles=least,
        max_tiles=most,
        thumbnail=thumbnail,
        tokens=int(side) ** 2,
    )


def _side(value: Any, name: str) -> int:
    """The side of a square that a config gives as a number, a pair or a mapping."""
    if isinstance(value, Mapping):
        value = [value.get("height"), value.get("width")]
    sides = value if isinstance(value, (list, tuple)) else [value, value]
    if len(sides) != 2 or sides[0] != sides[1] or not isinstance(sides[0], int) or sides[0] < 1:
        raise ModelError(f"{name}={value} of the images' config is not the side of a square in pixels")
    return sides[0]
