"""`sampling.n`: each item of a workload gives n requests, in every strategy."""

import pytest

from kvarena.engine.errors import ConfigError
from kvarena.experiments.building.build import build
from kvarena.experiments.settings.compose import load_run

SIMULATED = ("runner=simulated", "runner.profile=h100", "engine.dtype=bfloat16", "workload=fixed")


def test_each_prompt_gives_n_requests_that_share_it():
    requests = build(load_run([*SIMULATED, "workload.num_requests=2", "sampling.n=3"])).load.requests
    group = list(requests)
    assert len(requests) == len(group) == 6
    assert [req.request_id for req in group[:3]] == ["fixed-0-0", "fixed-0-1", "fixed-0-2"]
    assert group[1].parent is group[0] and group[1].prompt_token_ids == group[0].prompt_token_ids


def test_users_who_wait_cannot_take_samples():
    with pytest.raises(ConfigError, match=r"sampling\.n=2 with users who wait"):
        build(load_run([*SIMULATED, "arrival=closed_loop", "sampling.n=2"]))
