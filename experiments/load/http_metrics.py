"""What a server says of itself under load: its Prometheus gauges, read while the driver sends.

Names are vLLM's, which many servers use, with their older spellings, and SGLang's; of kvarena's own server the ledger
too. A reading is late rather than in the way: one at a time, with a timeout of its own.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from prometheus_client.parser import text_string_to_metric_families

from kvarena.engine.classes import CLASSES
from kvarena.experiments.load.connection import HttpClient
from kvarena.reports.reading.columns import schema_of
from kvarena.reports.reading.names import GAUGES_FILE

TIMEOUT = 5.0  # seconds
# Column -> names that servers give it; the first that is there counts.
NAMES: Mapping[str, tuple[str, ...]] = {
    "num_running": ("vllm:num_requests_running", "sglang:num_running_reqs"),
    "num_waiting": ("vllm:num_requests_waiting", "sglang:num_queue_reqs"),
    "kv_usage": ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc", "sglang:token_usage"),
    "num_preemptions": ("vllm:num_preemptions_total",),
    "prefix_queries": ("vllm:prefix_cache_queries_total", "vllm:gpu_prefix_cache_queries_total"),
    "prefix_hits": ("vllm:prefix_cache_hits_total", "vllm:gpu_prefix_cache_hits_total"),
}
SHARES = ("kv_usage",)  # of several engines behind one address these are averaged, the others added
SLOTS = "kvarena:kv_slots"


class GaugeReader:
    """Reads a server's gauges every `interval` seconds.

    Args:
        client: with the server's address and key.
        path: of the metrics, or a whole URL.
        interval: seconds between readings.

    Attributes:
        rows: one per reading: `time` in seconds since `start`, and the columns that the server has.
        num_failed: readings that brought nothing.
        error: of the first of these; empty without one.
    """

    def __init__(self, client: HttpClient, path: str, interval: float) -> None:
        self._client, self._path, self._interval = client, path, interval
        self.rows: list[dict[str, float]] = []
        self.num_failed = 0
        self.error = ""

    async def run(self) -> None:
        """Read until cancelled; the first time at once. Where that brings nothing, the server is not asked again."""
        origin = time.perf_counter()
        while True:
            now = time.perf_counter() - origin
            await self._read(now)
            if not self.rows:
                return
            await asyncio.sleep(max(0.0, now + self._interval - (time.perf_counter() - origin)))

    async def _read(self, now: float) -> None:
        try:
            async with asyncio.timeout(TIMEOUT):
                values = await ask_gauges(self._client, self._path)
        except Exception as error:  # whatever a page of gauges holds, the run's own requests are not lost for it
            self.num_failed += 1
            self.error = self.error or f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            return
        if values:
            self.rows.append({"time": now} | values)
        else:
            self.num_failed += 1
            self.error = self.error or "none of the names that are known here"

    def write(self, folder: Path) -> None:
        """gauges.parquet of a run folder; no file without a reading."""
        (folder / GAUGES_FILE).unlink(missing_ok=True)
        if self.rows:
            pq.write_table(pa.Table.from_pylist(self.rows, schema_of(GAUGES_FILE)), folder / GAUGES_FILE)


async def ask_gauges(client: HttpClient, path: str = "/metrics") -> dict[str, float]:
    """The known values that a server shows. Raises OSError, and ValueError when it shows no Prometheus text."""
    reply = await client.request("GET", path)
    if reply.status != 200:
        raise ConnectionError(f"status {reply.status}")
    return read_gauges(reply.body.decode())


def read_gauges(text: str) -> dict[str, float]:
    """The known values of a Prometheus text. Raises ValueError when it is no such text."""
    found: dict[str, list[float]] = {}
    slots: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(float(sample.value))
            if sample.name == SLOTS:
                slots[sample.labels["class"]] = float(sample.value)
    values: dict[str, float] = {}
    for column, names in NAMES.items():
        known = next((found[name] for name in names if name in found), None)
        if known is not None:
            values[column] = sum(known) / (len(known) if column in SHARES else 1)
    # An older server of ours has not every class.
    return values | ({name: slots.get(name, 0.0) for name in CLASSES} if slots else {})
