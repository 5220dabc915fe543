"""KV events: what a subscriber that knows only vLLM's published wire format believes, against what the cache holds."""

from __future__ import annotations

import itertools
import struct
import subprocess
import sys
import time

import msgpack
import pytest
import zmq
from kv_subscriber import Subscriber
from server_harness import PATIENCE, ROOT, RunningServer
from waiting import wait_for

from kvarena.allocators.paged import PagedAllocator
from kvarena.allocators.prefix import PrefixCachingAllocator
from kvarena.engine.errors import ConfigError
from kvarena.engine.request import Request, SamplingParams
from kvarena.engine.server.engine.event_publisher import CacheFeed, EventPublisher
from kvarena.engine.server.shared.config import ServerConfig
from kvarena.engine.server.shared.kv_events import KVEventsConfig
from kvarena.experiments.caching.accesses import watch

END = b"\xff" * 8


def compute(alloc: PrefixCachingAllocator, name: str, tokens: list[int]) -> Request:
    req = Request(name, tokens, SamplingParams(max_tokens=8))
    assert alloc.allocate(req, len(tokens), alloc.match_prefix(req))
    req.num_computed_tokens = len(tokens)
    alloc.commit(req)
    return req


def feed_at(endpoint="tcp://*:0", **more):
    alloc = PrefixCachingAllocator(num_blocks=20, block_size=4, max_model_len=64)
    config = KVEventsConfig(enable_kv_cache_events=True, endpoint=endpoint, **more)
    return alloc, CacheFeed(alloc, config, 0)


def test_an_observer_that_was_there_before_hears_the_same():
    alloc = PrefixCachingAllocator(num_blocks=20, block_size=4, max_model_len=64)
    log = watch(alloc, lambda: 0.0)
    feed = CacheFeed(alloc, KVEventsConfig(enable_kv_cache_events=True, endpoint="tcp://*:0"), 0)
    feed._events.take()
    for name in ("a", "b"):
        alloc.free(compute(alloc, name, list(range(9))))
    assert [event["type"] for event in feed._events.take()] == ["BlockStored"]
    assert log.reuse().optimal_tokens.tolist() == [0, 8]
    feed.close()


def reachable(endpoint: str) -> str:
    return endpoint.replace("*", "127.0.0.1")


class Ears:
    """A SUB socket, and a DEALER for what was missed."""

    def __init__(self, config: KVEventsConfig, topic: bytes = b"") -> None:
        self.context = zmq.Context()
        self.sub = self.context.socket(zmq.SUB)
        self.sub.setsockopt(zmq.SUBSCRIBE, topic)
        self.sub.connect(reachable(config.endpoint))
        self.config = config

    def hear(self) -> tuple[bytes, int, list]:
        assert self.sub.poll(1000 * PATIENCE)
        topic, seq, payload = self.sub.recv_multipart()
        return topic, struct.unpack(">Q", seq)[0], msgpack.unpackb(payload)

    def replay(self, first: int) -> list[tuple[bytes, int, list]]:
        with self.context.socket(zmq.DEALER) as dealer:
            dealer.connect(reachable(self.config.replay_endpoint))
            dealer.send_multipart((b"", struct.pack(">Q", first)))
            heard = []
            while True:
                assert dealer.poll(1000 * PATIENCE)
                empty, topic, seq, payload = dealer.recv_multipart()
                assert empty == b""
                if seq == END:
                    assert topic == payload == b""
                    return heard
                heard.append((topic, struct.unpack(">Q", seq)[0], msgpack.unpackb(payload)))

    def close(self) -> None:
        self.context.destroy(linger=0)


