"""From an image to tiles: how many there will be, known from its size alone, and their bytes.

Tiling, resizing and the thumbnail are transformers' `GotOcr2ImageProcessorPil`, which is InternVL's; the division by
255 and the normalisation wait for the vision tower, so that a tile travels as bytes: a quarter of its size.
"""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import asdict
from typing import Any

import numpy as np
from PIL import Image

from kvarena.engine.checkpoints.internvl import Tiling

# An identity is above any token id.
_ABOVE_TOKENS = 1 << 256


@functools.cache
def processor(tiling: Tiling) -> Any:
    """The library's processor. Its import takes seconds, and torch with it."""
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


def num_tiles(tiling: Tiling, width: int, height: int) -> int:
    """Tiles of an image of that size, its thumbnail among them. Looks at no pixel."""
    count = int(processor(tiling).get_number_of_image_patches(height, width))
    return count - 1 if count > 1 and not tiling.thumbnail else count


def make_tiles(tiling: Tiling, image: Image.Image) -> np.ndarray:
    """The tiles of an RGB image: uint8 [tiles, 3, size, size]."""
    made = processor(tiling)(images=image, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"]
    tiles = np.ascontiguousarray(made, dtype=np.uint8)
    return tiles[:-1] if len(tiles) > 1 and not tiling.thumbnail else tiles


def identity(tiling: Tiling, size: tuple[int, int], tiles: np.ndarray) -> int:
    """A digest of an image's tiles and of how they were made, above any token id.

    Every field has its length before it, so that no two inputs are the same bytes.

    Args:
        tiling: how they were made.
        size: width and height of the image.
        tiles: its tiles.
    """
    digest = hashlib.sha256()
    made = json.dumps([asdict(tiling), size, tiles.shape], sort_keys=True).encode()
    for field in (b"kvarena image 1", made, tiles.data.cast("B")):
        digest.update(len(field).to_bytes(8, "big"))
        digest.update(field)
    return _ABOVE_TOKENS | int.from_bytes(digest.digest(), "big")
