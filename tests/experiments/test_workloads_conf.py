"""Every config of the groups workload and arrival makes what it says; the describe command prints what it read."""

import json
from pathlib import Path

import hydra.utils
import numpy as np
import pytest

from kvarena.experiments.cli import main as kvarena_command
from kvarena.experiments.load.arrivals import Arrival
from kvarena.experiments.recording.record import write_requests
from kvarena.experiments.recording.request_log import REQUEST_COLUMNS
from kvarena.experiments.settings.compose import load_config
from kvarena.experiments.workloads import Workload
from kvarena.experiments.workloads.describe import main

LONG = {"multi_turn_long": "multi_turn", "agent_loop_long": "agent_loop"}  # presets of other workloads
CONF = Path(__file__).resolve().parents[2] / "conf"
TRACES = {
    "azure_trace": ("t.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.5,9,2\n"),
    "burstgpt": (
        "b.csv",
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n5,GPT-4,9,2,11,API log\n",
    ),
    "vidur": ("v.csv", "arrived_at,num_prefill_tokens,num_decode_tokens\n0.5,9,2\n"),
    "mooncake": ("m.jsonl", '{"timestamp": 0, "input_length": 9, "output_length": 2, "hash_ids": [1]}\n'),
    "bailian": (
        "q.jsonl",
        '{"chat_id": 1, "parent_chat_id": -1, "timestamp": 0.5, "input_length": 9, "output_length": 2, '
        '"type": "text", "turn": 1, "hash_ids": [1]}\n',
    ),
    "sharegpt_json": (
        "s.json",
        '[{"conversations": [{"from": "human", "value": "one two three four five"},'
        ' {"from": "gpt", "value": "one two three four"}]}]',
    ),
}


def load(group, name, overrides=()):
    return load_config([f"{group}={name}", "engine.max_model_len=2048", *overrides])[group]


def names(group):
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


@pytest.mark.parametrize("name", names("workload"))
def test_workload_configs(name, tmp_path):
    overrides = []
    if name in TRACES:
        file, text = TRACES[name]
        (tmp_path / file).write_text(text)
        overrides = [f"workload.path={tmp_path / file}"]
    if name == "sharegpt_json":
        from tokenizers import Tokenizer, models, pre_tokenizers

        words = {word: i for i, word in enumerate(["one", "two", "three", "four", "five"])}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="one"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        overrides.append(f"model.path={tmp_path}")
    if name in LONG:
        overrides = ["workload.num_requests=10"]
    if name == "recorded":
        row = dict.fromkeys(REQUEST_COLUMNS, 0) | {
            "request_id": "a", "client_id": "c", "kind": "", "finish_reason": "stop", "error": "",
            "prompt_token_ids": [3, 4], "output_token_ids": [5], "token_times": [0.5],
            "num_prompt_tokens": 2, "num_output_tokens": 1,
        }  # fmt: skip
        write_requests(tmp_path / "requests.parquet", [row])
        overrides = [f"workload.path={tmp_path}"]
        assert load_config(["workload=recorded"]).arrival.speed == 1  # its own times, unless others are asked for
        assert load_config(["workload=recorded", "arrival=poisson"]).arrival.rate
    cfg = load("workload", name, overrides)
    workload = hydra.utils.instantiate(cfg, vocab_size=512, reserved_token_ids=[0, 1])
    assert isinstance(workload, Workload)
    items = workload.items()
    assert len(items) == (1 if name in (*TRACES, "recorded") else cfg.num_requests)
    assert workload.name == LONG.get(name, name)
    assert workload.description.startswith(f"{workload.name}: {len(items)} requests")
    limit = 131072 if name in LONG else 2048
    assert all(len(item.prompt_token_ids) + item.output_len <= limit for item in items)
    if name != "sharegpt_json":
        assert all(set(item.prompt_token_ids) <= set(range(2, 512)) for item in items)


@pytest.mark.parametrize(("name", "low", "high", "pause"), [
    ("multi_turn_long", 8_000, 100_000, 370.0), ("agent_loop_long", 20_000, 100_000, 6.0 + 0.11 * 300.0),
])  # fmt: skip
def test_long_sessions_have_the_lengths_and_pauses_of_today(name, low, high, pause):
    table = hydra.utils.instantiate(load("workload", name, ["workload.num_requests=3000"]), vocab_size=512).table
    assert low * 0.8 < np.percentile(table.prompt_lens, 10) < low * 1.4
    assert high * 0.9 < np.percentile(table.prompt_lens, 99) < 131072
    last: dict[str, float] = {}
    pauses = []
    for client, time, output in zip(table.client_ids, table.arrival_times, table.output_lens, strict=True):
        if client in last:
            pauses.append(time - last[client])
        last[client] = time + 0.02 * output
    # Sessions that the first 3,000 requests cut off lack their longest pauses.
    assert pause * 0.8 < np.mean(pauses) < pause * 1.2
    if name == "agent_loop_long":  # seconds after a tool, minutes after a person
        assert np.percentile(pauses, 50) < 10
        assert np.percentile(pauses, 97) > 200


def test_the_default_workload():
    cfg = load("workload", "sharegpt")
    assert (cfg.num_requests, cfg.seed, cfg.max_total_len) == (160, 0, 2048)


@pytest.mark.parametrize("name", names("arrival"))
def test_arrival_configs(name):
    arrival = hydra.utils.instantiate(load("arrival", name))
    assert isinstance(arrival, Arrival)
    items = hydra.utils.instantiate(load("workload", "multi_turn"), vocab_size=512).items()
    times = arrival.times(items, 0)
    assert (times is None) == (name == "closed_loop")
    assert times is None or len(times) == len(items)


def test_describe_prints_a_table_and_json(tmp_path, capsys):
    path = tmp_path / "m.jsonl"
    rows = [
        {"timestamp": 500 * i, "input_length": 600, "output_length": i + 1, "hash_ids": [0, i + 1]} for i in range(9)
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    assert main([str(path), "--format", "mooncake"]) == 0
    lines = capsys.readouterr().out.splitlines()
    facts = json.loads(lines[-1])
    assert facts["num_requests"] == 9
    assert facts["output_len"]["p50"] == 5
    assert facts["times"] == {
        "span": 4.0,
        "rate": 2.25,
        "interval_cv": 0.0,
        "dispersion": 0.0,
        "num_distinct": 9,
        "max_at_once": 1,
    }
    # Block 0 comes back in eight rows; the others are seen once.
    assert facts["blocks"] == {"num_blocks": 18, "infinite_cache_hit_rate": 8 / 18}
    assert "9 requests" in lines[0]
    assert any("600.00" in line for line in lines)


def test_describe_of_a_broken_file_is_one_line(tmp_path, capsys):
    path = tmp_path / "t.csv"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.5,-9,2\n")
    assert kvarena_command(["describe", str(path), "--format", "azure"]) == 2
    out = capsys.readouterr()
    assert out.out == ""
    assert out.err.count("\n") == 1
    assert "line 2, column 'ContextTokens' (2)" in out.err
