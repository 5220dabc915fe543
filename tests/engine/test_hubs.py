"""A model's name is looked up on a hub through the hub's library; a path never is."""

import shutil
import sys
from types import ModuleType, SimpleNamespace

import huggingface_hub
import pytest

from kvarena import LLM
from kvarena.engine.checkpoints import hubs
from kvarena.engine.checkpoints.check import check_checkpoint
from kvarena.engine.checkpoints.directory import is_model_name, resolve_directory
from kvarena.engine.errors import ModelError
from kvarena.engine.models import load_model, load_tokenizer
from kvarena.experiments.building.model_files import check_model

DEMO = resolve_directory("models/demo")


class NetworkError(Exception):
    """As modelscope's."""


class RepositoryNotFoundError(Exception):
    """As huggingface_hub's, which wants an answer of its server."""


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """Both libraries, whose hubs have the demo; `fake.calls` is what they were asked, `fake.fails` who fails how."""
    found = SimpleNamespace(calls=[], fails={}, has=set(), cache=tmp_path / "cache")

    def hub(package):
        def snapshot_download(model, local_files_only, ignore_patterns):
            found.calls.append((package, model, local_files_only))
            folder = found.cache / package / "a1b2c3"
            if local_files_only:
                if not folder.is_dir():
                    raise FileNotFoundError("not in the cache")
            elif package in found.fails:
                raise found.fails[package]
            elif not folder.is_dir():
                skipped = shutil.ignore_patterns(*ignore_patterns)
                shutil.copytree(DEMO, folder, ignore=skipped)
            return str(folder)

        return snapshot_download

    for package in ("modelscope", "huggingface_hub"):
        found.has.add(package)
        name = "modelscope.hub.snapshot_download" if package == "modelscope" else package
        module = ModuleType(name)
        module.snapshot_download = hub(package)
        for parent in {package, name.rpartition(".")[0] or package, name}:
            monkeypatch.setitem(sys.modules, parent, module)
    monkeypatch.setattr(hubs, "find_spec", lambda package: package if package in found.has else None)
    monkeypatch.chdir(tmp_path)
    return found


@pytest.mark.parametrize(
    ("path", "is_name"),
    [
        ("OpenGVLab/InternVL2-8B", True),
        ("a.b/c_d-e.f", True),
        ("models/demo", False),  # comes with the project
        ("models/demmo", False),  # as its neighbour does
        ("here/x", False),  # a folder of the working directory
        ("./owner/name", False),
        ("/owner/name", False),
        ("owner/name/more", False),
        ("name", False),
        ("-owner/name", False),
        ("owner/name.gguf", False),
        ("../owner", False),
        ("~/models", False),
    ],
)
def test_what_is_a_name(path, is_name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert is_model_name(path) is is_name


def test_a_name_is_downloaded_once_and_found_by_every_process(fake):
    config = SimpleNamespace(
        model=SimpleNamespace(path="owner/tiny", load_format="auto", trust_remote_code=False, quantization=None),
        runner=SimpleNamespace(kind="torch"),
    )
    folder = check_model(config, tokenizer=True)
    assert folder == (fake.cache / "modelscope" / "a1b2c3").resolve()
    assert [call for call in fake.calls if not call[2]] == [("modelscope", "owner/tiny", False)]
    fake.calls.clear()
    assert load_model("owner/tiny").spec.name == "tiny"
    assert load_tokenizer("owner/tiny")("a")["input_ids"]
    assert {call[2] for call in fake.calls} == {True}


def test_a_shape_needs_no_weights(fake):
    folder = hubs.fetch_model("owner/tiny", weights=False)
    assert (folder / "config.json").is_file() and not list(folder.glob("*.safetensors"))


def test_hubs_are_asked_in_turn_and_without_a_network_the_cache(fake):
    fake.fails["modelscope"] = NetworkError("retries exceeded\nmore")
    assert hubs.fetch_model("owner/tiny").parent.name == "huggingface_hub"
    fake.fails["huggingface_hub"] = OSError("the disk is full")
    assert resolve_directory("owner/tiny").parent.name == "huggingface_hub"
    assert hubs.fetch_model("owner/tiny").parent.name == "huggingface_hub"
    with pytest.raises(ModelError) as caught:
        shutil.rmtree(fake.cache)
        hubs.fetch_model("owner/tiny")
    assert str(caught.value) == (
        "model.path=owner/tiny is no folder here, and as a model's name: ModelScope cannot be reached from here; "
        "Hugging Face failed (the disk is full). Where there is a network: modelscope download --model owner/tiny "
        "--local_dir DIR or hf download owner/tiny --local-dir DIR, and give DIR"
    )


def test_a_library_that_is_not_there_is_named(fake):
    fake.has.discard("modelscope")
    fake.fails["huggingface_hub"] = RepositoryNotFoundError("404")
    with pytest.raises(ModelError, match=r"has no such model that everyone may read; pip install modelscope to look"):
        hubs.fetch_model("owner/tiny")
    with pytest.raises(ModelError, match="as a model's name: it was not downloaded"):
        check_checkpoint("owner/tiny")


def test_hugging_face_s_own_cache(tmp_path, monkeypatch):
    """With the library itself, and no network."""
    repo = tmp_path / "models--owner--tiny"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("a1b2c3")
    shutil.copytree(DEMO, repo / "snapshots" / "a1b2c3")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hubs, "find_spec", lambda package: package != "modelscope" or None)
    assert hubs.fetch_model("owner/tiny").name == resolve_directory("owner/tiny").name == "a1b2c3"
    with pytest.raises(ModelError, match="owner/other is no folder here, and as a model's name: Hugging Face"):
        hubs.fetch_model("owner/other")


def test_who_gives_a_name_gets_one_line(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hubs, "find_spec", lambda package: package != "modelscope" or None)
    with pytest.raises(ModelError) as caught:
        LLM("owner/no-such-model")
    text = str(caught.value)
    assert "owner/no-such-model is no folder here" in text and "hf download" in text and "\n" not in text
