"""Where images stand in a prompt's tokens.

template    ... <IMG_CONTEXT> \n What is this?          one token for an image, whatever its size
prompt      ... <img> <IMG_CONTEXT> x n </img> \n What  n = tiles x tokens of a tile
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from kvarena.engine.checkpoints.internvl import Tiling
from kvarena.engine.server.shared.errors import bad_request


class ChatPrompt(NamedTuple):
    """A chat's token ids, and where its images stand: first position and end of each, in order."""

    token_ids: list[int]
    places: list[tuple[int, int]]


class ImageTokens(NamedTuple):
    """What a model's prompts have around an image.

    Attributes:
        name: of the placeholder.
        image, start, end: ids of the placeholder and of the tokens before and behind.
        tiling: how images are cut.
    """

    name: str
    image: int
    start: int
    end: int
    tiling: Tiling

    def expand(self, ids: Sequence[int], num_tiles: Sequence[int]) -> ChatPrompt:
        """Give each image its positions.

        Args:
            ids: of the chat template's text, with one placeholder for each image.
            num_tiles: of each image.

        Raises:
            ApiError: a 400: the text itself holds placeholders, or the template has left images out.
        """
        found = [at for at, token in enumerate(ids) if token == self.image]
        if len(found) != len(num_tiles):
            more = (
                f"their text holds {self.name!r}, which stands for an image; leave it out"
                if len(found) > len(num_tiles)
                else "the model's chat template has no place for images there"
            )
            raise bad_request(
                f"the messages hold {len(num_tiles)} images and the prompt {len(found)} places for them: {more}",
                "messages",
            )
        made: list[int] = []
        places = []
        done = 0
        for at, count in zip(found, num_tiles, strict=True):
            made += [*ids[done:at], self.start]
            places.append((len(made), len(made) + count * self.tiling.tokens))
            made += [self.image] * (count * self.tiling.tokens)
            made.append(self.end)
            done = at + 1
        return ChatPrompt(made + list(ids[done:]), places)
