"""The live map over every kind of allocator."""

from __future__ import annotations

import pytest

from kvarena.engine.request import SamplingParams
from kvarena.engine.server.engine.pool_view import CACHED, EXTERNAL, FREE, FULL, MAX_CELLS, PoolView
from kvarena.engine.server.engine.served import ServedRequest
from kvarena.engine.server.shared.ipc import unpack_ids
from kvarena.experiments.settings.strategies import build_allocator, build_scheduler, strategy_names


def _request(number: int, prompt: int = 40) -> ServedRequest:
    sampling = SamplingParams(max_tokens=8)
    return ServedRequest(
        f"r{number}", list(range(10, 10 + prompt)), sampling, arrival_time=float(number), front=0, handle=number
    )


@pytest.mark.parametrize("name", strategy_names("allocator"))
@pytest.mark.parametrize("num_blocks", [64, 3 * MAX_CELLS])
def test_a_map_of_every_allocator(name, num_blocks):
    """Ids of a pool of virtual regions lie beyond the number of blocks that memory has room for."""
    allocator = build_allocator(name, num_blocks=num_blocks, max_model_len=64)
    scheduler = build_scheduler("continuous", allocator, max_model_len=64, max_num_seqs=4)
    view, requests = PoolView(allocator), [_request(i) for i in range(3)]
    for req in requests:
        scheduler.add(req)
    plan = scheduler.schedule(0.0)
    scheduler.update(plan, [7 if sampled else None for sampled in plan.samples])
    usage = allocator.usage(None)
    frame = view.snapshot(view.classes(usage, requests, []), scheduler, requests)
    cells, filled = unpack_ids(frame["cells"]), frame["filled"]
    assert len(cells) == len(filled) == -(-allocator.num_virtual_blocks // frame["stride"])
    owners = {owner for owner in cells if owner > 0}
    running = {row[0] for row in frame["requests"] if row[5]}
    assert running and owners <= running
    assert all(filled[i] == 0 for i, owner in enumerate(cells) if owner in (FREE, EXTERNAL))
    if frame["stride"] == 1:
        assert owners or -3 in cells
        assert any(0 < fill <= FULL for fill in filled)
    for req in requests:
        scheduler.abort(req.request_id)
    frame = view.snapshot(view.classes(allocator.usage(None), [], []), scheduler, [])
    cells = unpack_ids(frame["cells"])
    assert set(cells) <= {FREE, CACHED}
    if frame["stride"] == 1:
        assert cells.count(CACHED) == len(list(allocator.cached_blocks()))
        assert (name in ("paged_prefix", "radix")) == (CACHED in cells)
