"""Where images stand in a prompt's tokens.

template    ... <IMG_CONTEXT> \n What is this?          one token for an image, whatever its size
prompt      ... <img> <IMG_CONTEXT> x n </img> \n What  n by its size; not every family has the tokens around
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from kvarena.engine.server.shared.errors import bad_request


class ChatPrompt(NamedTuple):
    """A chat's token ids, and where its images stand: first position and end of each, in order."""

    token_ids: list[int]
    places: list[tuple[int, int]]


class ImageTokens(NamedTuple):
    """What a model's prompts have around an image.

    Attributes:
        name: of the placeholder.
        image: id of the placeholder.
        before, behind: ids around an image that the chat template leaves out.
    """

    name: str
    image: int
    before: tuple[int, ...] = ()
    behind: tuple[int, ...] = ()

    def expand(self, ids: Sequence[int], num_tokens: Sequence[int]) -> ChatPrompt:
        """Give each image its positions.

        Args:
            ids: of the chat template's text, with one placeholder for each image.
            num_tokens: positions of each image.

        Raises:
            ApiError: a 400: the text itself holds placeholders, or the template has left images out.
        """
        found = [at for at, token in enumerate(ids) if token == self.image]
        if len(found) != len(num_tokens):
            more = (
                f"their text holds {self.name!r}, which stands for an image; leave it out"
                if len(found) > len(num_tokens)
                else "the model's chat template has no place for images there"
            )
            raise bad_request(
                f"the messages hold {len(num_tokens)} images and the prompt {len(found)} places for them: {more}",
                "messages",
            )
        made: list[int] = []
        places = []
        done = 0
        for at, count in zip(found, num_tokens, strict=True):
            made += [*ids[done:at], *self.before]
            places.append((len(made), len(made) + count))
            made += [self.image] * count
            made += self.behind
            done = at + 1
        return ChatPrompt(made + list(ids[done:]), places)
