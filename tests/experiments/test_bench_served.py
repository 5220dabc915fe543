"""The serving benchmark: its in-process part runs the load's requests, and its lines are right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvarena.engine.errors import ConfigError, EngineError
from kvarena.experiments.benchmarks.served import ClosedLoop, check_token_ids, serve_flags, shares
from kvarena.experiments.benchmarks.stream_load import Level, Shape, line_of
from kvarena.experiments.load.http_client import Answer
from kvarena.experiments.models.shape import make_model_dir
from kvarena.experiments.serving.stub_engine import StubOptions, build
from kvarena.experiments.settings.compose import CONF_DIR

SHAPE = Shape(num_prompt_tokens=20, num_output_tokens=5, max_token_id=90)


def test_levels_are_shared_evenly():
    assert Level.parse("1:4,256:768") == [Level(1, 4), Level(256, 768)]
    assert Level(256, 768).share(6) == (6, 42, 128)
    assert Level(1, 4).share(6) == (1, 1, 4)


def test_prompts_are_the_same_in_every_run_and_differ_between_processes():
    level = Level(4, 8)
    first, again, other = (SHAPE.prompts(level, process, 3) for process in (0, 0, 1))
    assert first == again != other
    assert all(len(prompt) == 20 and 10 <= min(prompt) <= max(prompt) <= 90 for prompt in first)


def test_prefixes_are_common_to_all_processes():
    shape = Shape(3, 5, 90, num_prefixes=2, num_prefix_tokens=8)
    first, other = (shape.prompts(Level(4, 8), process, 4) for process in (0, 1))
    starts = [tuple(prompt[:8]) for prompt in first]
    assert starts == [tuple(prompt[:8]) for prompt in other] and starts[0] == starts[2] != starts[1] == starts[3]
    assert {len(prompt) for prompt in first} == {11} and first[0][8:] != first[2][8:]


def test_the_closed_loop_runs_every_request_with_no_more_in_flight_than_clients():
    engine = build(StubOptions(vocab_size=100)).engine
    level, most = Level(4, 12), 0
    step = engine.step

    def watched():
        nonlocal most
        most = max(most, engine.scheduler.num_running + engine.scheduler.num_waiting)
        return step()

    engine.step = watched
    answers = ClosedLoop(engine, SHAPE, level, 2).run()
    assert most == 4
    assert [answer.num_tokens for answer in answers] == [5] * 12
    assert all(len(one.gaps) == 4 and one.wait >= 0 and one.chunk_times[-1] == one.end for one in answers)


def test_a_request_that_ends_early_fails_the_run():
    engine = build(StubOptions(vocab_size=100)).engine
    step = engine.step

    def cut():
        output = step()
        for req in output.finished:
            req.output_token_ids.pop()
        return output

    engine.step = cut
    with pytest.raises(EngineError, match="ended after 4 tokens"):
        ClosedLoop(engine, SHAPE, Level(1, 1), 1).run()


def test_a_levels_figures():
    answers = [Answer(0.0, [0.5, 0.75, 1.0], end=1.0), Answer(1.0, [1.125, 1.5, 2.0], end=2.0),
               Answer(0.0, end=9.0, error="status 503")]  # fmt: skip
    line = line_of(Level(2, 3), answers)
    assert line["out_tok_per_s"] == 3.0
    assert (line["requests"], line["errors"], line["first_error"]) == (3, 1, "status 503")
    assert (line["ttft_p50_ms"], line["itl_p50_ms"], line["itl_p99_ms"]) == (500.0, 375.0, 500.0)


def test_the_share_is_of_medians_and_the_bar_is_told_apart():
    def line(part, speed, clients=256, gap=15.0):
        return {"section": part, "concurrency": clients, "out_tok_per_s": speed, "itl_p99_ms": gap}

    lines = [line("in_process", 25_000.0), line("in_process", 27_000.0), line("served", 23_000.0),
             line("served", 25_000.0, gap=25.0), line("in_process", 500.0, 1), line("served", 400.0, 1),
             {"section": "start"}]  # fmt: skip
    one, many = shares(lines)
    assert one == {"section": "share", "concurrency": 1, "in_process": 500.0, "served": 400.0, "served_share": 0.8}
    assert many["served_share"] == round(24 / 26, 4)
    assert many["bar"] == {"out_tok_per_s": True, "itl_p99_ms": False, "served_share": True}


def test_a_shape_becomes_a_model_directory(tmp_path: Path):
    from transformers import AutoConfig, AutoTokenizer

    small = tmp_path / "small.yaml"
    text = (CONF_DIR / "model" / "qwen3-0.6b-shape.yaml").read_text()
    small.write_text(text.replace("vocab_size: 151936", "vocab_size: 200"))
    directory = make_model_dir(small, tmp_path / "model")
    assert json.loads((directory / "config.json").read_text())["vocab_size"] == 200
    assert AutoConfig.from_pretrained(directory).num_key_value_heads == 8
    assert AutoTokenizer.from_pretrained(directory).decode([7, 150]) == "t7 t150"


def test_a_shape_is_served_with_dummy_weights_and_a_model_as_it_is():
    class Options:
        model, directory, flags = None, Path("d"), ["--max-num-seqs", "8"]

    assert serve_flags(Options)[:3] == ["d", "--load-format", "dummy"]
    Options.model = Path("m")
    assert serve_flags(Options) == ["d", "--max-num-seqs", "8"]


def test_a_prompt_of_tokens_that_the_model_has_not_is_an_error():
    check_token_ids(2047, 2048)
    with pytest.raises(ConfigError, match="--max-token-id 10000: this model's ids end at 2047"):
        check_token_ids(10_000, 2048)
