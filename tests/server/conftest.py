"""One server for all tests of this folder, and one whose engine computes nothing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from server_harness import STUB, RunningServer

# 2048 slots: one request may take at most 512 of them, and a dozen fill the pool.
FLAGS = ("--max-model-len", "512", "--num-gpu-blocks-override", "128", "--max-num-queued-requests", "300")


@pytest.fixture(scope="session")
def server() -> Iterator[RunningServer]:
    running = RunningServer(*FLAGS)
    yield running
    _end(running)


@pytest.fixture(scope="session")
def stub() -> Iterator[RunningServer]:
    """Its steps can be held (`RunningServer.held`). The same pool."""
    running = RunningServer(
        "--step-time", "0.01", "--num-blocks", "128", "--set", "max_num_queued_requests=300", module=STUB
    )
    yield running
    _end(running)


def _end(running: RunningServer) -> None:
    # After all that the tests did to it: it answers, nobody owns a slot, and the pool adds up.
    running.assert_alive()
    slots = running.slots()
    assert slots["token_states"] + slots["reservation"] + slots["internal"] == 0 < sum(slots.values())
    assert running.metrics()["kvarena:ledger_violations_total"] == 0
    assert running.stop() == 0
