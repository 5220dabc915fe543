"""Models by their names on ModelScope and Hugging Face, through the libraries of these.

    a folder that is there                       never looked up
    OWNER/NAME, where no folder OWNER is         ModelScope where its library is installed, else Hugging Face

A command looks a name up once, at its door (`fetch_model`), where files are downloaded or completed; its processes find
them in the library's cache (`cached_model`). Code among the files runs by `model.trust_remote_code` alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from kvarena.engine.errors import ModelError

# Weights that are not read, or are read where there are no safetensors alone.
_NEVER = ["*.gguf", "*.onnx", "*.h5", "*.msgpack", "*.ot", "*.pth", "*.pt", "*.ckpt", "original/*", "consolidated*"]
_PICKLES, _TENSORS = ["*.bin"], ["*.safetensors"]
# What the libraries' errors mean, by the names of their classes.
_REASONS = {
    "GatedRepoError": "asks for a login that has accepted the model's terms",
    "RepositoryNotFoundError": "has no such model that everyone may read",
    "NotExistError": "has no such model that everyone may read",
    "AuthenticationError": "asks for a login",
    "LocalEntryNotFoundError": "cannot be reached from here",
    "OfflineModeIsEnabled": "is not asked, as HF_HUB_OFFLINE says",
    "NetworkError": "cannot be reached from here",
    "ConnectionError": "cannot be reached from here",
}


class Hub(NamedTuple):
    """A hub and its library.

    Attributes:
        name: as people call it.
        package: the library's.
        snapshot: (model, local only, patterns to leave out, more arguments) -> its folder; raises what the library
            does.
        command: downloads a model by hand.
    """

    name: str
    package: str
    snapshot: Callable[..., str]
    command: str


def _modelscope(model: str, local: bool, ignored: list[str], **where: Any) -> str:
    from modelscope.hub.snapshot_download import snapshot_download

    return str(snapshot_download(model, local_files_only=local, ignore_patterns=ignored, **where))


def _huggingface(model: str, local: bool, ignored: list[str], **where: Any) -> str:
    from huggingface_hub import snapshot_download

    return str(snapshot_download(model, local_files_only=local, ignore_patterns=ignored, **where))


HUBS = (
    Hub("ModelScope", "modelscope", _modelscope, "modelscope download --model {} --local_dir DIR"),
    Hub("Hugging Face", "huggingface_hub", _huggingface, "hf download {} --local-dir DIR"),
)


def fetch_model(model: str, *, weights: bool = True, revision: str | None = None, cache_dir: str | None = None) -> Path:
    """Download a model, or what is missing of it, into its library's cache.

    Args:
        model: OWNER/NAME.
        weights: its weights, too.
        revision: branch, tag or commit; None: the hub's default.
        cache_dir: in place of the library's cache.

    Raises:
        ModelError: no hub has it, or none can be reached and it is not in a cache.
    """
    reasons = []
    given = {"revision": revision, "cache_dir": cache_dir}
    where = {key: value for key, value in given.items() if value is not None}
    for hub in _installed():
        try:
            with _quiet():
                ignored = [*_NEVER, *_PICKLES, *(() if weights else _TENSORS)]
                folder = Path(hub.snapshot(model, False, ignored, **where))
                if weights and not any(folder.glob("*.safetensors")):
                    folder = Path(hub.snapshot(model, False, _NEVER, **where))
            return folder
        # Anything: whatever its network, its server and its disk bring about.
        except Exception as error:
            found = _cached(hub, model, **where)
            if found is not None:
                return found
            reasons.append(f"{hub.name} {_reason(error)}")
    raise ModelError(_not_found(model, "; ".join(reasons)))


def cached_model(model: str) -> Path:
    """The folder of a model that was downloaded. Raises ModelError: there is none."""
    found = next((folder for hub in _installed() if (folder := _cached(hub, model)) is not None), None)
    if found is None:
        raise ModelError(_not_found(model, "it was not downloaded"))
    return found


def _installed() -> list[Hub]:
    return [hub for hub in HUBS if find_spec(hub.package) is not None]


def _cached(hub: Hub, model: str, **where: Any) -> Path | None:
    try:
        with _quiet():
            folder = Path(hub.snapshot(model, True, [], **where))
    except Exception:  # each library says in its own way that it is not there
        return None
    return folder if (folder / "config.json").is_file() else None


def _reason(error: Exception) -> str:
    for kind in type(error).__mro__:
        if kind.__name__ in _REASONS:
            return _REASONS[kind.__name__]
    text = str(error).strip()
    return f"failed ({text.splitlines()[0] if text else type(error).__name__})"


def _not_found(model: str, why: str) -> str:
    commands = " or ".join(hub.command.format(model) for hub in HUBS)
    missing = [hub for hub in HUBS if hub not in _installed()]
    more = "".join(f"; pip install {hub.package} to look at {hub.name} too" for hub in missing)
    return (
        f"model.path={model} is no folder here, and as a model's name: {why}{more}. Where there is a network: "
        f"{commands}, and give DIR"
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the retries that a library logs: what came of them is said in one line."""
    loggers = [logging.getLogger(name) for name in ("modelscope_hub", "modelscope", "huggingface_hub")]
    levels = [one.level for one in loggers]
    for one in loggers:
        one.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for one, level in zip(loggers, levels, strict=True):
            one.setLevel(level)
