"""Qwen's images over the API: the tokens of transformers' class, exact counts by headers, the encoder's counters."""

from __future__ import annotations

import pytest
from image_checkpoints import image_part, picture
from qwen_checkpoints import SIDE, qwen_tokens, shared_qwen, write_qwen
from server_harness import RunningServer
from test_media import _promised, _uri

KIND = "Qwen3-VL"
BODY = {"temperature": 0, "max_tokens": 6, "ignore_eos": True, "return_token_ids": True}
FIRST, SECOND = picture(100, 210), picture(300, 90, seed=1)


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    directory = write_qwen(tmp_path_factory.mktemp("qwen") / "tiny-vl", shared_qwen(KIND))
    server = RunningServer("--max-model-len", "256", "--num-gpu-blocks-override", "64", model=str(directory))
    yield server
    server.assert_alive()
    assert server.stop() == 0
    assert "ERROR" not in server.said, server.said


def ask(server: RunningServer, *parts, **body):
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": content}]} | BODY | body)


def test_images_over_http_get_the_native_class_s_tokens(running):
    for parts, images in (
        (["Look: ", image_part(FIRST), " and ", image_part(SECOND), "Compare."], [FIRST, SECOND]),
        ([image_part(SECOND), "What?"], [SECOND]),
        (["No picture."], []),
    ):
        answer = ask(running, *parts).json()
        tokens = qwen_tokens(shared_qwen(KIND), answer["prompt_token_ids"], images, 6)
        assert answer["choices"][0]["token_ids"] == tokens
    counts = running.metrics()
    assert counts["kvarena:image_cache_misses_total"] == 2
    assert counts["kvarena:image_cache_hits_total"] >= 1
    assert 0 < counts["kvarena:image_cache_used_bytes"] < counts["kvarena:image_cache_size_bytes"]
    assert "images of 32 x 32 pixels a token, up to 12" in running.log


def test_a_count_needs_no_pixels_and_a_shape_that_is_not_taken_is_a_400(running):
    """By its header, which is all that there is of this image."""

    def promised(width: int, height: int) -> dict:
        return {"type": "image_url", "image_url": {"url": _uri(_promised(width, height))}}

    def count(content: object) -> int:
        return running.post("/tokenize", {"messages": [{"role": "user", "content": content}]}).json()["count"]

    assert count([promised(2 * SIDE[KIND], 4 * SIDE[KIND])]) == count("") + 8 + 2  # and the tokens around it
    narrow = ask(running, promised(3, 1000))
    assert narrow.status_code == 400 and "messages[0]: the image of 3 x 1000 pixels is too narrow" in narrow.text
    assert ask(running, promised(64, 64)).status_code == 400  # there are none
    named = ask(running, image_part(FIRST), "<|image_pad|>")
    assert named.status_code == 400 and "leave it out" in named.text
