"""Bailian's traces, on a file made in their format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvarena.engine.errors import TraceError
from kvarena.experiments.workloads.bailian import BailianWorkload


def row(chat: int, parent: int, time: float, length: int, ids: list[int], **other: Any) -> dict[str, Any]:
    return {
        "chat_id": chat, "parent_chat_id": parent, "timestamp": time, "input_length": length, "output_length": 5,
        "type": "text", "turn": 1, "hash_ids": ids,
    } | other  # fmt: skip


ROWS = [
    row(3, -1, 0.5, 40, [1, 2, 3]),
    row(4, -1, 0.75, 35, [1, 2]),  # whose rest has no id
    row(9, 3, 61.25, 64, [1, 2, 3, 7], turn=2),
    row(10, 8, 62.0, 20, [1, 5], type="image", turn=4),  # of a chat that began before the file
    row(12, 9, 99.0, 16, [1], turn=3),
]


def read(tmp_path: Path, rows: list[dict[str, Any]], **options: Any) -> BailianWorkload:
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return BailianWorkload(path=str(path), seed=0, vocab_size=1000, **options)


def test_prompts_share_where_ids_agree_and_a_chat_is_a_client(tmp_path: Path) -> None:
    items = read(tmp_path, ROWS).items()
    first, second, later, image, last = [item.prompt_token_ids for item in items]
    assert [len(prompt) for prompt in (first, second, later, image, last)] == [40, 35, 64, 20, 16]
    assert first[:32] == second[:32] and first == later[:40] and image[:16] == last == first[:16]
    assert second[32:] != first[32:35]  # of its own
    assert [item.client_id for item in items] == ["chat-3", "chat-4", "chat-3", "chat-8", "chat-3"]
    assert [item.kind for item in items] == ["text-1", "text-1", "text-2", "image-4", "text-3"]
    assert [item.arrival_time for item in items] == [0.0, 0.25, 60.75, 61.5, 98.5]
    assert read(tmp_path, ROWS).block_hits() == (7, 12)


def test_one_type_alone(tmp_path: Path) -> None:
    workload = read(tmp_path, ROWS, type="image")
    assert [item.client_id for item in workload.items()] == ["chat-8"]
    assert "dropped 4 rows of another type" in workload.description


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"timestamp": -1.0}, "timestamp: -1.0 must be a number of seconds"),
        ({"timestamp": "0"}, "timestamp: '0' must be a number of seconds"),
        ({"chat_id": -1}, "chat_id: -1 must be an integer, at least 0"),
        ({"parent_chat_id": -2}, "parent_chat_id: -2 must be an integer, at least -1"),
        ({"turn": 1.5}, "turn: 1.5 must be an integer"),
        ({"type": 7}, "type: 7 must be a text"),
        ({"hash_ids": [1]}, "1 ids for 40 tokens; 2 are needed, one per block of 16"),
        ({"hash_ids": [1, 2, 3, 4]}, "4 ids for 40 tokens; 2 are needed"),
        ({"input_length": 0}, "input_length: 0 must be at least 1"),
    ],
)
def test_broken_lines_are_named(tmp_path: Path, change: dict[str, Any], what: str) -> None:
    with pytest.raises(TraceError, match="line 2, column") as error:
        read(tmp_path, [ROWS[0], ROWS[0] | change]).items()
    assert what in str(error.value)


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    broken = {key: value for key, value in ROWS[0].items() if key != "turn"}
    with pytest.raises(TraceError, match="turn: this key is missing"):
        read(tmp_path, [broken]).items()
