"""What a step's images need: tiles encoded once and kept, and their rows put where the prompt has placeholders.

    step      request A, positions 40..90                      request B: a decode
    prompt    text | image: tile 0 | tile 1 | tile 2 | text    a token
    rows      embeddings, and of each tile those that the step touches

A tile is encoded when a step first touches it, whoever's it is; chunked prompts, preempted requests and other requests
with the same image find it in the cache. Where that is too small a tile is encoded again: right, and slower.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from kvarena.engine.contract import StepPlan
from kvarena.engine.vision.cache import FeatureCache, Key
from kvarena.engine.vision.processing import TILES_AT_ONCE
from kvarena.engine.vision.tower import VisionTower


class InputRows(NamedTuple):
    """What stands in place of a step's token ids.

    Attributes:
        embeds: [T, hidden], the stream before the first layer.
        at: int64 [n], positions of images in the step, in order.
        deep: [levels, n, hidden], what is added to the stream at these positions behind the first layers, a level a
            layer (DeepStack, arXiv 2406.04334); most models have no level.
    """

    embeds: Tensor
    at: Tensor
    deep: Tensor


def touches_images(plan: StepPlan) -> bool:
    """Whether a step computes a position of an image."""
    return any(
        image.start < start + count and start < image.stop
        for req, start, count in plan.scheduled[plan.num_decodes :]
        for image in req.images
    )


class ImageCounts(NamedTuple):
    """What an encoder has done, and what it keeps.

    Attributes:
        hits, misses: tiles that steps needed so far and found, and had to encode.
        used_bytes, size_bytes: of the cache.
    """

    hits: int
    misses: int
    used_bytes: int
    size_bytes: int


class _Piece(NamedTuple):
    """Rows [first, first + num_rows) of a tile, for the step's tokens from `at` on, its image positions from `n` on."""

    first: int
    num_rows: int
    at: int
    n: int


class ImageEncoder:
    """Makes the inputs of steps with images.

    Args:
        tower: encodes tiles.
        embed: the language model's embedding.
        cache_bytes: for encoded tiles.

    Attributes:
        cache: encoded tiles.
        num_encoded: tiles encoded so far.
        num_found: tiles that a step found in the cache.
    """

    def __init__(self, tower: VisionTower, embed: nn.Module, cache_bytes: int) -> None:
        self.tower = tower
        self._embed = embed
        weight: Any = embed.weight
        self._device = weight.device
        width = tower.hidden_size * (1 + tower.num_levels)
        self.cache = FeatureCache(cache_bytes, tower.processing.page_rows, width, tower.dtype, self._device)
        self.num_encoded = self.num_found = 0

    @property
    def counts(self) -> ImageCounts:
        """So far."""
        return ImageCounts(self.num_found, self.num_encoded, self.cache.used_bytes, self.cache.num_bytes)

    @staticmethod
    def touched(plan: StepPlan) -> bool:
        """See `touches_images`."""
        return touches_images(plan)

    def inputs(self, plan: StepPlan, input_ids: Tensor) -> InputRows:
        """The step's input rows: embeddings of tokens, and features at the positions of images.

        Args:
            plan: the step.
            input_ids: int64 [T], the step's tokens; what they are at an image's positions does not matter.

        Returns:
            Rows that are the caller's own.
        """
        embeds: Tensor = self._embed(input_ids)
        pieces, pixels, weights, at = _pieces(plan)
        deep = embeds.new_empty(self.tower.num_levels, len(at), embeds.shape[1])
        rows = InputRows(embeds, torch.from_numpy(at).to(self._device), deep)
        missing = []
        for key, parts in pieces.items():
            found = self.cache.find(key)
            if found is None:
                missing.append(key)
            else:
                self.num_found += 1
                _put(rows, parts, found)
        for batch in _batches(missing, weights):
            encoded = self.encode([pixels[key] for key in batch])
            for key, features in zip(batch, encoded, strict=True):
                _put(rows, pieces[key], features)
                self.cache.keep(key, features)
        self.num_encoded += len(missing)
        return rows

    def run_largest(self, most_tokens: int) -> None:
        """Encode as much as is ever encoded at once, of prompts up to `most_tokens`: what that takes of memory."""
        self._run_blank(self.tower.processing.largest(most_tokens))

    def warm_up(self, most_tokens: int) -> None:
        """The same, then fewer and fewer of these tiles: kernels are compiled, attention is planned for each."""
        sizes = self.tower.processing.largest(most_tokens)
        for num_tiles in range(len(sizes), 0, -1):
            self._run_blank(sizes[:num_tiles])

    def encode(self, tiles: Sequence[np.ndarray]) -> list[Tensor]:
        """Rows of each tile, [tokens, (1 + levels) * hidden], whether in the cache or not; each uint8 [3, h, w]."""
        # One copy to the device, whatever their sizes.
        sizes = [tile.size for tile in tiles]
        pixels = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        for place, tile in zip(pixels.split(sizes), tiles, strict=True):
            place.numpy().reshape(tile.shape)[...] = tile
        sent = pixels.to(self._device, non_blocking=True).split(sizes)
        with torch.inference_mode():
            return self.tower([part.view(tile.shape) for part, tile in zip(sent, tiles, strict=True)])

    def _run_blank(self, sizes: Sequence[tuple[int, int]]) -> None:
        """Encode black tiles of these heights and widths."""
        self.encode([np.zeros((3, *size), dtype=np.uint8) for size in sizes])


def _pieces(plan: StepPlan) -> tuple[dict[Key, list[_Piece]], dict[Key, np.ndarray], dict[Key, int], np.ndarray]:
    """Of each tile that the step touches: which of its rows go where, its pixels and its weight.

    Beside them the step's image positions, int64 [n].
    """
    pieces: dict[Key, list[_Piece]] = {}
    pixels: dict[Key, np.ndarray] = {}
    weights: dict[Key, int] = {}
    places: list[np.ndarray] = []
    begin, n = sum(entry.num_new_tokens for entry in plan.scheduled[: plan.num_decodes]), 0
    for req, start, count in plan.scheduled[plan.num_decodes :]:
        for image in req.images:
            size = image.tile_tokens
            position, stop = max(start, image.start), min(start + count, image.stop)
            while position < stop:
                tile, first = divmod(position - image.start, size)
                num_rows = min(size - first, stop - position)
                key, at = (image.identity, tile), begin + position - start
                pieces.setdefault(key, []).append(_Piece(first, num_rows, at, n))
                pixels[key], weights[key] = image.pixels[tile], image.tile_weight
                places.append(np.arange(at, at + num_rows))
                position += num_rows
                n += num_rows
        begin += count
    return pieces, pixels, weights, np.concatenate(places)


def _batches(keys: list[Key], weights: dict[Key, int]) -> list[list[Key]]:
    """Tiles that the tower takes at once."""
    made: list[list[Key]] = []
    room = 0
    for key in keys:
        if weights[key] > room:
            made.append([])
            room = TILES_AT_ONCE
        made[-1].append(key)
        room -= weights[key]
    return made


def _put(rows: InputRows, pieces: list[_Piece], features: Tensor) -> None:
    hidden, levels = rows.embeds.shape[1], len(rows.deep)
    for first, num_rows, at, n in pieces:
        part = features[first : first + num_rows]
        rows.embeds[at : at + num_rows] = part[:, :hidden]
        if levels:
            rows.deep[:, n : n + num_rows] = part[:, hidden:].unflatten(1, (levels, hidden)).transpose(0, 1)
