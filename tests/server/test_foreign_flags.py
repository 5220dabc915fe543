"""Command lines of `vllm serve`: taken, or refused in one line; parser, help and docs are one table."""

import json
import re

import pytest

from kvarena.engine.errors import ConfigError
from kvarena.experiments.models import flag_page
from kvarena.experiments.serving import flags, serve
from kvarena.experiments.serving.flag_table import FLAGS
from kvarena.experiments.serving.flags import overrides_of, parse_flags
from kvarena.experiments.serving.foreign_flags import FOREIGN, NO_EFFECT, REFUSED
from kvarena.experiments.settings.compose import load_config

PUBLISHED = [
    "m --enable-auto-tool-choice --tool-call-parser hermes --enable-chunked-prefill --disable-log-stats",
    "m --dtype half --kv-cache-dtype auto --enforce-eager --gpu-memory-utilization 0.9 --max-model-len 32k --seed 0",
    "m -tp 2 --distributed-executor-backend mp --enable-expert-parallel --disable-custom-all-reduce",
    "m --data-parallel-size 2 --api-server-count 2 --disable-log-requests --uvicorn-log-level warning",
    "--model m --tokenizer m --revision main --download-dir /tmp --trust-remote-code --load-format safetensors",
    "m --limit-mm-per-prompt image=4,video=0 --mm-encoder-tp-mode data --allowed-local-media-path tests",
    """m --limit-mm-per-prompt {"image":{"count":4,"width":512,"height":512},"video":0} --max_model_len auto""",
    "m --quantization awq_marlin --max-num-seqs 16 --no-enable-prefix-caching --swap-space 4 --cpu-offload-gb 0",
    "m --quantization compressed-tensors --compilation-config {} -O3 --attention-backend FLASH_ATTN",
    "m --reasoning-parser deepseek_r1 --scheduling-policy priority --root-path /v --task generate --runner generate",
    "m --enable-chunked-prefill=False --enable-prefix-caching true --guided-decoding-backend xgrammar --no-enable-lora",
    "m --structured-outputs-config.backend xgrammar --reasoning-parser qwen3 "
    """--reasoning-config {"reasoning_start_str":"<think>","reasoning_end_str":"</think>"}""",
    "m --compilation-config.mode 3 --kv-cache-memory-bytes 24G --cuda-graph-sizes 1 2 4 --hf-overrides {}",
]


@pytest.mark.parametrize("line", PUBLISHED)
def test_a_published_command_line_is_taken(line):
    made = overrides_of(parse_flags(line.split()))
    assert load_config(made).model.path == "m"


@pytest.mark.parametrize("foreign", FOREIGN, ids=lambda foreign: foreign.names[0][0])
def test_a_flag_of_another_server_does_nothing_or_is_refused(foreign):
    usual = overrides_of(parse_flags(["m"]))
    value = {"switch": [], "value": [foreign.only[0] if foreign.only else "1"], "values": ["1", "2"]}[foreign.takes]
    for name in (name for names in foreign.names for name in names):
        given = ["m", name, *value]
        if foreign.refused:
            with pytest.raises(ConfigError, match=f"{re.escape(name)} is refused: {re.escape(foreign.because)}"):
                parse_flags(given)
            continue
        assert overrides_of(parse_flags(given)) == usual, name
        if foreign.only:
            with pytest.raises(ConfigError, match="is refused"):
                parse_flags(["m", name, "else"])


def test_no_flag_is_in_two_tables():
    ours = [name for flag in FLAGS for name in flag.names]
    names = ours + [name for foreign in FOREIGN for names in foreign.names for name in names]
    assert len(set(names)) == len(names)
    assert not any(foreign.refused for foreign in NO_EFFECT) and all(foreign.refused for foreign in REFUSED)


def test_the_page_and_the_help_are_the_table(monkeypatch, tmp_path, capsys):
    text = flag_page.PAGE.read_text(encoding="utf-8")
    assert flag_page.main(["--check"]) == 0, "run: kvarena make flag_page"
    shown = flags._parser().format_help()
    for name in [flag.names[0] for flag in FLAGS] + [names[0] for foreign in FOREIGN for names in foreign.names]:
        assert f"`{name}`" in text and name in shown, name
    old = tmp_path / "flags.md"
    old.write_text(text.replace("`--seed`", "`--seeds`"), encoding="utf-8")
    monkeypatch.setattr(flag_page, "PAGE", old)
    assert flag_page.main(["--check"]) == 1 and flag_page.main([]) == 0
    assert old.read_text(encoding="utf-8") == text
    old.write_text("# Flags", encoding="utf-8")
    with pytest.raises(ConfigError, match="has no lines"):
        flag_page.main([])


