"""Images of a request: what stands at their positions, and how a step's tiles are bounded."""

from __future__ import annotations

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvarena.engine.request import ImageSpan, Request, SamplingParams, expand
from kvarena.engine.server.shared.ipc import pack_image, unpack_image

FIRST, SECOND = 1 << 256, (1 << 256) + 1


def with_images(*images: ImageSpan, length: int = 40) -> Request:
    return Request("r", [9] * length, SamplingParams(max_tokens=4, n=2), images=images)


def test_a_position_is_a_token_or_an_image():
    req = with_images(ImageSpan(2, 6, FIRST, 2), ImageSpan(6, 8, SECOND, 1), length=10)
    assert req.prompt_identities == [9, 9, FIRST, FIRST, FIRST, FIRST, SECOND, SECOND, 9, 9]
    req.output_token_ids = [5, 6]
    assert req.identities(5, 11) == [FIRST, SECOND, SECOND, 9, 9, 5]
    assert req.token_ids(5, 11) == [9, 9, 9, 9, 9, 5]
    assert req.identities(10, 12) == [5, 6]
    plain = with_images()
    assert plain.prompt_identities is plain.prompt_token_ids


def test_every_sample_has_the_images():
    req = with_images(ImageSpan(2, 6, FIRST, 2))
    assert [one.images for one in expand(req)] == [req.images] * 2


@pytest.mark.parametrize(
    ("start", "stop", "most", "wanted"),
    [
        (0, 40, 9, (40, 5)),  # all of both
        (0, 40, 3, (18, 3)),  # the first image and the text up to the second, for which no tile is left
        (0, 40, 2, (12, 2)),  # ends between two tiles
        (5, 40, 1, (8, 1)),  # begins inside a tile
        (6, 7, 1, (7, 1)),
        (16, 40, 1, (22, 1)),
        (0, 4, 1, (4, 0)),  # text before
        (24, 40, 1, (40, 1)),
        (26, 40, 1, (40, 0)),  # text behind
    ],
)
def test_a_chunk_ends_where_its_tiles_are_used_up(start, stop, most, wanted):
    """Tiles of 4 tokens at 4..16, of 4 tokens at 18..26 of which the first begins at 18."""
    req = with_images(ImageSpan(4, 16, FIRST, 3), ImageSpan(18, 26, SECOND, 2))
    assert req.within_tiles(start, stop, most) == wanted


@given(st.integers(0, 39), st.integers(1, 40), st.integers(1, 6))
def test_chunks_go_on_and_keep_the_bound(start, stop, most):
    req = with_images(ImageSpan(4, 16, FIRST, 3), ImageSpan(18, 26, SECOND, 2))
    if start >= stop:
        return
    end, num_tiles = req.within_tiles(start, stop, most)
    assert start < end <= stop and num_tiles <= most
    tiles = {(image.start, (at - image.start) // 4) for image in req.images for at in range(start, end)
             if image.start <= at < image.stop}  # fmt: skip
    assert len(tiles) <= num_tiles
    assert end == stop or req.within_tiles(start, end + 1, 99)[1] > most


@pytest.mark.parametrize(
    ("start", "most", "is_first", "wanted"),
    [
        (0, 5, True, (40, 5)),  # both
        (0, 4, True, (20, 3)),  # the second weighs 2, and 1 is left
        (0, 2, True, (20, 3)),  # the first weighs more than a step may take, and is taken alone, with the text behind
        (0, 2, False, (4, 0)),  # not where another request has taken some
        (5, 2, False, (5, 0)),
        (20, 1, True, (40, 2)),
        (20, 0, False, (20, 0)),
    ],
)
def test_a_tile_that_weighs_more_is_taken_alone(start, most, is_first, wanted):
    req = with_images(ImageSpan(4, 16, FIRST, 1, tile_weight=3), ImageSpan(20, 30, SECOND, 1, tile_weight=2))
    assert req.within_tiles(start, 40, most, is_first=is_first) == wanted


def test_an_image_travels_as_it_is():
    pixels = np.arange(2 * 3 * 4 * 5, dtype=np.uint8).reshape(2, 3, 4, 5)
    for image in (
        ImageSpan(2, 6, FIRST, 2, pixels),
        ImageSpan(2, 8, SECOND, 1, pixels[:1], tile_weight=3, grid=(2, 3)),
    ):
        found = unpack_image(msgpack.unpackb(msgpack.packb(pack_image(image))))
        assert found == image and np.array_equal(found.pixels, image.pixels)
