"""What a server recorded (`kvarena serve --record DIR`), or a run, as a workload: the same requests again.

    DIR/requests.parquet      lengths, times, clients, priorities; token ids where they were kept
    DIR/prefixes.parquet      hashes of blocks, where they were not
    DIR/engine-*/             of a server with several engines: taken together, by their clocks

A block of which only a hash is known gets tokens that are a function of the hash: prompts share exactly what the
recorded ones shared in whole blocks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from kvarena.engine.checks import check_choice
from kvarena.engine.errors import ConfigError, TraceError
from kvarena.experiments.workloads.parts.base import LengthTable, WorkloadItem
from kvarena.experiments.workloads.parts.reading import length_problem
from kvarena.experiments.workloads.parts.trace import TraceRow, TraceWorkload
from kvarena.reports.reading.names import MANIFEST_FILE, PREFIXES_FILE, REQUESTS_FILE

COLUMNS = (
    "request_id", "client_id", "priority", "arrival_time", "num_prompt_tokens", "num_output_tokens", "finish_reason",
    "prompt_token_ids", "output_token_ids",
)  # fmt: skip
LATER_COLUMNS = ("kind",)  # recordings of before lack them
REFUSED = "that the engine had refused"
PARTS = "engine-*"


@dataclass(frozen=True)
class _Recorded:
    """A request of the recording: its row, and the hashes of its blocks where these stand for its tokens."""

    row: dict[str, Any]
    hashes: list[int] | None = None
    block_size: int = 0

    @property
    def largest_token(self) -> int:
        """Of those that are known; 0 where none is."""
        return 0 if self.hashes is not None else max(*self.row["prompt_token_ids"], *self.row["output_token_ids"], 0)


class RecordedWorkload(TraceWorkload):
    """The requests of a recording, each with the length of output that it had.

    Args:
        path: a folder with requests.parquet, of a server's recording or of a run.
        replies: `recorded`: outputs are the recorded ones, so that a later prompt that holds one finds it in a prefix
            cache as it did then; `own`: outputs are what the engine samples.
        options: num_requests, skip, limits; seed, vocab_size, reserved_token_ids.

    Raises:
        ConfigError: an option out of range, or tokens that the model does not have.
        TraceError: no such folder, or a broken file.
    """

    name = "recorded"

    def __init__(self, *, replies: str = "recorded", **options: Any) -> None:
        if not options.get("path"):
            raise ConfigError("workload.path=null: this workload reads a recording; set workload.path=DIR")
        super().__init__(**options)
        self._has_replies = check_choice("workload.replies", replies, ("recorded", "own")) == "recorded"
        self._requests: list[_Recorded] = []
        self._order: list[int] = []

    @property
    def source(self) -> str:  # type: ignore[override]
        """The folder's name."""
        return f"recording {self.path.name}, replies {'as recorded' if self._has_replies else 'of the engine'}"

    def _read(self) -> Iterator[TraceRow | str]:
        self._requests = sorted(self._read_folders(), key=lambda one: one.row["arrival_time"])
        for index, one in enumerate(self._requests):
            row = one.row
            if row["finish_reason"] == "rejected":
                yield REFUSED
                continue
            for name, least in (("num_prompt_tokens", 1), ("num_output_tokens", 0)):
                if problem := length_problem(row[name], least):
                    raise TraceError(f"{self.path / REQUESTS_FILE}: request {row['request_id']}, {name}: {problem}")
            length = max(1, row["num_output_tokens"])
            client, kind = row["client_id"] or "", row.get("kind") or ""
            yield TraceRow(row["arrival_time"], row["num_prompt_tokens"], length, client, (index,), kind)

    def _keep_hashes(self, rows: list[TraceRow]) -> None:
        self._order = [row.hash_ids[0] for row in rows]

    def _build(self) -> LengthTable:
        table = super()._build()
        taken = [self._requests[index] for index in self._order]
        largest = max(one.largest_token for one in taken)
        if largest >= self.vocab_size:
            raise ConfigError(
                f"workload.path={self.path} holds token {largest}, and this model's end at {self.vocab_size - 1}; name "
                "the model that was recorded, or one with a larger vocabulary (model.path=DIR, model=NAME)"
            )
        cut = sum(not one.row["num_output_tokens"] for one in taken)
        hashed = sum(one.hashes is not None for one in taken)
        notes = [f"{cut} that had ended before their first token get one"] if cut else []
        notes += [f"{hashed} made of hashes"] if hashed else []
        return replace(table, priorities=[one.row["priority"] for one in taken], notes=(*table.notes, *notes))

    def prompt(self, row: int) -> list[int]:
        """The recorded prompt, or one that is made of its hashes."""
        return self._sequence(row)[: int(self.table.prompt_lens[row])]

    def reply(self, row: int) -> list[int]:
        """The recorded output, or one that is made of hashes; one that was cut before its first token is empty."""
        begin = self._requests[self._order[row]].row["num_prompt_tokens"]
        return self._sequence(row)[begin : begin + int(self.table.output_lens[row])]

    def items_iter(self, with_token_ids: bool = True) -> Iterator[WorkloadItem]:
        """The requests one by one, with their replies, under the ids that they had."""
        for row, item in enumerate(super().items_iter(with_token_ids)):
            name = self._requests[self._order[row]].row["request_id"]
            reply = self.reply(row) if self._has_replies and with_token_ids else None
            yield replace(item, request_id=name, reply_token_ids=reply)

    def _sequence(self, row: int) -> list[int]:
        """Prompt and output."""
        one = self._requests[self._order[row]]
        if one.hashes is None:
            return [*one.row["prompt_token_ids"], *one.row["output_token_ids"]]
        length = one.row["num_prompt_tokens"] + one.row["num_output_tokens"]
        tokens: list[int] = []
        for block in one.hashes:
            tokens += self._tokens.take(block % 2**64, min(one.block_size, length - len(tokens)))
        return tokens

    # ---- files

    def _read_folders(self) -> list[_Recorded]:
        """The requests of the folder, or of all engines' below it."""
        if (self.path / REQUESTS_FILE).exists():
            return _read_folder(self.path)
        folders = [path.parent for path in sorted(self.path.glob(f"{PARTS}/{REQUESTS_FILE}"))]
        if not folders:
            raise TraceError(
                f"{self.path} holds no {REQUESTS_FILE}: give the folder of a recording (kvarena serve --record DIR) or "
                "of a run"
            )
        begins = [_begin(folder) for folder in folders]
        found = []
        for folder, begin in zip(folders, begins, strict=True):
            for one in _read_folder(folder):
                one.row["arrival_time"] += begin - min(begins)
                one.row["request_id"] = f"{folder.name}-{one.row['request_id']}"
                found.append(one)
        return found


