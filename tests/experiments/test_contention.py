"""What else the machine did beside a run, and what the report says of it."""

import multiprocessing
import time

import pytest

from kvarena.experiments.recording.contention import Contention, run_probe
from kvarena.reports.comparing.contention import run_had_company
from kvarena.reports.reading.shapes import CONTENTION, mismatch


def test_a_process_that_waits_has_no_share_and_one_that_works_has_one():
    waits, works = Contention(probe=False, cuda=False), Contention(probe=False, cuda=False)
    for one in (waits, works):
        one.before()
    with waits:
        time.sleep(0.3)
    with works:
        until = time.process_time() + 0.3
        while time.process_time() < until:
            pass
    idle, busy = waits.after(), works.after()
    assert idle["processor_share"] < busy["processor_share"]
    assert idle["probe"] is None
    assert mismatch(idle, CONTENTION) is None
    assert len(idle["load_average"]) == 2


@pytest.mark.probed
def test_the_probe_is_run_before_and_after(monkeypatch):
    for name in ("WARM_SECONDS", "SLICE_SECONDS"):
        monkeypatch.setattr(f"kvarena.experiments.recording.contention.{name}", 0.01)
    contention = Contention(probe=True, cuda=False)
    contention.before()
    with contention:
        pass
    found = contention.after()
    assert found["probe"]["before"] != found["probe"]["after"] > 0
    assert found["probe"]["before"] > 0
    assert mismatch(found, CONTENTION) is None


def _spin():
    while True:
        pass


@pytest.mark.slow
def test_the_probe_sees_a_machine_that_is_busy():
    quiet = max(run_probe(cuda=False).speed for _ in range(3))
    workers = [multiprocessing.get_context("spawn").Process(target=_spin, daemon=True) for _ in range(8)]
    for worker in workers:
        worker.start()
    time.sleep(2)
    try:
        assert run_probe(cuda=False).speed < 0.8 * quiet
    finally:
        for worker in workers:
            worker.terminate()
            worker.join()


def summary(**contention):
    found = {"processor_share": 1.9, "steal_share": 0.0, "load_average": [0, 0], "gpu_clock_mhz": None, "probe": None}
    return {"busy_share": 0.997, "machine": {"gpu": None}, "target": None, "contention": found | contention}


def test_a_run_with_a_fifth_of_a_processor_says_so():
    """It said "busy 99.7 %" and no word of the others."""
    [sentence] = run_had_company(summary(processor_share=0.2))
    assert "the process had 20.0 % of a processor while its engine was busy 99.7 % of the time" in sentence


def test_stolen_time_and_a_machine_that_changed_are_said():
    [sentence] = run_had_company(summary(steal_share=0.3, probe={"before": 1000.0, "after": 700.0}))
    assert "the hypervisor took 30.0 % of all processors' time" in sentence
    assert "a fixed piece of work ran at 70.0 % of the speed that it had before the run" in sentence


def test_a_change_within_the_probes_own_noise_is_not_said():
    """Two ordinary runs of a second on an H200 had 16 % between the probes, and each said that it had company."""
    assert run_had_company(summary(probe={"before": 1000.0, "after": 840.0})) == []
    wide = {"before": 1000.0, "after": 700.0, "spread": 0.1}
    assert run_had_company(summary(probe=wide)) == []
    [sentence] = run_had_company(summary(probe=wide | {"spread": 0.06}))
    assert "up to 24.0 % more or less is noise" in sentence


def test_one_interrupted_slice_does_not_move_the_probe(monkeypatch):
    rates = iter([1.0, *[1000.0] * 4, 200.0, *[1000.0] * 5])  # the first is the warm-up's
    monkeypatch.setattr("kvarena.experiments.recording.contention._rate", lambda *_: next(rates))
    assert run_probe(cuda=False) == (1000.0, 0.0)


def test_a_quiet_machine_and_a_simulated_run_are_not_mentioned():
    assert run_had_company(summary(probe={"before": 1000.0, "after": 960.0})) == []
    assert run_had_company(summary() | {"contention": None}) == []
    # A GPU computes while its process waits.
    assert run_had_company(summary(processor_share=0.2) | {"machine": {"gpu": {"count": 1}}}) == []
