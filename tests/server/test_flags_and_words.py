"""`kvarena serve` speaks of its flags, and every flag has an effect."""

import re

import pytest

from engine.errors import ConfigError
from experiments.compose import load_config
from experiments.serving import flags as serving_flags
from experiments.serving.flags import overrides_of, parse_flags
from experiments.serving.words import FLAGS, in_flags

# A value for each flag that takes one.
VALUES = {
    "--api-key": "k", "--served-model-name": "n", "--api-server-count": "2", "--max-num-queued-requests": "3",
    "--shutdown-timeout": "4", "--allowed-origins": '["http://a"]', "--allowed-media-domains": "h",
    "--allowed-local-media-path": "tests", "--chat-template": "README.md", "--tool-call-parser": "none",
    "--generation-config": "vllm", "--max-logprobs": "5", "--otlp-traces-endpoint": "http://a", "--host": "::1",
    "--port": "1", "--allocator": "paged", "--scheduler": "sjf", "--dtype": "half", "--load-format": "dummy",
    "--device": "cpu", "--gpu-memory-utilization": "0.3", "--max-model-len": "99", "--max-num-seqs": "6",
    "--max-num-batched-tokens": "77", "--block-size": "8", "--num-gpu-blocks-override": "55",
    "--kv-cache-memory-gib": "1.5", "--swap-space": "2", "--seed": "7", "--model": "there",
    "--set": "driver.probe=false",
    "--ssl-certfile": "a", "--ssl-keyfile": "b", "--ssl-keyfile-password": "c", "--ssl-ca-certs": "d",
    "--api-key-file": "README.md", "--protect": "/metrics",
}  # fmt: skip
# Refused where they ask for what this version has not.
REFUSED = ("--tensor-parallel-size", "--pipeline-parallel-size", "--quantization")


def test_every_flag_changes_the_config():
    """One that is read and then forgotten would be worse than one that is unknown."""
    usual = overrides_of(parse_flags([]))
    for action in serving_flags._parser()._actions:
        flag = next((name for name in action.option_strings if name.startswith("--") and name != "--help"), None)
        if flag is None:
            continue
        if flag in REFUSED:
            with pytest.raises(ConfigError, match=flag):
                overrides_of(parse_flags([flag, "2"]))
            continue
        name = "--no-async-scheduling" if flag == "--async-scheduling" else flag
        name = "--no-enable-prefix-caching" if flag == "--enable-prefix-caching" else name
        given = [name] if action.nargs == 0 or name.startswith("--no-") else [name, VALUES[flag]]
        assert overrides_of(parse_flags(given)) != usual, flag


def test_zero_is_no_flag_that_is_missing():
    for flag in ("--max-model-len", "--max-num-batched-tokens", "--max-num-seqs", "--block-size", "--seed", "--port"):
        assert any(made.endswith("=0") for made in overrides_of(parse_flags([flag, "0"]))), flag


def test_every_flag_that_a_message_names_sets_the_key_that_it_stands_for():
    known = load_config(["allocator=paged_prefix"])
    for key, flag in FLAGS.items():
        section, name = key.split(".")
        assert name in known[section], key
        if flag == "MODEL":
            continue
        switch = flag in ("--trust-remote-code", "--disable-access-log", "--async-scheduling")
        made = overrides_of(parse_flags([flag] if switch else [flag, VALUES[flag]]))
        assert [one for one in made if one.startswith(f"{key}=")], (key, flag)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("engine.max_model_len=9 is over; lower it", "--max-model-len 9 is over; lower it"),
        (
            "set engine.max_model_len=9, or kv_cache.num_blocks=3.",
            "set --max-model-len 9, or --num-gpu-blocks-override 3.",
        ),
        ("lower scheduler.max_num_seqs or engine.dtype", "lower --max-num-seqs or --dtype"),
        ("lower the KV pool (kv_cache.memory_gib)", "lower the KV pool (--kv-cache-memory-gib)"),
        ("kv_cache.num_slots=3 is too small", "--set kv_cache.num_slots=3 is too small"),
        ("runner.attention=triton needs a GPU", "--set runner.attention=triton needs a GPU"),
        ("model.path=/a/b.c does not exist", "MODEL /a/b.c does not exist"),
        ("set model.trust_remote_code=true", "set --trust-remote-code"),
        ("(model.load_format=dummy runs the shape)", "(--load-format dummy runs the shape)"),
        ("server.chat_template='/a b' must be", "--chat-template '/a b' must be"),
        ("use allocator=contiguous or paged", "use --allocator contiguous or paged"),
        ("engine.overlap=false; runner.graphs=false", "--no-async-scheduling; --enforce-eager"),
        (
            "unknown config key 'server.no'; did you mean server.port?",
            "unknown config key 'server.no'; did you mean --port?",
        ),
        (
            "/a/engine.py and model.safetensors and model.json stay",
            "/a/engine.py and model.safetensors and model.json stay",
        ),
        ("a model.safetensors.index.json, too", "a model.safetensors.index.json, too"),
    ],
)
def test_messages_in_flags(text, said):
    assert in_flags(text) == said


def test_words_name_no_key_that_has_a_flag():
    for key, flag in FLAGS.items():
        assert not re.search(rf"\b{re.escape(key)}\b", in_flags(f"lower {key}=3 or {key}.")), flag
