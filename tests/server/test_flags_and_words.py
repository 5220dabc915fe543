"""`kvarena serve` speaks of its flags, and every flag has an effect."""

import re
from types import SimpleNamespace

import pytest

from kvarena.engine.errors import ConfigError
from kvarena.engine.server.processes.process import ModelFiles
from kvarena.engine.server.processes.supervisor import ENGINE_FAILED, Supervisor
from kvarena.engine.server.shared.config import ServerConfig
from kvarena.experiments.serving import flags as serving_flags
from kvarena.experiments.serving.flag_words import Nothing
from kvarena.experiments.serving.flags import overrides_of, parse_flags
from kvarena.experiments.serving.words import FLAGS, SWITCHES, in_flags
from kvarena.experiments.settings.compose import CONF_DIR, load_config

# A value for each flag that takes one.
VALUES = {
    "--limit-mm-per-prompt": "image=4",
    "--api-key": "k", "--served-model-name": "n", "--api-server-count": "2", "--max-num-queued-requests": "3",
    "--shutdown-timeout": "4", "--allowed-origins": '["http://a"]', "--allowed-media-domains": "h",
    "--allowed-local-media-path": "tests", "--chat-template": "README.md", "--tool-call-parser": "none",
    "--generation-config": "vllm", "--max-logprobs": "5", "--otlp-traces-endpoint": "http://a", "--host": "::1",
    "--port": "1", "--allocator": "paged", "--scheduler": "sjf", "--dtype": "half", "--load-format": "dummy",
    "--device": "cpu", "--gpu-memory-utilization": "0.3", "--max-model-len": "99", "--max-num-seqs": "6",
    "--max-num-batched-tokens": "77", "--block-size": "8", "--num-gpu-blocks-override": "55",
    "--kv-cache-memory-gib": "1.5", "--swap-space": "2", "--seed": "7", "--model": "there",
    "--kv-offloading-size": "3",
    "--quantization": "awq", "--kv-events-config": '{"enable_kv_cache_events": true}',
    "--tensor-parallel-size": "2", "--pipeline-parallel-size": "2",
    "--distributed-executor-backend": "ray",
    "--set": "driver.probe=false", "--data-parallel-size": "2", "--router": "least_kv",
    "--ssl-certfile": "a", "--ssl-keyfile": "b", "--ssl-keyfile-password": "c", "--ssl-ca-certs": "d",
    "--response-store-size": "7", "--reasoning-parser": "none", "--api-key-file": "README.md", "--protect": "/metrics",
    "--max-requests-per-key": "2", "--tokens-per-minute-per-key": "3k", "--least-priority-by-key": "3",
    "--clients-by": "key", "--admin-key": "r",
    "--root-path": "/shown", "--uvicorn-log-level": "error", "--scheduling-policy": "priority",
    "--kv-cache-memory-bytes": "3G",
    "--record": "there", "--record-mib": "9", "--record-minutes": "5", "--record-content": "hashes",
}  # fmt: skip
ON_BY_DEFAULT = ("--enable-prefix-caching", "--enable-chunked-prefill", "--strict-tools")
OF_MODELS = ("--config", "--tokenizer", "--revision", "--download-dir")  # tests/server/test_foreign_flags.py
BESIDE = {"--router": ["--data-parallel-size", "2"]}  # without, there is nothing that it could change


def test_every_flag_changes_the_config():
    """One that is read and then forgotten would be worse than one that is unknown."""
    usual = overrides_of(parse_flags([]))
    for action in serving_flags._parser()._actions:
        flag = next((name for name in action.option_strings if name.startswith("--") and name != "--help"), None)
        if flag is None or isinstance(action, Nothing) or flag in OF_MODELS:
            continue
        name = "--no-async-scheduling" if flag == "--async-scheduling" else flag
        name = "--no-" + flag[2:] if flag in ON_BY_DEFAULT else name
        given = [name] if action.nargs == 0 or name.startswith("--no-") else [name, VALUES[flag]]
        beside = BESIDE.get(flag, [])
        assert overrides_of(parse_flags(given + beside)) not in (usual, overrides_of(parse_flags(beside))), flag


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
        switch = flag in (
            "--enable-per-request-metrics",
            "--return-tokens-as-token-ids",
            "--trust-remote-code",
            "--disable-access-log",
            "--async-scheduling",
            "--strict-tools",
            "--enable-admin",
            "--enable-force-include-usage",
        )
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
        ("server.log_requests='maybe' must be", "--set server.log_requests='maybe' must be"),
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


