"""The scores of the best candidates of every sampled token, as scores.parquet (`driver.scores`). Schema: docs/files.md.

Two runs that differ in a token can then be judged: by rounding, or by an error (reports/comparing/tokens.py).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from kvarena.engine.core import StepOutput
from kvarena.engine.request import Request
from kvarena.reports.reading.columns import schema_of
from kvarena.reports.reading.names import SCORES_FILE


class ScoreLog:
    """Collects the scores of every step of a run whose runner keeps them."""

    def __init__(self) -> None:
        self._token_ids: dict[Request, list[np.ndarray]] = {}
        self._values: dict[Request, list[np.ndarray]] = {}

    def on_step(self, step: StepOutput) -> None:
        """Take one finished step in; call after the scheduler knows its tokens."""
        scores = step.result.scores
        if scores is None:
            return
        sampled = (entry.req for entry, sample in zip(step.plan.scheduled, step.plan.samples, strict=True) if sample)
        for req, token_ids, values in zip(sampled, scores.token_ids, scores.values, strict=True):
            kept = self._token_ids.setdefault(req, [])
            if len(kept) < len(req.output_token_ids):  # with overlap one past the end was dropped
                kept.append(token_ids)
                self._values.setdefault(req, []).append(values)

    def write(self, path: Path) -> None:
        """Write scores.parquet: a row per request that sampled."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        requests = [req for req, kept in self._token_ids.items() if kept]
        columns = {
            "request_id": [req.request_id for req in requests],
            "num_candidates": [len(self._token_ids[req][0]) for req in requests],
            "token_ids": [np.concatenate(self._token_ids[req]) for req in requests],
            "values": [np.concatenate(self._values[req]) for req in requests],
        }
        pq.write_table(pa.table(columns, schema_of(SCORES_FILE)), path)
