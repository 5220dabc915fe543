"""`kvarena.run` and `kvarena.sweep`: from Python what run.py does, with strategies of the caller's own."""

import functools
import json
import logging
import sys

import numpy as np
import pytest
from hydra.core.global_hydra import GlobalHydra
from strategies import Broken, OwnAllocator, OwnScheduler, Strict, made_by_a_function

import kvarena
from kvarena.experiments.jobs.unserved import Unserved
from kvarena.settings import as_overrides


def test_a_run_leaves_the_process_alone_and_goes_where_run_py_goes(simulated, capfd, tmp_path):
    before = (list(logging.root.handlers), list(sys.argv), GlobalHydra.instance().is_initialized())
    result = kvarena.run("paged", OwnScheduler, **simulated)
    assert result.name == "paged x OwnScheduler"
    assert (list(logging.root.handlers), list(sys.argv), GlobalHydra.instance().is_initialized()) == before
    assert capfd.readouterr() == ("", "")
    assert result.folder.parts[0] == "outputs"
    assert (tmp_path / result.folder / "cell.json").exists()
    again = kvarena.run("paged", OwnScheduler, **simulated)
    assert again.folder != result.folder and again.requests.equals(result.requests)


@pytest.mark.parametrize(
    ("settings", "overrides"),
    [
        ({"workload": {"num_requests": 8}}, ["workload.num_requests=8"]),
        ({"workload.num_requests": np.int64(8)}, ["workload.num_requests=8"]),
        ({"workload": "lognormal", "slo": {"ttft": 1e-3}}, ["workload=lognormal", "slo.ttft=0.001"]),
        ({"engine": {"overlap": True, "max_model_len": None}}, ["engine.overlap=true", "engine.max_model_len=null"]),
        ({"workload.path": "/a b/it's,[1]", "name": "null"}, [r"workload.path='/a b/it\'s,[1]'", "name='null'"]),
        ({"model.shape": {"model_type": "llama", "x": [1, 2]}}, ["model.shape={model_type:llama,x:[1,2]}"]),
    ],
)
def test_settings_are_overrides_of_the_command_line(settings, overrides):
    assert as_overrides(settings) == overrides


def test_a_list_is_a_value_of_a_run_and_the_values_of_a_sweep():
    assert as_overrides({"a.b": [1, 2]}) == ["a.b=[1,2]"]
    assert as_overrides({"a.b": [1, 2]}, swept=True) == ["a.b=1,2"]
    assert as_overrides({"a.b": [[1, 2]]}, swept=True) == ["a.b=[1,2]"]


def test_a_class_of_the_caller_is_named_by_itself_and_has_its_options(comparison):
    own = comparison[2]
    assert list(comparison.runs["allocator"]) == ["paged", "paged", "OwnAllocator", "OwnAllocator"]
    assert "OwnAllocator × continuous" in (comparison.folder / "report.md").read_text()
    assert own.folder.name.startswith("OwnAllocator-continuous-seed0-")
    assert own.manifest["config"]["allocator"] | {"greed": 2, "block_size": 16} == own.manifest["config"]["allocator"]
    # It decides what its base decides, and the manifest knows the code of both.
    assert own.steps["decision_hash"].equals(comparison[0].steps["decision_hash"])
    sources = own.manifest["sources"]["strategy"]
    assert {"strategies.OwnAllocator", "allocators/paged.py"} <= sources.keys()


def test_options_of_a_class_are_settings(simulated):
    result = kvarena.run(OwnAllocator, **simulated | {"allocator.greed": 3, "allocator.block_size": 8})
    assert result.manifest["strategy"]["details"]["greed"] == 3 and result.manifest["pool"]["block_size"] == 8
    made = kvarena.run(functools.partial(OwnAllocator, greed=5), **simulated)
    assert made.name == "OwnAllocator x continuous" and made.manifest["strategy"]["details"]["greed"] == 5
    assert kvarena.run(made_by_a_function, **simulated).name == "made_by_a_function x continuous"


def typed(num_blocks: int):
    """A class as a notebook or a prompt has it: no file holds it."""
    scope = {"__name__": "__main__"}
    text = "from strategies import OwnAllocator\nclass Typed(OwnAllocator):\n    def allocate(self, *a, **k):\n"
    exec(f"{text}        return self.num_free_blocks > {num_blocks} and super(Typed, self).allocate(*a, **k)\n", scope)
    return scope["Typed"]