def test_every_key_that_a_flag_sets_is_spoken_of_as_that_flag():
    """But for what a flag sets beside its own: a wrong value of it cannot come from the command."""
    usual = overrides_of(parse_flags([]))
    beside = {"scheduler.preemption", "runner.graphs", "driver.probe"}
    for flag, value in VALUES.items():
        given = overrides_of(parse_flags([flag, value, *BESIDE.get(flag, [])]))
        made = {one.split("=")[0] for one in given if one not in usual}
        assert {key for key in made if "." in key} - beside <= set(FLAGS), flag


@pytest.mark.parametrize("text", ["kv_cache.num_slots=3 is too small", "lower engine.max_model_len or runner.graphs"])
def test_what_speaks_flags_stays(text):
    assert in_flags(in_flags(text)) == in_flags(text)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--swap-space", "1", "--allocator", "virtual"], "--swap-space is nothing that --allocator virtual can use"),
        (["--swap-space", "1", "--scheduler", "static"], "--swap-space is nothing that --scheduler static can use"),
    ],
)
def test_flags_that_exclude_each_other(flags, line):
    with pytest.raises(ConfigError, match=line):
        overrides_of(parse_flags(flags))


def test_the_lists_of_strategies_without_swap_are_theirs():
    for kind, key, without in (
        ("allocator", "swap_gib", serving_flags.ALLOCATORS_WITHOUT_SWAP),
        ("scheduler", "preemption", serving_flags.SCHEDULERS_WITHOUT_SWAP),
    ):
        names = [file.stem for file in (CONF_DIR / kind).glob("*.yaml")]
        assert {name for name in names if key not in load_config([f"{kind}={name}"])[kind]} == set(without)


@pytest.mark.parametrize(
    ("key", "value", "must"),
    [
        ("log_requests", "maybe", "true or false"), ("enable_dashboard", 1, "true or false"),
        ("heartbeat_timeout", "abc", "a number"), ("max_logprobs", 1.5, "an integer"), ("max_n", True, "an integer"),
        ("shutdown_timeout", None, "a number"),
    ],
)  # fmt: skip
def test_a_value_of_another_kind_is_refused(key, value, must):
    with pytest.raises(ConfigError, match=f"server.{key}={value} must be {must}"):
        ServerConfig.from_dict({key: value})


def test_a_setting_of_tls_without_tls_is_refused():
    for key in ("ssl_keyfile_password", "ssl_ca_certs"):
        with pytest.raises(ConfigError, match=f"server.{key} is for TLS"):
            ServerConfig.from_dict({key: "README.md"})


def test_words_name_no_key_that_has_a_flag():
    switches = {one.split("=")[0] for one in SWITCHES}
    for key, flag in FLAGS.items():
        text = f"lower {key}." if key in switches else f"lower {key}=3 or {key}."
        assert not re.search(rf"\b{re.escape(key)}\b", in_flags(text)), flag


def test_a_process_that_was_killed_while_it_started_ends_with_a_line(capsys):
    """The system kills who takes memory that is not there, and that process can say nothing itself."""
    supervisor = Supervisor(ServerConfig.from_dict({}), ModelFiles("m", words=in_flags), lambda: None)
    process = SimpleNamespace(name="kvarena-engine", exitcode=-9, join=lambda seconds: None)
    supervisor._engines = [SimpleNamespace(process=process)]
    assert supervisor._failed_start() == ENGINE_FAILED
    said = capsys.readouterr().err
    assert said.startswith("error: kvarena-engine has ended with code -9 while it started: killed, as a system does")
    assert "lower --kv-cache-memory-gib or --max-model-len" in said
