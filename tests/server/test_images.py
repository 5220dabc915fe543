"""Images over the API: base64 and files, beside text clients, with exact counts before any pixel is decoded."""

from __future__ import annotations

import asyncio
import contextlib
import io
import threading
from dataclasses import replace

import httpx
import numpy as np
import openai
import pytest
from image_checkpoints import (
    MAX_TILES,
    TILE_TOKENS,
    data_uri,
    expected_tokens,
    image_part,
    picture,
    png,
    shared_model,
    write_native,
)
from PIL import Image
from server_harness import KEY, PATIENCE, RunningServer
from test_media import _address, _image, _promised, _uri, site  # noqa: F401 - a fixture

from kvarena import LLM, SamplingParams
from kvarena.engine.errors import KvarenaError
from kvarena.engine.models import load_tokenizer
from kvarena.engine.server.api.protocol import Message
from kvarena.engine.server.media.fetch import ImageLoader
from kvarena.engine.server.media.parts import MediaPolicy
from kvarena.engine.server.media.reader import ImageReader, image_inputs
from kvarena.engine.server.shared.errors import ApiError

CHAT = "/v1/chat/completions"
GREEDY = {"temperature": 0, "max_tokens": 6}
IGNORE = {"ignore_eos": True, "return_token_ids": True}
FIRST, SECOND = picture(100, 210), picture(300, 90, seed=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "first.png").write_bytes(png(FIRST))
    return folder


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_native(tmp_path_factory.mktemp("internvl") / "tiny-vl", shared_model())


@pytest.fixture(scope="module")
def running(directory, folder):
    server = RunningServer(
        "--max-model-len", "256", "--num-gpu-blocks-override", "64", "--limit-mm-per-prompt", '{"image": 3}',
        "--allowed-local-media-path", str(folder), model=str(directory),
    )  # fmt: skip
    yield server
    server.assert_alive()
    assert server.stop() == 0
    assert "ERROR" not in server.said, server.said


def ask(server: RunningServer, *parts, **body):
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return server.post(CHAT, {"messages": [{"role": "user", "content": content}]} | GREEDY | IGNORE | body)


def wanted(answer: dict, *images) -> list[int]:
    return expected_tokens(shared_model(), answer["prompt_token_ids"], list(images), 6)


def test_an_openai_client_sends_a_base64_image(running):
    client = openai.OpenAI(base_url=f"{running.url}/v1", api_key=KEY, timeout=PATIENCE)
    messages = [{"role": "user", "content": [{"type": "text", "text": "What is"}, image_part(FIRST)]}]
    answer = client.chat.completions.create(model="tiny-vl", messages=messages, **GREEDY, extra_body=IGNORE)
    assert answer.choices[0].model_extra["token_ids"] == wanted(answer.model_extra, FIRST)
    assert answer.usage.prompt_tokens == len(answer.model_extra["prompt_token_ids"])
    stream = client.chat.completions.create(
        model="tiny-vl", messages=messages, **GREEDY, extra_body={"ignore_eos": True}, stream=True
    )
    assert "".join(event.choices[0].delta.content or "" for event in stream) == answer.choices[0].message.content


def test_files_and_several_images(running, folder):
    part = {"type": "image_url", "image_url": {"url": f"file://{folder}/first.png"}}
    answer = ask(running, "Image-1: ", part, "Image-2: ", image_part(SECOND), "Compare.").json()
    assert answer["choices"][0]["token_ids"] == wanted(answer, FIRST, SECOND)


