"""Images and other media in chat messages: recognised, and refused by a model that reads text only.

Nothing is fetched, opened or decoded: a URL in a message never makes this server open a connection or a file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine.server.errors import bad_request
from engine.server.protocol import Message

MEDIA_PARTS = ("image_url", "image", "input_image", "video_url", "audio_url", "input_audio", "file")


def check_parts(messages: Sequence[Message]) -> None:
    """Raise a 400 for a part that a text model cannot read; the message names its place and kind."""
    for index, message in enumerate(messages):
        parts: Any = message.content if isinstance(message.content, list) else ()
        for part in parts:
            if isinstance(part, dict) and part.get("type") in MEDIA_PARTS:
                raise bad_request(
                    f"messages[{index}] holds a part of type {part['type']!r}; this model reads text only", "messages"
                )
