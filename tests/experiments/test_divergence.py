"""Decisions of two runs, each under its own clock: how many are the same, and how the first other one differs."""

import numpy as np
import pytest

from kvarena.experiments.simulation.divergence import COUNTS, compare_decisions


def steps(hashes: list[int], **columns: list[int]) -> dict[str, np.ndarray]:
    counts = {name: np.zeros(len(hashes), dtype=int) for name, _ in COUNTS}
    given = {name: np.array(values) for name, values in columns.items()}
    return {"step": np.arange(len(hashes)), "decision_hash": np.array(hashes)} | counts | given


def test_equal_runs_have_no_first_difference():
    found = compare_decisions(steps([1, 2, 3]), steps([1, 2, 3]))
    assert (found.share, found.first) == (1.0, None)
    assert str(found) == "all 3 steps decide the same"


def test_the_first_other_step_is_told_by_what_differs():
    recorded = steps([1, 2, 3, 4], num_scheduled=[1, 2, 2, 2], num_waiting=[0, 0, 0, 0])
    simulated = steps([1, 9, 3, 8], num_scheduled=[1, 1, 2, 2], num_waiting=[0, 1, 0, 0])
    found = compare_decisions(recorded, simulated)
    assert (found.num_same, found.first, found.share) == (2, 1, 0.5)
    assert str(found).endswith(
        "step 1: 2 requests in the step recorded, 1 simulated; 0 requests waiting recorded, 1 simulated"
    )


@pytest.mark.parametrize(
    ("recorded", "simulated", "what", "share"),
    [
        ([1, 2], [1, 2, 3], "the recorded run ended before it, and the other had 3 steps", 1.0),
        ([1, 2, 3], [1, 2], "the simulated run ended before it, and the other had 3 steps", 2 / 3),
        ([1, 2], [1, 3], "as many requests and tokens, of other requests or in other slots", 0.5),
    ],
)
def test_runs_of_other_lengths_and_other_slots(recorded: list[int], simulated: list[int], what: str, share: float):
    found = compare_decisions(steps(recorded), steps(simulated))
    assert found.what == what
    assert found.share == pytest.approx(share)