def test_a_class_that_is_defined_again_is_the_same_code_if_its_words_are(simulated, tmp_path):
    folder = tmp_path / "kept"
    first = kvarena.run(typed(1), folder=folder, **simulated)
    finished = (folder / "cell.json").stat().st_mtime_ns
    again = kvarena.run(typed(1), folder=folder, **simulated)
    assert first.name == again.name == "Typed x continuous"
    with pytest.raises(kvarena.KvarenaError, match="measured with other code"):
        kvarena.run(typed(2), folder=folder, **simulated)
    assert (folder / "cell.json").stat().st_mtime_ns == finished


def test_seeds_of_a_notebooks_class_are_repeats(simulated):
    found = kvarena.sweep(["paged", typed(1)], **simulated | {"workload.seed": [0, 1]})
    assert list(found.cells["label"]) == ["paged × continuous", "Typed × continuous"]
    assert list(found.cells["num_repeats"]) == [2, 2]


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"allocator": "nope"}, "allocator=nope: there is no such choice"),
        ({"allocator": lambda **_: None}, "a function with a name"),
        ({"allocator": 3}, "must be the name of a registered allocator"),
        ({"allocator": type("paged", (OwnAllocator,), {})}, "a registered allocator is called so"),
        ({"allocator": Strict}, "allocator.limit"),
        ({"allocator": Broken}, "greed must be a number"),
        ({"workload": object()}, "must be a number, text"),
        ({"workload.num_request": 1}, "did you mean workload.num_requests"),
        ({"engine": {"dtype": "int3"}}, "engine.dtype=int3 must be one of"),
        ({"model.path": "/nowhere"}, "/nowhere"),
        ({"mode": "serve"}, "kvarena.LLM"),
        ({"experiment": "vattention"}, "python run.py experiment=NAME"),
        ({"sweep.rounds": 2}, "use kvarena.sweep"),
        ({"report.baseline": "paged"}, "use kvarena.sweep"),
        ({"overrides": ["hydra.run.dir=x"]}, "hydra.run.dir is the command line's"),
        ({"overrides": "workload.num_requests=8"}, "must be a list of strings"),
        ({"folder": "file/in/the/way"}, "give another one"),
    ],
)
def test_a_mistake_is_a_line(settings, line, simulated, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(kvarena.KvarenaError) as caught:
        kvarena.run(**simulated | settings)
    assert line in str(caught.value) and "\n" not in str(caught.value)


def test_a_run_that_served_nobody_is_an_error_that_names_its_folder(simulated):
    with pytest.raises(Unserved, match="finished none of 5 requests") as caught:
        kvarena.run(**simulated | {"engine.max_model_len": 2})
    assert kvarena.load(caught.value.folder).summary.num_rejected == 5


def test_a_cell_that_fails_is_left_out_with_a_warning(simulated):
    with pytest.warns(UserWarning, match=r"allocator=Broken: .*greed must be a number"):
        found = kvarena.sweep([OwnAllocator, Broken, "paged"], **simulated | {"allocator.sliding_window": None})
    assert len(found) == 2 and [entry["name"] for entry in found.failed] == ["allocator=Broken"]
    assert "greed" in json.loads((found.folder / found.failed[0]["folder"] / "error.json").read_text())["error"]
    assert found.folder.parts[0] == "multirun"
    with pytest.raises(kvarena.KvarenaError, match=r"no cell of the sweep ran: .*greed must be a number"):
        kvarena.sweep(Broken, **simulated)


def test_a_sweep_goes_on_where_it_was(comparison, simulated):
    times = [(result.folder / "cell.json").stat().st_mtime_ns for result in comparison.results]
    again = kvarena.sweep(["paged", OwnAllocator], folder=comparison.folder, **simulated | {"workload.seed": [0, 1]})
    assert [(result.folder / "cell.json").stat().st_mtime_ns for result in again.results] == times


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"workload.seed": []}, "sweeps over nothing"),
        ({"hydra/launcher": "joblib"}, "hydra/launcher is the command line's"),
        ({"sweep.rounds": [1, 2]}, "holds for a whole sweep"),
        ({"allocator": [type("Twin", (OwnAllocator,), {}), type("Twin", (OwnAllocator,), {})]}, "rename one"),
    ],
)
def test_a_mistake_in_a_sweep_is_a_line(settings, line, simulated):
    with pytest.raises(kvarena.KvarenaError, match=line):
        kvarena.sweep(**simulated | settings)
