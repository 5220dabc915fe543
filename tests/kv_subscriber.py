"""A subscriber of KV events, written to the published format alone: https://docs.vllm.ai, KV cache events."""

from __future__ import annotations

STORED = {"block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium", "lora_name"}


class Subscriber:
    """Believes what is published, by the published format alone: references to a hash, and its tokens' chain."""

    def __init__(self) -> None:
        self.held: dict[int, int] = {}
        self.below: dict[int, int] = {}  # of host memory, which has no tokens in its events
        self.prefix: dict[int, tuple[int, ...]] = {}  # all tokens up to a hash's block

    def take(self, events: list[dict]) -> None:
        for event in events:
            kind = event["type"]
            if kind == "AllBlocksCleared":
                assert set(event) == {"type"}
                self.held.clear()
                self.below.clear()
            elif kind == "BlockRemoved":
                assert event["block_hashes"]
                held = {"GPU": self.held, "CPU": self.below}[event["medium"]]
                for name in event["block_hashes"]:
                    held[name] -= 1  # only what was told
                    if not held[name]:
                        del held[name]
            elif event["medium"] == "CPU":
                assert kind == "BlockStored" and set(event) >= STORED and event["token_ids"] == []
                for name in event["block_hashes"]:
                    assert name in self.prefix  # told when it was stored in the pool
                    self.below[name] = self.below.get(name, 0) + 1
            else:
                assert kind == "BlockStored" and set(event) >= STORED
                self._store(event)

    def _store(self, event: dict) -> None:
        size, tokens, parent = event["block_size"], event["token_ids"], event["parent_block_hash"]
        assert len(tokens) == size * len(event["block_hashes"])
        before = () if parent is None else self.prefix[parent]  # a parent was told before its child
        for i, name in enumerate(event["block_hashes"]):
            before += tuple(tokens[i * size : (i + 1) * size])
            assert self.prefix.setdefault(name, before) == before
            self.held[name] = self.held.get(name, 0) + 1