def test_batches_are_numbered_and_repeated_from_where_one_asks():
    alloc, feed = feed_at(replay_endpoint="tcp://127.0.0.1:0", topic="kv", buffer_steps=3)
    ears = Ears(feed.config, b"kv")
    try:
        numbers = itertools.count()

        def is_heard() -> int:  # a subscription takes a moment
            i = next(numbers)
            alloc.free(compute(alloc, str(i), [i] * 5))
            feed.flush()
            feed.flush()  # nothing new: no batch
            return ears.sub.poll(20)

        wait_for(is_heard, "nothing is heard", 0.0)
        topic, seq, (ts, [*events], rank) = ears.hear()
        if seq == 0:  # it was there from the first one on, which says that nothing is cached
            topic, seq, (ts, [*events], rank) = ears.hear()
        assert topic == b"kv" and seq >= 1 and rank == 0 and abs(ts - time.time()) < PATIENCE
        assert events[-1]["type"] == "BlockStored"
        for token in (10**6, 10**6 + 1):
            alloc.free(compute(alloc, str(token), [token] * 5))
            feed.flush()
        while not any(event.get("token_ids", [0])[0] == 10**6 + 1 for event in events):
            _, last, (_, events, _) = ears.hear()
        repeated = ears.replay(last - 1)
        assert [one[1] for one in repeated] == [last - 1, last] and repeated[-1][0] == b"kv"
        assert len(ears.replay(0)) == 3  # what is kept
        assert ears.replay(last + 1) == []
        assert [event["token_ids"][0] for event in repeated[-1][2][1] if "token_ids" in event] == [10**6 + 1]
    finally:
        feed.close()
        ears.close()


def test_what_finds_the_queue_full_is_a_gap():
    publisher = EventPublisher(
        KVEventsConfig(enable_kv_cache_events=True, endpoint="tcp://*:0", replay_endpoint="tcp://127.0.0.1:0",
                       max_queue_size=1), 3
    )  # fmt: skip
    ears = Ears(publisher.config)
    try:
        publisher._waiting.append((99, msgpack.packb([0.0, [], 3])))  # its thread has not woken yet
        publisher.publish([{"type": "AllBlocksCleared"}])
        publisher._waiting.popleft()
        publisher.publish([{"type": "AllBlocksCleared"}])
        wait_for(lambda: ears.replay(0), "nothing is kept")
        heard = ears.replay(0)
        assert [(one[1], one[2][2]) for one in heard] == [(1, 3)]
    finally:
        publisher.close()
        ears.close()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ('{"enable"', "is not JSON"),
        ("[1]", "must be an object"),
        ('{"port": 1}', "unknown key server.kv_events.port"),
        ('{"endpoint": "http://a"}', "an address of ZeroMQ"),
        ('{"endpoint": "tcp://*"}', "an address of ZeroMQ"),
        ('{"publisher": "kafka"}', "one of zmq, null"),
        ('{"buffer_steps": 0}', "an integer of at least 1"),
    ],
)
def test_wrong_settings_are_one_line(given, words):
    with pytest.raises(ConfigError, match=words):
        ServerConfig.from_dict({"kv_events": given})


def test_settings_of_the_next_engine():
    on = KVEventsConfig(enable_kv_cache_events=True, replay_endpoint="tcp://127.0.0.1:0")
    assert (on.of_rank(2).endpoint, on.of_rank(2).replay_endpoint) == ("tcp://*:5559", "tcp://127.0.0.1:0")
    assert KVEventsConfig(endpoint="inproc://a").of_rank(1).endpoint == "inproc://a_dp1"
    with pytest.raises(ConfigError, match="room for one engine"):
        KVEventsConfig(endpoint="ipc:///tmp/a").of_rank(1)
    with pytest.raises(ConfigError, match="lower port"):
        KVEventsConfig(endpoint="tcp://*:65535").of_rank(1)
    assert not KVEventsConfig(enable_kv_cache_events=True, publisher="null").is_on and not KVEventsConfig().is_on


def test_an_allocator_without_a_prefix_cache_and_an_address_that_is_taken():
    _, feed = feed_at()
    try:
        with pytest.raises(ConfigError, match="paged_prefix or allocator=radix"):
            CacheFeed(PagedAllocator(num_blocks=2, block_size=4, max_model_len=8), feed.config, 0)
        with pytest.raises(ConfigError, match=r"server\.kv_events\.endpoint=tcp://\*:\d+: .*choose another"):
            feed_at(feed.config.endpoint)
    finally:
        feed.close()