def test_text_and_image_clients_at_once(running):
    answers: dict[int, tuple] = {}

    def client(i: int) -> None:
        image = (FIRST, SECOND, None)[i % 3]
        parts = [] if image is None else [image_part(image)]
        answers[i] = ask(running, *parts, f"Question {i}", n=1 + (i == 3)).json(), image

    threads = [threading.Thread(target=client, args=(i,)) for i in range(9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for answer, image in answers.values():
        tokens = wanted(answer, *([] if image is None else [image]))
        assert all(choice["token_ids"] == tokens for choice in answer["choices"])


def test_llm_chat_gives_the_server_s_tokens(running, directory):
    llm = LLM(directory, max_model_len=256, num_gpu_blocks_override=64, limit_mm_per_prompt={"image": 1})
    [output] = llm.chat(
        [{"role": "user", "content": [image_part(FIRST), {"type": "text", "text": "Why?"}]}],
        SamplingParams(temperature=0, max_tokens=6, ignore_eos=True),
    )
    answer = ask(running, image_part(FIRST), "Why?").json()
    assert output.outputs[0].token_ids == answer["choices"][0]["token_ids"]
    assert output.prompt_token_ids == answer["prompt_token_ids"]


def test_the_same_image_is_a_prefix_hit_and_another_is_not(running):
    one, other = picture(120, 120, seed=5), picture(120, 120, seed=6)

    def cached(image: Image.Image) -> int:
        before = running.metrics()["vllm:prefix_cache_hits_total"]
        assert ask(running, image_part(image), "the same words").status_code == 200
        return int(running.metrics()["vllm:prefix_cache_hits_total"] - before)

    assert cached(one) < 32
    assert cached(other) < 32
    assert cached(one) >= 48


def test_a_count_needs_no_pixels(running):
    """By its header, which is all that there is of this image."""
    promised = {"type": "image_url", "image_url": {"url": _uri(_promised(100, 210))}}
    body = {"messages": [{"role": "user", "content": [promised]}]}
    counted = running.post("/tokenize", body).json()["count"]
    assert counted == running.post("/tokenize", {"messages": [{"role": "user", "content": "\n"}]}).json()["count"] + (
        3 * TILE_TOKENS + 2
    )
    # A prompt that does not fit is refused before its pixels are looked at.
    long = ask(running, promised, "x" * (250 - 3 * TILE_TOKENS))
    assert long.status_code == 400 and "maximum context length is 256" in long.json()["error"]["message"]
    cut = ask(running, promised)
    assert cut.status_code == 400 and "broken or cut off" in cut.json()["error"]["message"]


def _jpeg(turn: int) -> str:
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = turn
    FIRST.transpose({6: Image.Transpose.ROTATE_90, 1: Image.Transpose.ROTATE_180}[turn]).save(file, "JPEG", exif=exif)
    return _uri(file.getvalue(), "image/jpeg")


def test_an_image_that_lies_is_stood_up_as_its_notes_say(running):
    counts = []
    for turn in (6, 1):
        answer = ask(running, {"type": "image_url", "image_url": {"url": _jpeg(turn)}})
        assert answer.status_code == 200, answer.text
        counts.append(answer.json()["usage"]["prompt_tokens"])
    assert counts[0] == counts[1]


def test_a_phone_s_photo_with_a_second_picture_behind_it_is_a_jpeg(running):
    file = io.BytesIO()
    FIRST.save(file, "MPO", save_all=True, append_images=[SECOND])
    answer = ask(running, {"type": "image_url", "image_url": {"url": _uri(file.getvalue(), "image/jpeg")}})
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("parts", "body", "words"),
    [
        ([image_part(FIRST)] * 4, {}, "hold 4 images; at most 3 are allowed"),
        ([image_part(FIRST), "<IMG_CONTEXT>"], {}, "leave it out"),
        ([image_part(FIRST)], {"truncate_prompt_tokens": 9}, "does not go with images"),
        ([{"type": "image_url", "image_url": {"url": _uri(_promised(9000, 9000))}}], {}, "9000 x 9000 pixels"),
        ([{"type": "image_url", "image_url": {"url": _uri(png(FIRST)[:-60])}}], {}, "broken or cut off"),
        ([{"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}], {}, "not allowed here"),
        ([{"type": "image_url", "image_url": {"url": "file:///etc/hostname"}}], {}, "file urls are not allowed"),
        ([{"type": "video_url", "video_url": {"url": "data:,"}}], {}, "images are the only media"),
        (
            [image_part(picture(224, 224))] * 3,
            {"max_tokens": 256 - 3 * (MAX_TILES + 1) * TILE_TOKENS},
            "maximum context",
        ),
    ],
)
def test_what_is_refused_is_a_400_that_says_so(running, parts, body, words):
    answer = ask(running, *parts, **body)
    assert answer.status_code == 400, answer.text
    assert words in answer.json()["error"]["message"]


def test_a_text_that_names_the_placeholder_is_text(running):
    """Without an image the token is one like any other, and no features stand in its place."""
    answer = ask(running, "what is <IMG_CONTEXT>?").json()
    assert answer["choices"][0]["token_ids"] == wanted(answer)


@pytest.mark.parametrize("role", ["system", "assistant", "tool"])
def test_images_of_every_role_stand_where_the_template_puts_them(running, role):
    part = image_part(FIRST)
    messages = [{"role": role, "content": [part, {"type": "text", "text": "x"}]}, {"role": "user", "content": "y"}]
    if role == "tool":
        messages[0]["tool_call_id"] = "1"
    answer = running.post(CHAT, {"messages": messages} | GREEDY | IGNORE)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["token_ids"] == wanted(answer.json(), FIRST)


def test_a_client_that_leaves_while_its_images_are_read_leaves_nothing(running):
    body = {"messages": [{"role": "user", "content": [image_part(picture(700, 600, seed=9))] * 3}]} | IGNORE
    for seconds in (0.001, 0.02, 0.2):
        with contextlib.suppress(httpx.TimeoutException):
            httpx.post(running.url + CHAT, json=body | {"max_tokens": 2}, headers=running.headers, timeout=seconds)
    running.wait_idle()
    assert ask(running, image_part(FIRST), "still there").status_code == 200


def test_no_images_at_all(directory):
    llm = LLM(directory, max_model_len=128, num_gpu_blocks_override=16, limit_mm_per_prompt={"image": 0})
    with pytest.raises(KvarenaError, match="hold 1 images; at most 0 are allowed"):
        llm.chat([{"role": "user", "content": [image_part(FIRST)]}], SamplingParams(max_tokens=1))
    assert llm.chat([{"role": "user", "content": "text"}], SamplingParams(max_tokens=1))[0].outputs[0].token_ids


def read(directory, url: str, policy: MediaPolicy):
    """What the engine would get of an image, in a chat of nothing else; any address may be connected to."""
    inputs = image_inputs(str(directory), load_tokenizer(directory))
    reader = ImageReader(policy, inputs, ImageLoader(policy, lambda address: True))
    message = Message(role="user", content=[{"type": "image_url", "image_url": {"url": url}}])

    async def spans():
        opened = await reader.open([message])
        [count] = reader.num_tokens(opened)
        return await reader.spans(opened, [(0, count)])

    try:
        return asyncio.run(spans())
    finally:
        reader.close()


def test_a_url_a_file_and_base64_are_the_same_image(directory, folder, request):
    address, policy = _address(request.getfixturevalue("site"))
    policy = replace(policy, local_path=folder)
    urls = [f"{address}/x.png", _uri(_image()), f"file://{folder}/small.png"]
    (folder / "small.png").write_bytes(_image())
    spans = [read(directory, url, policy) for url in urls]
    assert spans[0] == spans[1] == spans[2]
    assert np.array_equal(spans[0][0].pixels, spans[2][0].pixels)


def test_tiles_of_a_request_are_bounded(directory, monkeypatch):
    monkeypatch.setattr("kvarena.engine.server.media.reader.MAX_TILE_BYTES", 20_000)
    assert read(directory, data_uri(picture(50, 50)), MediaPolicy())[0].num_tiles == 1
    with pytest.raises(ApiError, match="MiB of tiles"):
        read(directory, data_uri(FIRST), MediaPolicy())