def test_flags_of_a_file_count_less_than_the_command_line(tmp_path):
    file = tmp_path / "serve.yaml"
    file.write_text(
        "model: there\nmax_model_len: 8k\nport: 81\ntrust-remote-code: true\nenable-prefix-caching: false\n"
        "served-model-name: [a, b]\nlimit-mm-per-prompt: {image: 2}\nenable-log-requests: false\nuds: null\n"
        "allowed-origins: ['http://a']\nset: [server.max_n=3]\nseed:\n"
    )
    given = parse_flags(["--config", str(file), "--port", "82"])
    made = overrides_of(given)
    words = (
        "--model there --max-model-len 8000 --port 82 --trust-remote-code --no-enable-prefix-caching "
        "--served-model-name a b --limit-mm-per-prompt image=2 --set server.max_n=3"
    )
    same = overrides_of(parse_flags([*words.split(), "--allowed-origins", json.dumps(["http://a"])]))
    assert made == same
    assert parse_flags(["here", "--config", str(file)]).model_flag is None


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("a: [", "is no YAML"), ("- a", "must hold flags"), ("config: b", "names another file"),
        ("no-such: 1", "unrecognized arguments: --no-such=1"), ("port: many", "invalid int value"),
        ("enable-lora: true", "--enable-lora is refused"), ("no-such: false", "arguments: --no-such=false"),
    ],
)  # fmt: skip
def test_a_file_of_flags_that_cannot_be_read_is_one_line(tmp_path, content, line):
    file = tmp_path / "serve.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=line) as caught:
        parse_flags(["--config", str(file)])
    assert "\n" not in str(caught.value) and str(file) in str(caught.value)
    with pytest.raises(ConfigError, match="cannot be read"):
        parse_flags(["--config", str(tmp_path / "none.yaml")])


def test_a_model_s_revision_and_folder_are_its_hub_s(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(flags, "fetch_model", lambda *args, **more: asked.append((args, more)) or tmp_path)
    made = overrides_of(parse_flags(["who/what", "--revision", "v2", "--download-dir", "/models"]))
    assert asked == [(("who/what",), {"weights": True, "revision": "v2", "cache_dir": "/models"})]
    assert f"model.path='{tmp_path}'" in made and "model.name='who/what'" in made
    assert (
        "model.path='models/demo'" in overrides_of(parse_flags(["models/demo", "--revision", "v2"])) and len(asked) == 1
    )


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ("m --tokenizer n", "--tokenizer n is refused"), ("--tokenizer n", "--tokenizer n is refused"),
        ("m --model n", "both name the model"), ("m --scheduler sjf --scheduling-policy priority", "contradicts"),
        ("m --scheduler static --enable-chunked-prefill", "--enable-chunked-prefill contradicts --scheduler static"),
        ("m --scheduler fair --no-enable-chunked-prefill", "--no-enable-chunked-prefill contradicts"),
        ("m --no-enable-chunked-prefill --scheduling-policy priority", "contradicts --scheduling-policy"),
        ("m --max-model-len long", "is not auto, or a number"), ("m --limit-mm-per-prompt video=1", "allows video"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_one_line(given, line):
    with pytest.raises(ConfigError, match=line):
        overrides_of(parse_flags(given.split()))


@pytest.mark.parametrize(
    ("path", "name", "names"),
    [
        ("models/demo", None, ("demo", "models/demo")), ("models/demo", "mine", ("mine", "demo", "models/demo")),
        ("who/what", None, ("who/what", "what")),
    ],
)  # fmt: skip
def test_a_model_answers_to_its_path_and_to_its_folder(path, name, names, tmp_path):
    config = load_config([f"model.path={path}", *([] if name is None else [f"model.name={name}"])])
    assert serve._names(config, tmp_path / "demo") == names
