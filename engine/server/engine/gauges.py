"""The engine's gauges in the metrics page, and the dashboard's frames, a few times a second."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

from kvarena.engine.classes import CLASSES
from kvarena.engine.core import Engine
from kvarena.engine.ledger import StepCheck
from kvarena.engine.server.engine.pool_view import PoolView
from kvarena.engine.server.engine.served import Outgoing, ServedRequest
from kvarena.engine.server.shared.ipc import Link, ToFront
from kvarena.engine.server.shared.metrics import Row

if TYPE_CHECKING:  # of a model that reads text nothing of it is imported
    from kvarena.engine.vision.encoder import ImageCounts

GAUGE_SECONDS = 0.25
FRAME_SECONDS = 0.05  # while somebody watches: short answers, too, are seen to grow
FRAME_SHARE = 0.02  # of the engine's time that frames may take


class Gauges:
    """Writes what holds now: queue, batch and pool.

    Args:
        engine: looked at between steps.
        row: the engine's metrics.
        image_counts: what the encoder of images has done; None: the model reads text only.
        check: what an idle engine's counts must be; None: nobody looks.
    """

    def __init__(
        self,
        engine: Engine,
        row: Row,
        image_counts: Callable[[], ImageCounts] | None = None,
        check: StepCheck | None = None,
    ) -> None:
        self._check = check
        self._engine, self._row, self._image_counts = engine, row, image_counts
        self._view = PoolView(engine.allocator)
        self._next = 0.0

    def update(
        self, links: Sequence[Link], outs: Sequence[Outgoing], requests: Collection[ServedRequest], has_steps: bool
    ) -> None:
        """Write the gauges when it is time, or nothing is to be stepped; send a frame to who watches the pool."""
        now = time.monotonic()
        if now < self._next and has_steps:
            return
        self._next = now + GAUGE_SECONDS
        scheduler, row = self._engine.scheduler, self._row
        row.set("vllm:num_requests_running", scheduler.num_running)
        row.set("vllm:num_requests_waiting", scheduler.num_waiting)
        row.set("vllm:num_requests_waiting_by_reason", scheduler.num_waiting, "capacity")
        usage = self._engine.allocator.usage(scheduler.queue_head())
        if self._check is not None and not (requests or self._engine.has_work or self._engine.allocator.is_moving):
            self._check.check_idle(usage)
        classes = self._view.classes(usage, requests, scheduler.held)
        row.set_all("kvarena:kv_slots", [classes[name] for name in CLASSES])
        row.set("kvarena:kv_slots_shared_saved", usage.shared_saved)
        for level in self._engine.allocator.levels:
            row.set_all("kvarena:kv_level_blocks", level[1:])
        row.set("vllm:kv_cache_usage_perc", usage.owned / usage.total if usage.total else 0.0)
        if self._image_counts is not None:
            for name, count in self._image_counts()._asdict().items():
                row.set(f"kvarena:image_cache_{name}", count)
        # A front that is behind misses a frame.
        watchers = [link for link, out in zip(links, outs, strict=True) if out.watching and not link.num_queued_bytes]
        if not watchers:
            return
        frame = self._view.snapshot(classes, scheduler, requests)
        frame |= {"time": now, "shared_saved": usage.shared_saved}
        for link in watchers:
            link.send([ToFront.POOL_MAP, frame])
        end = time.monotonic()
        self._next = end + max(FRAME_SECONDS, (end - now) / FRAME_SHARE)
