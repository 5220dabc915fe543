"""The Ray Serve example on a local cluster of two nodes: answers, routing, a node that is killed under load.

`make test` does without it: python -m pip install 'kvarena[ray-serve]', then python -m pytest -m slow tests/examples
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

pytest.importorskip("grpc", reason="python -m pip install 'kvarena[ray-serve]', and this file again")
ray = pytest.importorskip("ray")
openai = pytest.importorskip("openai")

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 300.0
FLAGS = "models/demo --max-model-len 512 --num-gpu-blocks-override 256 --device cpu --load-format auto"
STREAM = {"prompt": [40] * 16, "max_tokens": 400, "ignore_eos": True, "stream": True, "temperature": 0}


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def wait_for(condition, what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


@pytest.fixture(scope="module")
def served() -> Iterator[SimpleNamespace]:
    from ray import serve
    from ray.cluster_utils import Cluster

    os.environ |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_DEDUP_LOGS": "0"}
    small = {"object_store_memory": 80 << 20, "include_dashboard": False}
    head = {"num_cpus": 4, "resources": {"engine": 1, "door": 1}} | small
    cluster = Cluster(initialize_head=True, head_node_args=head)
    node = cluster.add_node(num_cpus=2, resources={"engine": 1}, object_store_memory=80 << 20)
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False)
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port, "location": "HeadOnly"})
    from examples.ray_serve.app import build

    args = {"flags": FLAGS, "min_replicas": "2", "max_replicas": "2", "num_cpus": "0.5", "resource": "engine"}
    serve.run(build(args | {"ingress_resource": "door"}), name="kvarena", route_prefix="/")
    yield SimpleNamespace(url=f"http://127.0.0.1:{port}", cluster=cluster, node=node, serve=serve)
    serve.shutdown()
    ray.shutdown()
    cluster.shutdown()


def running_replicas(served: SimpleNamespace) -> int:
    deployment = served.serve.status().applications["kvarena"].deployments["EngineReplica"]
    return deployment.replica_states.get("RUNNING", 0)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_openai_client_is_answered(served):
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", timeout=PATIENCE)
    assert [model.id for model in client.models.list()] == ["demo"]
    whole = client.completions.create(model="demo", prompt="The engine keeps", max_tokens=12, temperature=0)
    parts = client.completions.create(
        model="demo", prompt="The engine keeps", max_tokens=12, temperature=0, stream=True
    )
    assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text != ""
    messages = [{"role": "user", "content": "What does the function return? " * 20}]
    chats = [client.chat.completions.create(model="demo", messages=messages, max_tokens=4) for _ in range(3)]
    # The router follows the prompt's beginning: its KV is found again.
    assert chats[-1].usage.prompt_tokens_details.cached_tokens > 64
    two = client.completions.create(model="demo", prompt="x", max_tokens=3, n=2, logprobs=1, extra_body={"seed": 1})
    assert len(two.choices) == 2 and len(two.choices[0].logprobs.tokens) == 3
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model="demo", prompt="x", temperature=-1)
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        client.completions.create(model="demo", prompt=[5] * 600, max_tokens=1)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_node_that_is_killed_takes_only_its_own_streams_along(served):
    """Others go on, what is lost ends with an error event, and the replica returns with its node."""
    wait_for(lambda: running_replicas(served) == 2, "two replicas do not run")
    ended: list[str] = []
    begun: list[int] = []

    def read(number: int) -> None:
        with (
            httpx.Client(base_url=served.url, timeout=PATIENCE) as client,
            client.stream("POST", "/v1/completions", json=STREAM | {"prompt": [50 + number] * 16}) as response,
        ):
            lines = []
            for line in response.iter_lines():
                if line.startswith("data: "):
                    lines.append(line[6:])
                    if len(lines) == 2:
                        begun.append(number)
        assert lines[-1] == "[DONE]"
        last = json.loads(lines[-2])
        ended.append(last["error"]["code"] if "error" in last else last["choices"][0]["finish_reason"])

    threads = [threading.Thread(target=read, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    wait_for(lambda: len(begun) == 16, "the streams have not begun")
    served.cluster.remove_node(served.node, allow_graceful=False)
    # New requests are answered all the while.
    with httpx.Client(base_url=served.url, timeout=PATIENCE) as client:
        codes = [client.post("/v1/completions", json={"prompt": "x", "max_tokens": 2}).status_code for _ in range(8)]
    for thread in threads:
        thread.join(PATIENCE)
    assert codes == [200] * 8
    assert len(ended) == 16 and set(ended) == {"length", "engine_dead"}, ended
    served.node = served.cluster.add_node(num_cpus=2, resources={"engine": 1}, object_store_memory=80 << 20)
    wait_for(lambda: running_replicas(served) == 2, "the replica has not returned")


def test_the_autoscaler_follows_the_kv_in_use():
    from examples.ray_serve.app import by_kv_in_use

    def wanted(*shares: float, current: int = 2) -> int:
        context = SimpleNamespace(
            aggregated_metrics={"kv_in_use": dict(enumerate(shares))}, target_num_replicas=current,
            capacity_adjusted_min_replicas=1, capacity_adjusted_max_replicas=6,
        )  # fmt: skip
        return by_kv_in_use(context)[0]

    assert [wanted(0.1, 0.1), wanted(0.6, 0.6), wanted(0.9, 0.7), wanted(1.0, 1.0, 1.5)] == [1, 2, 3, 6]
    assert wanted(current=3) == 3
    assert wanted(*[5.0] * 4) == 6
