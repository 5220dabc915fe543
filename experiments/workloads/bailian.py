"""Alibaba Bailian's traces (USENIX ATC'25): JSON lines with hash ids of 16 tokens, and which turn follows which.

Each line: `chat_id`, `parent_chat_id` (the turn before, -1 for a first one), `timestamp` (s), `input_length`,
`output_length` (tokens), `type` (text, search, image, file), `turn` and `hash_ids`, one id per block of 16 tokens of
the prompt; the last block, where it is partial, may have none. Users are not in the files.

github.com/alibaba-edu/qwen-bailian-usagetraces-anon; Wang et al., KVCache Cache in the Wild, USENIX ATC'25.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvarena.engine.checks import is_int, is_number
from kvarena.experiments.workloads.mooncake import MAX_INT, MooncakeWorkload, short
from kvarena.experiments.workloads.parts.trace import TraceRow

_NO_PARENT = -1
_OWN_STREAMS = 2**63  # of the tokens behind a prompt's last hash id; those of ids are below


class BailianWorkload(MooncakeWorkload):
    """A Bailian trace whose prompts share tokens exactly where the hash ids agree.

    A chat's turns are one client, named by its first turn that is in the file. A request's kind is its type and turn.

    Args:
        type: only rows of this type; None takes all.
        options: see MooncakeWorkload.
    """

    name = "bailian"
    ticks_per_second = 1
    keys = ("chat_id", "parent_chat_id", "timestamp", "input_length", "output_length", "type", "turn", "hash_ids")

    def __init__(self, *, type: str | None = None, hash_block_size: int = 16, **options: Any) -> None:
        super().__init__(hash_block_size=hash_block_size, **options)
        self._type = type
        self._roots: dict[int, int] = {}  # turn -> the first of its chat

    def _row(self, record: dict[str, Any], bad: Callable[[str, str], None]) -> TraceRow | str:
        time, hash_ids, length = record["timestamp"], record["hash_ids"], record["input_length"]
        if not is_number(time) or not 0 <= time < MAX_INT:
            bad("timestamp", f"{short(time)} must be a number of seconds, at least 0")
        if not isinstance(record["type"], str):
            bad("type", f"{short(record['type'])} must be a text")
        for key, least in (("chat_id", 0), ("parent_chat_id", _NO_PARENT), ("turn", 0)):
            if not is_int(record[key]) or not least <= record[key] < MAX_INT:
                bad(key, f"{short(record[key])} must be an integer, at least {least} and below 2^63")
        whole, rest = divmod(length, self.hash_block_size)
        if not whole <= len(hash_ids) <= whole + bool(rest):
            bad(
                "hash_ids",
                f"{len(hash_ids)} ids for {length} tokens; {whole} are needed, one per block of {self.hash_block_size} "
                f"(workload.hash_block_size){', or one more for the rest' if rest else ''}",
            )
        chat, parent = record["chat_id"], record["parent_chat_id"]
        root = self._roots[chat] = chat if parent == _NO_PARENT else self._roots.get(parent, parent)
        if self._type is not None and record["type"] != self._type:
            return "rows of another type"
        kind = f"{record['type']}-{record['turn']}"
        return TraceRow(time, length, record["output_length"], f"chat-{root}", tuple(hash_ids), kind)

    def prompt(self, row: int) -> list[int]:
        """The tokens of its ids, and behind them tokens of its own."""
        prompt = super().prompt(row)
        missing = int(self.table.prompt_lens[row]) - len(prompt)
        return prompt + self._tokens.take(_OWN_STREAMS + row, missing) if missing > 0 else prompt
