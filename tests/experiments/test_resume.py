"""A sweep that was cut off goes on where it stopped, and ends in the report of an unbroken one."""

import json
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import warm
from waiting import PATIENCE, wait_for

from kvarena.engine.errors import ConfigError
from kvarena.experiments.entry import main
from kvarena.experiments.folders.cell_state import cell_key, finished_key, mark_finished
from kvarena.experiments.folders.lock import only_writer
from kvarena.experiments.jobs.job import execute
from kvarena.experiments.settings.compose import compose_cell
from kvarena.reports.reading.errors import NotWritten, ReportError

ROOT = Path(__file__).resolve().parents[2]
CHOICES = {"allocator": "paged", "scheduler": "continuous", "workload": "fixed", "arrival": "all_at_once"}
WAITS = "another process is writing it; waiting until it is done"
SWEEP = [
    "-m", "allocator=contiguous,paged", "scheduler=static,continuous", "runner=simulated", "runner.profile=h100",
    "engine.dtype=bfloat16", "workload=uniform", "workload.num_requests=60", "kv_cache.num_slots=6000",
    "report.progress=false", "report.pages=false",
]  # fmt: skip


def start(out: Path, errors: Path):
    return warm.start([str(ROOT / "run.py"), *SWEEP, f"hydra.sweep.dir={out}"], ROOT, errors, errors)


@pytest.fixture
def finish(monkeypatch, capfd):
    """Runs the sweep to its end, in this process."""

    def call(out: Path) -> str:
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
        monkeypatch.setattr(sys, "argv", [str(ROOT / "run.py"), *SWEEP, f"hydra.sweep.dir={out}"])
        code = main()
        errors = capfd.readouterr().err
        assert code == 0, errors
        return errors

    return call


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The sweep's folder, unbroken."""
    folder = tmp_path_factory.mktemp("unbroken") / "whole"
    process = start(folder, errors := folder.with_name("errors"))
    assert process.wait(PATIENCE) == 0, errors.read_text()
    return folder


def said_in(file: Path) -> str:
    """What a process wrote, which may not have begun."""
    return file.read_text() if file.exists() else ""


def cells_of(sweep: Path) -> list[str]:
    """Folders of its cells, in the order in which they ended."""
    return [file.parent.name for file in sorted(sweep.glob("*/cell.json"), key=lambda file: file.stat().st_mtime_ns)]


MEASURED = ("peak_rss_bytes", "processor_seconds", "recording")


def findings(out: Path) -> dict:
    """summary.json without what the machine's memory and its clocks say."""
    text = (out / "summary.json").read_text().replace(str(out), "DIR")
    return json.loads(text, object_hook=lambda node: {k: v for k, v in node.items() if k not in MEASURED})


def test_a_killed_sweep_resumes_and_ends_in_the_same_report(finish, whole, tmp_path):
    broken = tmp_path / "broken"
    third = broken / cells_of(whole)[2]
    third.mkdir(parents=True)
    with only_writer(third):  # it comes as far as that cell, however fast it is
        process = start(broken, tmp_path / "errors")
        wait_for(lambda: f"{third}: {WAITS}" in said_in(tmp_path / "errors"), "it does not come to its third cell")
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = sorted(path.parent.name for path in broken.glob("*/cell.json"))
    assert len(done) == 2
    times = {name: (broken / name / "requests.parquet").stat().st_mtime_ns for name in done}
    errors = finish(broken)
    assert errors.count("finished before") == len(done)
    assert times == {name: (broken / name / "requests.parquet").stat().st_mtime_ns for name in done}
    assert findings(broken) == findings(whole)
    assert findings(whole)["same_tokens"]["line"] == "Tokens were not compared: simulated runs compute none."
    page = (broken / "report.md").read_text()  # its command names the folder
    assert page.replace(str(broken), str(whole)) == (whole / "report.md").read_text()


