"""Where tokens are turned, in models that give an image's positions a row and a column (M-RoPE, arXiv 2409.12191).

    position     0    1  |  2    3    4    5    6    7  |  8    9         an image of 2 rows x 3 columns
    time         0    1  |  2    2    2    2    2    2  |  5    6
    row          0    1  |  2    2    2    3    3    3  |  5    6
    column       0    1  |  2    3    4    2    3    4  |  5    6

Behind an image positions go on from its longer side, so a text's three are one number, moved by `ImageSpan.rope_shift`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvarena.engine.contract import ScheduledRequest
from kvarena.engine.request import ImageSpan, Request


def rope_positions(scheduled: Sequence[ScheduledRequest]) -> np.ndarray:
    """int64 [3, T]: time, row and column of each new token of a step, in batch order."""
    starts = np.fromiter((entry.start for entry in scheduled), np.int64, len(scheduled))
    counts = np.fromiter((entry.num_new_tokens for entry in scheduled), np.int64, len(scheduled))
    ends = np.cumsum(counts)
    counted = np.arange(ends[-1]) + np.repeat(starts - (ends - counts), counts)
    made = np.repeat(counted[None], 3, axis=0)
    for (req, start, count), end in zip(scheduled, ends.tolist(), strict=True):
        for image in req.images:
            _place(made[:, end - count : end], image, start)
    return made


def rope_shift(req: Request) -> int:
    """What all positions behind a prompt's images are moved by."""
    return sum(image.rope_shift for image in req.images)


def _place(part: np.ndarray, image: ImageSpan, start: int) -> None:
    """Give an image its rows and columns, and move what is behind it; `part` begins at position `start`."""
    if image.grid is None:
        return
    part[:, max(0, image.stop - start) :] += image.rope_shift
    first, last = max(start, image.start), min(start + part.shape[1], image.stop)
    if first < last:
        index = np.arange(first, last) - image.start
        inside = part[:, first - start : last - start]
        inside -= index
        inside[1] += index // image.grid[1]
        inside[2] += index % image.grid[1]
