"""The README's walk-through, on a small checkpoint of InternVL2's original format in place of the download."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import threading

import httpx
import pytest
import warm
from image_checkpoints import data_uri, picture, shared_model, write_original
from server_harness import KEY, PATIENCE, ROOT, STUB, RunningServer
from test_server_faults import Reader
from waiting import wait_for

import kvarena
from kvarena.engine.checkpoints.check import check_checkpoint
from kvarena.engine.errors import ModelError
from kvarena.engine.models import load_model

README = (ROOT / "README.md").read_text(encoding="utf-8")
SECTION = re.search(r"## Deploy InternVL2-8B\n(.*?)\n## ", README, re.DOTALL)[1]
# Rows of its table by a part of what one sees, with the test that provokes it and sees its remedy work.
ROWS = {
    "the pool leaves no room": "test_a_pool_that_is_too_small_names_the_length_that_serves",
    "out of memory": "test_a_step_without_memory_and_smaller_steps",
    "longer than the context": "test_an_image_that_does_not_fit_and_what_does",
    "so many images": "test_images_over_the_limit_and_a_higher_one",
    "503": "test_a_full_queue_and_a_longer_one",
    "streams stop": "test_streams_that_stop_for_prompts_and_beginnings_read_again",
    "first token comes late": "test_streams_that_stop_for_prompts_and_beginnings_read_again",
    "a file's name": "test_a_start_that_names_a_file_and_the_whole_file",
}
WORDS = shlex.split(re.search(r"nohup kvarena (.*?) > serve.log", SECTION)[1])


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    root = tmp_path_factory.mktemp("walkthrough")
    directory = write_original(root / "InternVL2-8B", shared_model(), "InternLM2ForCausalLM")
    picture(100, 210).save(root / "photo.jpg")
    return directory


@pytest.fixture(
    scope="module",
    params=[
        (),
        pytest.param(("--tensor-parallel-size", "2"), marks=pytest.mark.slow),
        pytest.param(("--pipeline-parallel-size", "2"), marks=pytest.mark.slow),
    ],
    ids=["as written", "two ranks a layer", "two stages"],
)
def server(directory, request):
    command, path, *flags = WORDS
    assert (command, path) == ("serve", "models/InternVL2-8B")
    i = flags.index("--api-key")
    key = flags[i + 1]
    del flags[i : i + 2]
    flags[flags.index("8192")] = "256"  # the small one's context
    server = RunningServer(*flags, *request.param, model=str(directory), key=key)
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


def test_every_row_of_the_table_has_its_test():
    rows = [line.split("|")[1].strip() for line in SECTION.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 6
    for row in rows:
        [test] = [test for part, test in ROWS.items() if part in row]
        assert callable(globals()[test])


@pytest.fixture(scope="module")
def larger(directory):
    """The same server with what the table says to raise."""
    server = RunningServer(
        "--max-model-len", "512", "--limit-mm-per-prompt", '{"image": 5}', "--served-model-name", "internvl",
        model=str(directory),
    )  # fmt: skip
    yield server
    assert server.stop() == 0


def ask(server, num_images, side, words=""):
    part = {"type": "image_url", "image_url": {"url": data_uri(picture(side, side))}}
    content = [*[part] * num_images, {"type": "text", "text": words}]
    body = {"model": "internvl", "messages": [{"role": "user", "content": content}], "max_tokens": 1}
    answer = server.client.post("/v1/chat/completions", json=body)
    return answer.status_code, answer.json().get("error", {})


def test_a_pool_that_is_too_small_names_the_length_that_serves(directory):
    command = ["-m", "kvarena", "serve", str(directory), "--num-gpu-blocks-override", "10"]
    done = warm.run([*command, "--max-model-len", "256"], ROOT)
    assert done.returncode == 2
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    length = re.search(r"set --max-model-len (\d+)", line)[1]
    server = RunningServer(*command[4:], "--max-model-len", length, model=str(directory))
    try:
        assert server.complete("A").status_code == 200
    finally:
        assert server.stop() == 0


def test_a_step_without_memory_and_smaller_steps():
    """Of a card with room for steps of 100 tokens."""
    codes = []
    for flags in ((), ("--max-num-batched-tokens", "64", "--max-num-seqs", "64")):
        server = RunningServer("--full-tokens", "100", *flags, module=STUB)
        try:
            codes.append(server.complete([20] * 300).status_code)
            assert ("out of memory" in server.log) == (codes[-1] == 500)
            assert server.complete([20]).status_code == 200  # others go on
        finally:
            assert server.stop() == 0
    assert codes == [500, 200]


def test_an_image_that_does_not_fit_and_what_does(server, larger):
    words = "w" * 170
    code, error = ask(server, 3, 224, words)
    assert (code, error["code"]) == (400, "context_length_exceeded")
    assert ask(server, 1, 224, words)[0] == 200  # fewer
    assert ask(server, 3, 50, words)[0] == 200  # smaller
    assert ask(larger, 3, 224, words)[0] == 200  # a longer context


def test_images_over_the_limit_and_a_higher_one(server, larger):
    code, error = ask(server, 5, 60)
    assert code == 400 and "at most 4 are allowed" in error["message"]
    assert ask(server, 4, 60)[0] == 200
    assert ask(larger, 5, 60)[0] == 200


@pytest.mark.parametrize(("length", "codes"), ((1, [503, 200]), (2, [200, 200])))
def test_a_full_queue_and_a_longer_one(length, codes):
    """One request runs and one waits: a third is one too many, until the first has ended or the queue is longer."""
    server = RunningServer("--max-num-seqs", "1", "--set", f"max_num_queued_requests={length}", module=STUB)
    answers: list[httpx.Response] = []
    num_waiting = lambda: server.metrics()["vllm:num_requests_waiting"]  # noqa: E731
    threads = [threading.Thread(target=lambda: answers.append(server.complete([21]))) for _ in codes]
    try:
        with server.held():
            running = Reader(server, max_tokens=90)
            threads[0].start()
            wait_for(lambda: num_waiting() == 1, "it does not wait")
            threads[1].start()
            wait_for(lambda: answers or num_waiting() == 2, "it is not refused, and does not wait")
        for thread in (running, *threads):
            thread.join(PATIENCE)
        assert [answer.status_code for answer in answers] == codes
        if length == 1:
            assert answers[0].json()["error"]["code"] == "queue_full"
            assert float(answers[0].headers["retry-after"]) > 0
            assert server.complete([22]).status_code == 200  # once the others have ended
    finally:
        server.stop()


def test_streams_that_stop_for_prompts_and_beginnings_read_again(tmp_path):
    """On a simulated card: the longest pause of a stream, and how long the first token takes."""

    def run(allocator, scheduler, workload, **settings):
        budget = {"continuous": 4096, "chunked": 256}[scheduler]
        settings |= {"workload.num_requests": 8, "arrival.rate": 60, "scheduler.max_num_batched_tokens": budget}
        return kvarena.run(
            allocator, scheduler, folder=tmp_path / f"{workload}-{allocator}-{scheduler}", runner="simulated",
            model="qwen3-0.6b-shape", workload=workload, arrival="poisson", report={"pages": False},
            engine={"dtype": "bfloat16", "max_model_len": 4096}, **settings,
        ).summary  # fmt: skip

    prompts = {"workload.prompt_len": 2000, "workload.output_len": 60}
    pauses = [run("paged", scheduler, "fixed", **prompts).itl_seconds.max for scheduler in ("continuous", "chunked")]
    assert pauses[1] < pauses[0] / 2
    beginnings = {"workload.num_prefixes": 1, "workload.prefix_len": 2000}
    first = [run(one, "chunked", "shared_prefix", **beginnings).ttft_seconds.p50 for one in ("paged", "paged_prefix")]
    assert first[1] < first[0] / 2


def test_a_start_that_names_a_file_and_the_whole_file(directory, tmp_path):
    copy = tmp_path / "InternVL2-8B"
    shutil.copytree(directory, copy)
    file = copy / "model-00002-of-00002.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    done = warm.run(["-m", "kvarena", "serve", str(copy)], ROOT)
    assert done.returncode == 2
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert f"{file} is truncated or broken" in line and "copy it again" in line
    file.write_bytes(whole)
    check_checkpoint(copy, tokenizer=True)
    # What runs by the flag alone is named, where nothing stands in for it.
    code = {"model_type": "own", "auto_map": {"AutoConfig": "configuration_own.C"}}
    (copy / "config.json").write_text(json.dumps(code))
    with pytest.raises(ModelError, match=r"\(configuration_own.py\), which nothing here stands in for"):
        load_model(copy)


def test_another_key_is_refused(server):
    assert httpx.get(f"{server.url}/v1/models", headers={"Authorization": f"Bearer {KEY}"}).status_code == 401
