"""Whether a step is planned while the one before runs: by default on a GPU, and told wherever a run is."""

import json
from pathlib import Path

import pytest

from kvarena.engine.errors import ConfigError
from kvarena.experiments.building.parts import overlaps
from kvarena.experiments.jobs.job import execute
from kvarena.experiments.settings.compose import compose_cell, load_run
from kvarena.experiments.simulation.recorded import RecordedRun
from kvarena.reports.comparing.cells import Cell
from kvarena.reports.comparing.differences import _machinery
from kvarena.reports.pages.run_sections import facts

SIMULATED = ("runner=simulated", "model=llama-3.1-8b-shape", "engine.dtype=bfloat16", "kv_cache.num_slots=32768",
             "workload=fixed", "workload.num_requests=2", "workload.prompt_len=8", "workload.output_len=4")  # fmt: skip
QUIET = ("report.progress=false", "report.pages=false", "report.kv_map=false", "driver.probe=false")


def run(folder: Path, *args: str) -> tuple[dict, dict]:
    """The manifest and the summary of a run."""
    folder.mkdir()
    summary = execute(*_two(compose_cell([*args, *QUIET]), folder))
    return json.loads((folder / "manifest.json").read_text()), summary


def _two(composed, folder):
    config, choices = composed
    return config, folder, "cell", choices


def test_auto_means_a_gpu():
    auto, on, off = (load_run([f"engine.overlap={value}"]).engine for value in ("auto", "true", "false"))
    assert load_run([]).engine == auto
    assert [overlaps(auto, auto=on_gpu) for on_gpu in (True, False)] == [True, False]
    assert overlaps(on, auto=False) and not overlaps(off, auto=True)
    with pytest.raises(ConfigError, match=r"engine\.overlap=maybe must be auto, true or false"):
        load_run(["engine.overlap=maybe"])


@pytest.mark.parametrize(
    ("profile", "overlap"), [("h200-llama-3.1-8b-overlap", True), ("h200", False), ("h200-tables", False)]
)
def test_a_simulation_has_the_loop_that_its_profile_was_measured_with(tmp_path, profile, overlap):
    manifest, summary = run(tmp_path / "run", *SIMULATED, f"runner.profile={profile}")
    assert manifest["config"]["engine"]["overlap"] == "auto"
    assert manifest["engine"] == summary["engine"] == {"overlap": overlap, "step_times": None}
    assert RecordedRun.read(tmp_path / "run").overlap is overlap
    told = dict(facts(summary))["Step loop"]
    assert told.startswith("with overlap" if overlap else "without overlap")


def test_older_manifests_say_it_among_their_settings(tmp_path):
    run(tmp_path / "run", *SIMULATED, "runner.profile=h200", "engine.overlap=true")
    path = tmp_path / "run" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["engine"]
    path.write_text(json.dumps(manifest))
    assert RecordedRun.read(tmp_path / "run").overlap is True
    manifest["config"]["engine"]["overlap"] = "auto"
    path.write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match="does not say whether steps overlapped"):
        _ = RecordedRun.read(tmp_path / "run").overlap


def test_a_comparison_tells_cells_of_two_loops_apart(tmp_path):
    manifests = [run(tmp_path / name, *SIMULATED, "runner.profile=h200", f"engine.overlap={value}")[0]
                 for name, value in (("a", "true"), ("b", "false"))]  # fmt: skip

    class Alone(Cell):
        def __init__(self, label, manifest):
            self.__dict__.update(label=label, settings={})
            self.__dict__["run"] = type("Run", (), {"manifest": manifest})

        is_simulated = True

    cells = [Alone(label, manifest) for label, manifest in zip("ab", manifests, strict=True)]
    assert ("The step loop", "with overlap (a), without overlap (b)") in _machinery(cells)
    assert dict(_machinery([cells[0], cells[0]]))["The step loop"] == ""
