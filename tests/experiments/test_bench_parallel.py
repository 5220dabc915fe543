"""`kvarena benchmark parallel` on a CPU: the sums by gloo, every rank at once."""

import json

import pytest

from kvarena.engine.errors import ConfigError
from kvarena.experiments.benchmarks import parallel


def test_sums_over_two_ranks(capsys):
    assert parallel.main(["--shape", "tiny", "--rows", "1", "4", "--", "parallel.executor=threads"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["section"], line["rows"], line["bytes"]) for line in lines] == [
        ("all_reduce", 1, 256),
        ("all_reduce", 4, 1024),
    ]
    assert all(line["gloo"] > 0 and line["ranks"] == 2 for line in lines)


def test_stages_have_nothing_to_add_up():
    with pytest.raises(ConfigError, match="measures ranks of a layer"):
        parallel.main(["--shape", "tiny", "parallel.pipeline_parallel_size=2"])