def _read_folder(folder: Path) -> list[_Recorded]:
    prefixes: dict[str, dict[str, Any]] = {}
    if (folder / PREFIXES_FILE).exists():
        columns = ("request_id", "block_size", "block_hashes")
        prefixes = {row["request_id"]: row for row in _rows(folder / PREFIXES_FILE, columns)}
    found = []
    for row in _rows(folder / REQUESTS_FILE, COLUMNS, LATER_COLUMNS):
        prefix = prefixes.get(row["request_id"])
        if prefix is None and row["prompt_token_ids"] is None:
            raise TraceError(
                f"{folder / REQUESTS_FILE}: request {row['request_id']} has neither token ids nor hashes; record a run "
                "with driver.record=full"
            )
        row["output_token_ids"] = row["output_token_ids"] or []
        row["num_output_tokens"] = row["num_output_tokens"] or 0
        if prefix is None:
            found.append(_Recorded(row))
        else:
            found.append(_Recorded(row, prefix["block_hashes"], prefix["block_size"]))
    return found


def _rows(path: Path, columns: tuple[str, ...], later: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path, columns=[*columns, *later])
    except (OSError, pa.ArrowException) as error:
        raise TraceError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None
    if missing := [name for name in columns if name not in table.column_names]:
        raise TraceError(f"{path} lacks {', '.join(missing)}; record again")
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


def _begin(folder: Path) -> float:
    """When a recording's second 0 was, on the wall clock."""
    try:
        begin = json.loads((folder / MANIFEST_FILE).read_text())["recording"]["begin"]
        return datetime.fromisoformat(begin).timestamp()
    except (OSError, ValueError, KeyError, TypeError):
        raise TraceError(f"{folder / MANIFEST_FILE} does not say when the recording began") from None
