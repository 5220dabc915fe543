"""A server whose ranks are on two nodes of a Ray cluster: it answers, it ends with its node, and returns with one."""

from __future__ import annotations

import json

import openai
import pytest
from server_harness import KEY, PATIENCE, RunningServer
from test_rank_failures import Stream

pytestmark = pytest.mark.slow
FLAGS = ("--tensor-parallel-size", "2", "--distributed-executor-backend", "ray", "--device", "cpu")


@pytest.fixture
def cluster(monkeypatch):
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    # The planning rank is the server's own process: the head needs no room for ranks.
    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    monkeypatch.setenv("RAY_ADDRESS", found.address)
    yield found
    found.shutdown()


def answer(server: RunningServer) -> str:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, timeout=PATIENCE)
    return client.completions.create(model="demo", prompt="The", max_tokens=8, temperature=0).choices[0].text


def test_a_server_ends_with_a_node_of_its_own_and_returns_with_another(cluster):
    node = cluster.add_node(num_cpus=2)
    server = RunningServer(*FLAGS)
    text = answer(server)
    streams = [Stream(server) for _ in range(3)]
    assert all(stream.begun.wait(PATIENCE) for stream in streams)
    cluster.remove_node(node, allow_graceful=False)
    for stream in streams:
        stream.join(PATIENCE)
        errors = [json.loads(event) for event in stream.events if event.startswith('{"error"')]
        assert len(errors) == 1 and stream.events[-1] == "[DONE]"
    assert server.process.wait(PATIENCE) == 1
    assert "rank 1 of 2: its actor has ended, or its machine is gone" in server.log
    cluster.add_node(num_cpus=2)
    server = RunningServer(*FLAGS)
    assert answer(server) == text
    assert server.stop() == 0
