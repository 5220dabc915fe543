"""The README's walk-through, on a small checkpoint of InternVL2's original format in place of the download."""

from __future__ import annotations

import re
import shlex

import httpx
import pytest
from image_checkpoints import data_uri, picture, shared_model, write_original
from server_harness import KEY, PATIENCE, ROOT, RunningServer

README = (ROOT / "README.md").read_text(encoding="utf-8")
SECTION = re.search(r"## Deploy InternVL2-8B\n(.*?)\n## ", README, re.DOTALL)[1]
WORDS = shlex.split(re.search(r"nohup kvarena (.*?) > serve.log", SECTION)[1])


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    root = tmp_path_factory.mktemp("walkthrough")
    directory = write_original(root / "InternVL2-8B", shared_model(), "InternLM2ForCausalLM")
    picture(100, 210).save(root / "photo.jpg")
    return directory


@pytest.fixture(scope="module")
def server(directory):
    command, path, *flags = WORDS
    assert (command, path) == ("serve", "models/InternVL2-8B")
    i = flags.index("--api-key")
    key = flags[i + 1]
    del flags[i : i + 2]
    flags[flags.index("8192")] = "256"  # the small one's context
    server = RunningServer(*flags, model=str(directory), key=key)
    yield server
    server.assert_alive()
    assert server.stop() == 0


def test_the_lines_as_written(server, directory, monkeypatch, capsys):
    monkeypatch.chdir(directory.parent)
    url, header = re.search(r"curl -s (http\S+) -H '([^']*)'", SECTION).groups()
    name, _, value = header.partition(": ")
    models = httpx.get(url.replace("http://127.0.0.1:8000", server.url), headers={name: value}, timeout=PATIENCE)
    assert [model["id"] for model in models.json()["data"]] == ["internvl"]
    [block] = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)
    exec(compile(block.replace("http://127.0.0.1:8000", server.url), "README.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert int(lines[-1].rpartition(" ")[2]) > 4  # the picture's tokens among them


def test_what_the_table_says_of_images(server):
    part = {"type": "image_url", "image_url": {"url": data_uri(picture(60, 60))}}
    for number, status in ((5, 400), (4, 200)):
        body = {"model": "internvl", "messages": [{"role": "user", "content": [part] * number}], "max_tokens": 1}
        answer = server.client.post("/v1/chat/completions", json=body)
        assert answer.status_code == status, answer.text
        assert ("at most 4 are allowed" in answer.text) == (status == 400)
    words = [{"role": "user", "content": "word " * 400}]
    answer = server.client.post("/v1/chat/completions", json={"model": "internvl", "messages": words})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")


def test_another_key_is_refused(server):
    assert httpx.get(f"{server.url}/v1/models", headers={"Authorization": f"Bearer {KEY}"}).status_code == 401
