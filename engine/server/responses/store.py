"""Responses that may be asked for again: the latest ones, in a file that all fronts of a server share.

The file lies in a directory that the supervisor makes and removes; nothing of it outlives the server. SQLite sees to it
that fronts may read and write at once.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import orjson

logger = logging.getLogger("kvarena.front")

MAX_BYTES = 256 << 20  # of all responses with their conversations
_TABLE = """
    CREATE TABLE IF NOT EXISTS responses (
        number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE, key INTEGER, status TEXT, body BLOB, items BLOB,
        size INTEGER
    )
"""
_WAIT_SECONDS = 2.0  # for another front that writes


class Stored(NamedTuple):
    """A response.

    Attributes:
        body: as it is answered.
        items: the conversation that it answers.
    """

    body: dict[str, Any]
    items: list[dict[str, Any]]


class ResponseStore:
    """The latest responses. The oldest make room.

    Args:
        path: the file; fronts of one server give the same.
        size: most responses.
        max_bytes: most bytes of them together.
    """

    def __init__(self, path: Path, size: int, max_bytes: int = MAX_BYTES) -> None:
        self._size, self._max_bytes = size, max_bytes
        self._db = sqlite3.connect(path, timeout=_WAIT_SECONDS, isolation_level=None, check_same_thread=False)
        for pragma in ("journal_mode=WAL", "synchronous=OFF"):  # it need not outlive a crash of the machine
            self._db.execute(f"PRAGMA {pragma}")
        self._db.execute(_TABLE)

    def put(self, key: int, body: dict[str, Any], items: list[dict[str, Any]]) -> bool:
        """Keep a response, in place of one with its id; False (logged) when it cannot be kept.

        Args:
            key: the position of the API key that it belongs to, or -1.
            body: as it is answered; it has an `id` and a `status`.
            items: the conversation that it answers.
        """
        raw, rest = orjson.dumps(body), orjson.dumps(items)
        if len(raw) + len(rest) > self._max_bytes:
            logger.warning("response %s is larger than the store, and not kept", body["id"])
            return False
        row = (body["id"], key, body["status"], raw, rest, len(raw) + len(rest))
        try:
            with self._writing():
                self._db.execute("DELETE FROM responses WHERE id = ?", row[:1])
                self._db.execute(
                    "INSERT INTO responses (id, key, status, body, items, size) VALUES (?, ?, ?, ?, ?, ?)", row
                )
                self._make_room()
        except sqlite3.Error as error:
            logger.error("response %s is not kept: %s", body["id"], error)
            return False
        return True

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def _make_room(self) -> None:
        while True:
            count, total = self._db.execute("SELECT COUNT(*), COALESCE(SUM(size), 0) FROM responses").fetchone()
            if count <= self._size and total <= self._max_bytes:
                return
            self._db.execute("DELETE FROM responses WHERE number = (SELECT MIN(number) FROM responses)")

    def get(self, response_id: str, key: int) -> Stored | None:
        """A response of the same key's, or None."""
        row = self._db.execute(
            "SELECT body, items FROM responses WHERE id = ? AND key = ?", (response_id, key)
        ).fetchone()
        return None if row is None else Stored(orjson.loads(row[0]), orjson.loads(row[1]))

    def status(self, response_id: str) -> str | None:
        """The state of a response; None: it is gone."""
        row = self._db.execute("SELECT status FROM responses WHERE id = ?", (response_id,)).fetchone()
        return None if row is None else row[0]

    def ask_to_end(self, response_id: str) -> None:
        """Let whoever makes a response know that it is not wanted any more."""
        with self._writing():
            self._db.execute(
                "UPDATE responses SET status = 'ending' WHERE id = ? AND status IN ('queued', 'in_progress')",
                (response_id,),
            )

    def delete(self, response_id: str, key: int) -> bool:
        """Forget a response; False when there is none."""
        with self._writing():
            found = self._db.execute("DELETE FROM responses WHERE id = ? AND key = ?", (response_id, key))
        return found.rowcount > 0

    def close(self) -> None:
        """Let go of the file."""
        self._db.close()