def test_without_the_flag_nothing_is_imported_or_told():
    """No observer, so a step costs what it did; ZeroMQ and CBOR are not even there."""
    code = """
import sys
from kvarena.engine.server.processes.engine import with_feed
from kvarena.engine.server.shared.config import ServerConfig
from kvarena.experiments.serving.stub_engine import StubOptions, build
served = build(StubOptions(2048))
assert with_feed(served, ServerConfig().kv_events, 0) is served and served.engine.allocator.observer is None
print({"zmq", "cbor2"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["set()"]


def test_a_server_tells_what_it_caches():
    """Over HTTP: where the events are, and then a prompt's blocks, once, however often it is asked."""
    config = '{"enable_kv_cache_events": true, "endpoint": "tcp://*:0", "replay_endpoint": "tcp://127.0.0.1:0"}'
    server = RunningServer("--max-model-len", "512", "--num-gpu-blocks-override", "64", "--kv-events-config", config)
    try:
        [(rank, source)] = server.client.get("/kv_event_sources").json().items()
        assert rank == "0" and source["publisher"] == "zmq" and not source["endpoint"].endswith(":0")
        ears = Ears(KVEventsConfig(**source))
        prompt = list(range(30, 70))
        for _ in range(2):
            assert server.complete(prompt).status_code == 200
        server.wait_idle()
        batches = ears.replay(0)
        ears.close()
        events = [event for _, _, (_, events, _) in batches for event in events]
        assert [seq for _, seq, _ in batches] == list(range(len(batches)))
        assert events[0] == {"type": "AllBlocksCleared"}  # a server starts with nothing
        subscriber = Subscriber()
        subscriber.take(events)
        assert {prefix[:32] for prefix in subscriber.prefix.values() if len(prefix) >= 32} == {tuple(prompt[:32])}
        assert len(subscriber.held) * 16 == server.slots()["cached"]
    finally:
        assert server.stop() == 0
    assert "KV events are published at" in server.said and "Traceback" not in server.said


def test_a_server_tells_what_host_memory_holds_and_what_came_from_it():
    """Prompts of six times the pool, twice: the second time they come up."""
    config = '{"enable_kv_cache_events": true, "endpoint": "tcp://*:0", "replay_endpoint": "tcp://127.0.0.1:0"}'
    server = RunningServer(
        "--max-model-len", "512", "--num-gpu-blocks-override", "32", "--kv-offloading-size", "0.05",
        "--kv-events-config", config,
    )  # fmt: skip
    try:
        [(_, source)] = server.client.get("/kv_event_sources").json().items()
        ears = Ears(KVEventsConfig(**source))
        prompts = [[100 + 13 * i + k % 50 for k in range(400)] for i in range(8)]
        cached, answers = [], []
        for prompt in prompts * 2:
            body = server.complete(prompt, max_tokens=4, temperature=0).json()
            cached.append(body["usage"]["prompt_tokens_details"]["cached_tokens"])
            answers.append(body["choices"][0]["text"])
        server.wait_idle()
        assert cached == [0] * 8 + [384] * 8 and answers[:8] == answers[8:]
        events = [event for _, _, (_, events, _) in ears.replay(0) for event in events]
        ears.close()
        found = server.metrics()
    finally:
        assert server.stop() == 0
    subscriber = Subscriber()
    subscriber.take(events)
    labels = {name: value for name, value in found.items() if "kv_level_blocks" in name}
    blocks = {part: value for name, value in labels.items() for part in ("cached", "free") if part in name}
    assert len(subscriber.below) == blocks["cached"] > 150 and sum(labels.values()) == blocks["cached"] + blocks["free"]

    def metric(name: str, *words: str) -> float:
        return sum(value for key, value in found.items() if key.startswith(name) and all(word in key for word in words))

    loaded = metric("vllm:external_prefix_cache_hits_total")
    assert 2000 < loaded <= 8 * 384 == loaded + metric("vllm:prefix_cache_hits_total")
    assert metric("vllm:prompt_tokens_by_source_total", "external_kv_transfer") == loaded
    up, down = (metric("vllm:kv_offload_total_bytes_total", way) for way in ("CPU_to_GPU", "GPU_to_CPU"))
    assert up / loaded == down / (16 * blocks["cached"])  # bytes of a token
