"""Qwen's images: one piece each, resized so that its sides are whole numbers of merged patches.

The size is transformers' `smart_resize`, the resizing its `Qwen2VLImageProcessorPil`. Cutting into patches waits for
the tower, so that what travels and is hashed is the resized picture.

    448 x 336 pixels, patches of 14, merged by 2 x 2  ->  32 x 24 patches  ->  12 rows x 16 columns: 192 tokens
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from kvarena.engine.checkpoints.images import QWEN3
from kvarena.engine.errors import ModelError
from kvarena.engine.vision.processing import TILES_AT_ONCE, Layout, NoLayout, Processing, normalisation

_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_CLIP_PIXELS, _QWEN3_PIXELS = (56 * 56, 14 * 14 * 4 * 1280), (65536, 16777216)
_NARROWEST = 200  # one side over the other, of `smart_resize`
# So many patches are a tile's worth of a step's budget: those of 448 x 448 pixels, which InternVL's tiles have.
PATCHES_OF_A_TILE = 1024


@dataclass(frozen=True)
class Patching(Processing):
    """How images are resized and cut.

    Attributes:
        patch_size: pixels of a patch's side.
        temporal_patch_size: frames of a patch, all of them the same picture.
        merge_size: patches that are one token, along each side.
        min_pixels, max_pixels: of the resized image.
    """

    patch_size: int
    temporal_patch_size: int
    merge_size: int
    min_pixels: int
    max_pixels: int
    has_grids: ClassVar[bool] = True

    @property
    def factor(self) -> int:
        """Pixels of a token's side."""
        return self.patch_size * self.merge_size

    @property
    def library(self) -> Any:
        """See `Processing.library`; it resizes, and leaves the picture in one piece."""
        return _library(self)

    @property
    def page_rows(self) -> int:
        """Images differ in size: few rows of their last page stay empty."""
        return 16

    def layout(self, width: int, height: int) -> Layout:
        """See `Processing.layout`."""
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        try:
            tall, wide = smart_resize(height, width, self.factor, self.min_pixels, self.max_pixels)
        except ValueError:
            raise NoLayout(
                f"the image of {width} x {height} pixels is too narrow: the model takes sides of up to 1 : {_NARROWEST}"
            ) from None
        return self._of(tall, wide)

    def _of(self, tall: int, wide: int) -> Layout:
        grid = (tall // self.factor, wide // self.factor)
        num_tokens = grid[0] * grid[1]
        weight = math.ceil(num_tokens * self.merge_size**2 / PATCHES_OF_A_TILE)
        return Layout(1, num_tokens, 3 * tall * wide, weight, grid)

    def cut(self, image: Image.Image) -> np.ndarray:
        """See `Processing.cut`."""
        made = self.library(images=image, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"]
        return np.ascontiguousarray(made, dtype=np.uint8)[None]

    def largest(self, most_tokens: int) -> list[tuple[int, int]]:
        """As many of the largest images as fit, then tiles; a narrow one has more pixels than a low `max_pixels`."""
        most = max(self.max_pixels // self.factor**2, math.isqrt(_NARROWEST * self.max_pixels) // self.factor)
        count = max(1, min(most, most_tokens))
        rows = math.isqrt(count)
        tall, wide = rows * self.factor, count // rows * self.factor
        weight, tile = self._of(tall, wide).weight, math.isqrt(PATCHES_OF_A_TILE) // self.merge_size * self.factor
        num = max(1, TILES_AT_ONCE // weight)
        return [(tall, wide)] * num + [(tile, tile)] * max(0, TILES_AT_ONCE - num * weight)

    def describe(self) -> str:
        """See `Processing.describe`."""
        return f"images of {self.factor} x {self.factor} pixels a token, up to {self.max_pixels // self.factor**2:,}"


@functools.cache
def _library(patching: Patching) -> Any:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    class Resizer(Qwen2VLImageProcessorPil):
        """The library's, which leaves the patches to the tower."""

        def patchify(
            self, image: np.ndarray, patch_size: int, merge_size: int, temporal_patch_size: int
        ) -> tuple[np.ndarray, int, int]:
            del merge_size, temporal_patch_size
            return image, image.shape[1] // patch_size, image.shape[2] // patch_size

    return Resizer(
        size={"shortest_edge": patching.min_pixels, "longest_edge": patching.max_pixels},
        patch_size=patching.patch_size,
        temporal_patch_size=patching.temporal_patch_size,
        merge_size=patching.merge_size,
        image_mean=list(patching.mean),
        image_std=list(patching.std),
        resample=patching.resample,
        do_convert_rgb=True,
    )


def patching(config: Mapping[str, Any], processor: Mapping[str, Any]) -> Patching:
    """How a checkpoint's images are resized; see `make_processing`."""
    vision = config.get("vision_config") or {}
    third = config.get("model_type") == QWEN3
    mean, std = _HALF if third else _CLIP
    least, most = _QWEN3_PIXELS if third else _CLIP_PIXELS
    size = processor.get("size") or {}
    least = processor.get("min_pixels") or size.get("shortest_edge") or size.get("min_pixels") or least
    most = processor.get("max_pixels") or size.get("longest_edge") or size.get("max_pixels") or most
    made: dict[str, Any] = {"min_pixels": least, "max_pixels": most}
    for name, theirs, default in (
        ("patch_size", "patch_size", 16 if third else 14),
        ("temporal_patch_size", "temporal_patch_size", 2),
        ("merge_size", "spatial_merge_size", 2),
    ):
        stated = vision.get(theirs, default)
        made[name] = processor.get(name) or stated
        if made[name] != stated:
            raise ModelError(
                f"the config of images does not fit together: preprocessor_config.json has {name}={made[name]} and "
                f"config.json {theirs}={stated}"
            )
    if not all(isinstance(value, int) and value > 0 for value in made.values()) or least > most:
        named = ", ".join(f"{name}={value}" for name, value in made.items())
        raise ModelError(f"the config of images does not fit together: {named}")
    return Patching(
        *normalisation(processor, mean, std),
        **made,
    )
