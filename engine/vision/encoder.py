"""What a step's images need: tiles encoded once and kept, and their rows put where the prompt has placeholders.

    step      request A, positions 40..90                      request B: a decode
    prompt    text | image: tile 0 | tile 1 | tile 2 | text    a token
    rows      embeddings, and of each tile those that the step touches

    cache     digest, tile -> slot      | t0 | t1 | ... |   one tensor of a stated size, the least recently used goes

A tile is encoded when a step first touches it, whoever's it is; chunked prompts, preempted requests and other requests
with the same image find it in the cache. Where that is too small a tile is encoded again: right, and slower.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from kvarena.engine.contract import StepPlan
from kvarena.engine.vision.tower import VisionTower

# The tower's own batch: more tiles at once take memory and win no time.
TILES_AT_ONCE = 8

Key = tuple[int, int]


class _Piece(NamedTuple):
    """Rows [first, first + num_rows) of a tile, for the step's tokens from `at` on."""

    first: int
    num_rows: int
    at: int


class TileCache:
    """Rows of encoded tiles, in one tensor.

    Args:
        num_bytes: at most so many; may be too few for one tile, and nothing is kept.
        shape: of a tile's rows.
        dtype, device: of them.

    Attributes:
        num_bytes: of the tensor.
        num_tiles: that it holds.
    """

    def __init__(self, num_bytes: int, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        self.num_tiles = num_bytes // (shape[0] * shape[1] * dtype.itemsize)
        self._rows = torch.empty(self.num_tiles, *shape, dtype=dtype, device=device)
        self.num_bytes = self._rows.numel() * dtype.itemsize
        self._slots: OrderedDict[Key, int] = OrderedDict()

    def find(self, key: Key) -> Tensor | None:
        """The rows of a tile, now the most recently used; None: not there."""
        slot = self._slots.get(key)
        if slot is None:
            return None
        self._slots.move_to_end(key)
        return self._rows[slot]

    def keep(self, key: Key, rows: Tensor) -> None:
        """Take a tile in; the least recently used makes room."""
        if not self.num_tiles:
            return
        slot = self._slots.popitem(last=False)[1] if len(self._slots) == self.num_tiles else len(self._slots)
        self._slots[key] = slot
        self._rows[slot].copy_(rows)


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
        shape = (tower.tiling.tokens, tower.hidden_size)
        self.cache = TileCache(cache_bytes, shape, tower.dtype, self._device)
        self.num_encoded = self.num_found = 0

    def touched(self, plan: StepPlan) -> bool:
        """Whether a step computes a position of an image."""
        return any(
            image.start < start + count and start < image.stop
            for req, start, count in plan.scheduled[plan.num_decodes :]
            for image in req.images
        )

    def embeds(self, plan: StepPlan, input_ids: Tensor) -> Tensor:
        """The step's input rows: embeddings of tokens, and features at the positions of images.

        Args:
            plan: the step.
            input_ids: int64 [T], the step's tokens; what they are at an image's positions does not matter.

        Returns:
            [T, hidden], the caller's own.
        """
        rows = self._embed(input_ids).clone()
        pieces, pixels = _pieces(plan)
        missing = []
        for key, parts in pieces.items():
            found = self.cache.find(key)
            if found is None:
                missing.append(key)
            else:
                self.num_found += 1
                _put(rows, parts, found)
        for begin in range(0, len(missing), TILES_AT_ONCE):
            batch = missing[begin : begin + TILES_AT_ONCE]
            encoded = self.encode([pixels[key] for key in batch])
            for key, features in zip(batch, encoded, strict=True):
                _put(rows, pieces[key], features)
                self.cache.keep(key, features)
        self.num_encoded += len(missing)
        return rows

    def run_largest(self) -> None:
        """Encode as many tiles as are ever encoded at once: what that takes of the device's memory."""
        size = self.tower.tiling.size
        self.encode([np.zeros((3, size, size), dtype=np.uint8)] * TILES_AT_ONCE)

    def encode(self, tiles: list[np.ndarray]) -> Tensor:
        """Rows of tiles, [N, tokens, hidden], whether they are in the cache or not; each uint8 [3, size, size]."""
        batch = torch.from_numpy(np.stack(tiles))
        if self._device.type == "cuda":
            batch = batch.pin_memory()
        with torch.inference_mode():
            return self.tower(batch.to(self._device, non_blocking=True))


def _pieces(plan: StepPlan) -> tuple[dict[Key, list[_Piece]], dict[Key, np.ndarray]]:
    """Of each tile that the step touches: which of its rows go where, and its pixels."""
    pieces: dict[Key, list[_Piece]] = {}
    pixels: dict[Key, np.ndarray] = {}
    at = sum(entry.num_new_tokens for entry in plan.scheduled[: plan.num_decodes])
    for req, start, count in plan.scheduled[plan.num_decodes :]:
        for image in req.images:
            size = image.tile_tokens
            position, stop = max(start, image.start), min(start + count, image.stop)
            while position < stop:
                tile, first = divmod(position - image.start, size)
                num_rows = min(size - first, stop - position)
                key = (image.identity, tile)
                pieces.setdefault(key, []).append(_Piece(first, num_rows, at + position - start))
                pixels[key] = image.pixels[tile]
                position += num_rows
        at += count
    return pieces, pixels


def _put(rows: Tensor, pieces: list[_Piece], features: Tensor) -> None:
    for first, num_rows, at in pieces:
        rows[at : at + num_rows] = features[first : first + num_rows]