@pytest.mark.slow  # that a cell has one writer: test_the_lock_ends_with_its_process
def test_two_processes_at_one_sweep_share_its_cells(whole, tmp_path):
    """Both ran every cell and wrote the same files at the same time."""
    read = lambda: [said_in(tmp_path / f"errors{number}") for number in (0, 1)]  # noqa: E731
    first = tmp_path / cells_of(whole)[0]
    first.mkdir()
    with only_writer(first):  # until both have come to it
        processes = [start(tmp_path, tmp_path / f"errors{number}") for number in (0, 1)]
        wait_for(lambda: all(f"{first}: {WAITS}" in errors for errors in read()), "they do not come to one cell")
    codes = [process.wait(240) for process in processes]
    errors = read()
    assert codes == [0, 0], errors
    assert "".join(errors).count("finished before") == 4
    assert len(json.loads((tmp_path / "sweep.json").read_text())["runs"]) == 4
    assert len(list(tmp_path.glob("*/cell.json"))) == 4


def test_the_lock_ends_with_its_process(tmp_path, capfd):
    hold = (
        "import sys, time; from pathlib import Path; from kvarena.experiments.folders.lock import only_writer\n"
        "with only_writer(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    )
    holder = subprocess.Popen([sys.executable, "-c", hold, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    entered = threading.Event()

    def enter():
        with only_writer(tmp_path):
            entered.set()

    thread = threading.Thread(target=enter)
    thread.start()
    assert not entered.wait(0.3)
    holder.kill()
    holder.communicate()
    thread.join(120)
    assert entered.is_set()
    assert capfd.readouterr().err == f"{tmp_path}: {WAITS}\n"


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / ".lock").mkdir()
    line = r"cannot write .* \(Is a directory\); choose another folder"
    with pytest.raises(NotWritten, match=line), only_writer(tmp_path):
        pass


@pytest.fixture(scope="module")
def cell():
    return compose_cell(["workload=fixed"])


def test_a_folder_is_finished_only_with_its_last_file(cell, tmp_path):
    key = cell_key(*cell)
    (tmp_path / "summary.json").write_text("{}")
    (tmp_path / "error.json").write_text("{}")
    assert finished_key(tmp_path, key, allow_mixed=False) is None
    mark_finished(tmp_path, key)
    assert not (tmp_path / "error.json").exists()
    assert finished_key(tmp_path, key, allow_mixed=False) == key
    assert [path.name for path in tmp_path.glob("cell*")] == ["cell.json"]


def test_other_results_are_not_mixed_in(cell, tmp_path):
    key = cell_key(*cell)
    mark_finished(tmp_path, key)
    with pytest.raises(ConfigError, match="another config"):
        finished_key(tmp_path, cell_key(*compose_cell(["workload=fixed", "workload.seed=1"])), allow_mixed=True)
    newer = key | {"code": "another commit"}
    with pytest.raises(ConfigError, match=r"other code; give a folder .* or set sweep.allow_mixed=true"):
        finished_key(tmp_path, newer, allow_mixed=False)
    assert finished_key(tmp_path, newer, allow_mixed=True) == key
    shutil.rmtree(tmp_path)
    # What is printed is no result.
    assert cell_key(*compose_cell(["workload=fixed", "report.progress=false"])) == key


@pytest.mark.parametrize(
    "text", ["", '{"config": ', "[]", "null", '{"config": "x"}', '{"config": 1, "code": 2, "machine": 3}']
)
def test_a_broken_cell_json_is_one_line(text, cell, tmp_path):
    (tmp_path / "cell.json").write_text(text)
    with pytest.raises(ReportError, match=f"cell.json.*; remove {tmp_path} to measure it again") as caught:
        finished_key(tmp_path, cell_key(*cell), allow_mixed=False)
    assert "\n" not in str(caught.value)


def test_a_finished_cell_gets_its_pages_when_they_are_asked_for(tmp_path):
    options = ["runner=simulated", "runner.profile=h100", "engine.dtype=bfloat16", "workload=fixed",
               "workload.num_requests=3", "report.progress=false"]  # fmt: skip
    plain = execute(compose_cell([*options, "report.pages=false"])[0], tmp_path, "cell", CHOICES)
    assert not (tmp_path / "report.html").exists()
    assert execute(compose_cell(options)[0], tmp_path, "cell", CHOICES) == plain
    assert (tmp_path / "report.html").exists()
