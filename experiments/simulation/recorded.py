"""A recorded run as something to run again: its requests, its strategy, its steps."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kvarena.engine.contract import StepTimes
from kvarena.engine.errors import ConfigError
from kvarena.engine.request import Request, SamplingParams
from kvarena.experiments.settings.strategies import Strategy
from kvarena.experiments.settings.targets import Part
from kvarena.reports.reading.errors import ReportError
from kvarena.reports.reading.files import read_json
from kvarena.reports.reading.names import MANIFEST_FILE, REQUESTS_FILE, ROUTING_FILE, STEPS_FILE
from kvarena.reports.reading.shapes import MANIFEST, MAYBE_INTEGER

# What a replay reads of the manifest, beside what a report does.
SHAPE = MANIFEST | {
    "model": {"name": str, "max_model_len": MAYBE_INTEGER, "kv_bytes_per_token": int},
    "pool": {"num_blocks": int},
    "config": {
        "engine": {"max_model_len": MAYBE_INTEGER},
        "allocator": dict,
        "scheduler": dict,
    },
}
NEEDED_STEPS = (
    "launched_time",
    "num_kv_tokens",
    "num_attention_pairs",
    "num_prefill_requests",
    "longest_prefill",
    "decision_hash",
)


@dataclass(frozen=True)
class RecordedRun:
    """The files of a run, read when asked for.

    Attributes:
        path: the run folder.
        manifest: manifest.json.
    """

    path: Path
    manifest: dict[str, Any]

    @classmethod
    def read(cls, path: str | Path) -> RecordedRun:
        """The run in a folder.

        Raises:
            ConfigError: not a run folder, or one without the columns that a replay needs.
        """
        folder = Path(path)
        try:
            manifest = read_json(folder / MANIFEST_FILE, SHAPE)
            missing = [name for name in NEEDED_STEPS if name not in pq.read_schema(folder / STEPS_FILE).names]
        except (ReportError, OSError, pa.ArrowException) as error:
            raise ConfigError(f"{folder} is not a run folder: {error}") from error
        if missing:
            raise ConfigError(f"{folder / STEPS_FILE} lacks {', '.join(missing)}; record the run again")
        return cls(folder, manifest)

    @property
    def name(self) -> str:
        """How reports call it: model, strategy and folder."""
        return f"{self.manifest['model']['name']}, {self.manifest['name']}, {self.path.name}"

    @property
    def overlap(self) -> bool:
        """Whether steps were planned while others ran. Older manifests have it among their settings alone."""
        found = (self.manifest.get("engine") or self.manifest["config"]["engine"]).get("overlap")
        if not isinstance(found, bool):
            raise ConfigError(
                f"{self.path / MANIFEST_FILE} does not say whether steps overlapped; record the run again"
            )
        return found

    @cached_property
    def steps(self) -> dict[str, np.ndarray]:
        """The columns of steps.parquet."""
        table = pq.read_table(self.path / STEPS_FILE)
        return {name: table.column(name).to_numpy() for name in table.column_names}

    @cached_property
    def requests(self) -> list[dict[str, Any]]:
        """The rows of requests.parquet, in order of submission."""
        rows: list[dict[str, Any]] = pq.read_table(self.path / REQUESTS_FILE).to_pylist()
        return rows

    @cached_property
    def routes(self) -> tuple[list[int], list[float]]:
        """Of a run behind a router: the replica of each request, and when it was sent there, in seconds.

        Raises:
            ConfigError: it ran on one engine.
        """
        if not self.manifest.get("replicas"):
            raise ConfigError(f"{self.path} ran on one engine, and nothing was routed; record a run with router=NAME")
        table = pq.read_table(self.path / ROUTING_FILE)
        return table.column("replica").to_pylist(), table.column("time").to_pylist()

    def of_replica(self, number: int) -> RecordedRun:
        """What one replica ran, as a run of its own: its steps, and its requests in the order in which it had them."""
        one = RecordedRun(self.path, self.manifest)
        mine = self.steps["replica"] == number
        rows = [row for row, replica in zip(self.requests, self.routes[0], strict=True) if replica == number]
        vars(one)["steps"] = {name: column[mine] for name, column in self.steps.items()}
        vars(one)["requests"] = rows
        return one

    def strategy(self) -> Strategy:
        """The strategy as it was configured, over an empty pool of the same size.

        Raises:
            ConfigError: the manifest does not name their classes.
        """
        config = self.manifest["config"]
        for section in ("allocator", "scheduler"):
            if "_target_" not in config[section]:
                raise ConfigError(f"{self.path / MANIFEST_FILE}: config.{section} names no class; record the run again")
        max_model_len = config["engine"]["max_model_len"] or self.manifest["model"]["max_model_len"]
        level = {}
        if (host_blocks := self.manifest["pool"].get("host_blocks")) is not None:
            level = {"host_blocks": host_blocks, "load": config["kv_cache"]["load"]}
        strategy = Strategy.of(
            Part("allocator", config["allocator"]),
            Part("scheduler", config["scheduler"]),
            num_blocks=self.manifest["pool"]["num_blocks"],
            max_model_len=max_model_len,
            kv_bytes_per_token=self.manifest["model"]["kv_bytes_per_token"],
            **level,
        )
        # What the recorded scheduler knew of steps: it then decides alike.
        if (times := (self.manifest.get("engine") or {}).get("step_times")) is not None:
            strategy.scheduler.set_step_times(StepTimes.of(times))
        return strategy

    def make_requests(self, *, as_long_as_recorded: bool = False) -> list[Request]:
        """Fresh requests, in order of submission: the same prompts, limits and arrivals.

        A recording without tokens (`driver.record=summary`) has prompts of the same lengths: enough for every strategy
        but prefix caches.

        Args:
            as_long_as_recorded: for a run whose samples are not the recorded tokens: a request that a stop token
                ended may have as many tokens as it had. Otherwise it gets that token, and no other, as stop token.

        Raises:
            ConfigError: a stop token ended a request, and it was not recorded; or the requests were beams.
        """
        if self.manifest["config"].get("sampling", {}).get("beams"):
            raise ConfigError(
                f"{self.path} is a run of beams, and which beam became which is not recorded; run it again "
                "(run.py runner=simulated sampling.beams=...)"
            )
        return [self._request(row, as_long_as_recorded) for row in self.requests]

    def _request(self, row: dict[str, Any], as_long_as_recorded: bool) -> Request:
        stopped, outputs = row["finish_reason"] == "stop", row["output_token_ids"]
        if stopped and outputs is None and not as_long_as_recorded:
            raise ConfigError(f"{self.path / REQUESTS_FILE} has no tokens, and a stop token ended {row['request_id']}")
        prompt = row["prompt_token_ids"]
        return Request(
            request_id=row["request_id"],
            prompt_token_ids=[0] * row["num_prompt_tokens"] if prompt is None else prompt,
            sampling=SamplingParams(
                max_tokens=row["num_output_tokens"] if stopped and as_long_as_recorded else row["max_tokens"],
                stop_token_ids=(outputs[-1],) if stopped and not as_long_as_recorded else (),
            ),
            arrival_time=row["arrival_time"],
            priority=row["priority"],
            client_id=row["client_id"],
            kind=row.get("kind") or "",
            oracle_output_len=row["max_tokens"],
        )
