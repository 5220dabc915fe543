"""Ranks that are actors of a local Ray cluster: the tokens of one rank, and an actor whose end is told."""

from __future__ import annotations

import pytest
from checkpoints import write_checkpoint
from parallel_cells import CELLS, SAMPLINGS, alone, of_model, requests, run

from kvarena.engine.core import StepFailed
from kvarena.engine.errors import EngineError
from kvarena.experiments.building.build import build_engine
from kvarena.experiments.building.shared import SharedParts

pytestmark = pytest.mark.slow
RAY = ("parallel.executor=ray", "parallel.check_plans=true", "engine.device=cpu")


@pytest.fixture(scope="module")
def ray():
    found = pytest.importorskip("ray")
    found.init(address="local", num_cpus=3, include_dashboard=False, logging_level="error")
    yield found
    found.shutdown()


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("llama"))


def test_actors_give_the_tokens_of_one_rank(ray, directory):
    shared, asked = SharedParts(), requests(**SAMPLINGS["top_p"])
    sizes = ("parallel.tensor_parallel_size=2", "parallel.pipeline_parallel_size=2")
    engine = build_engine(of_model(directory, *RAY, *sizes, *CELLS["recompute"][0]), shared).engine
    run(engine, asked)
    assert [req.output_token_ids for req in asked] == alone(directory, asked)
    shared.clear()
    assert not ray.util.placement_group_table() or all(
        group["state"] == "REMOVED" for group in ray.util.placement_group_table().values()
    )


def test_an_actor_s_end_is_told(ray, directory):
    shared = SharedParts()
    parts = build_engine(of_model(directory, *RAY, "parallel.tensor_parallel_size=2"), shared)
    asked = requests()
    run(parts.engine, asked[:2])
    [actor] = parts.model.peers.watched.actors
    ray.kill(actor)
    with pytest.raises((StepFailed, EngineError), match="rank 1 of 2: its actor has ended, or its machine is gone"):
        run(parts.engine, requests()[2:])
    shared.clear()


def test_a_cluster_without_room_is_a_line(ray, directory, monkeypatch):
    monkeypatch.setattr("kvarena.engine.ranks.actors.PLACE_SECONDS", 2.0)
    sizes = ("parallel.tensor_parallel_size=4", "parallel.pipeline_parallel_size=2")
    with pytest.raises(EngineError, match="Ray has found no room for 7 ranks") as caught:
        build_engine(of_model(directory, *RAY, *sizes))
    assert "\n" not in str(caught.value)
