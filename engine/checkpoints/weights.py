"""The weight files of a model directory: there, whole, and of a format that is read. Headers are read, weights not."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from kvarena.engine.checkpoints.directory import check_content, one_line, read_json
from kvarena.engine.checkpoints.kinds import check_tensor_names, quantization
from kvarena.engine.errors import ModelError

SAFETENSORS, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
# Other formats by pattern, in the order in which a directory with several is called after one.
FORMATS = {
    "*.gguf": "GGUF weights",
    "adapter_model.*": "an adapter (peft), which needs merging into its base model,",
    "consolidated*": "its maker's own format",
    "*.nemo": "a NeMo archive",
    "tf_model.h5": "TensorFlow weights",
    "flax_model*.msgpack": "Flax weights",
    "rust_model.ot": "Rust weights",
    "*.onnx": "an ONNX graph",
    "*.npz": "MLX weights",
    "*.engine": "a TensorRT engine",
    "*.distcp": "a distributed training checkpoint",
    "*.ckpt": "a training checkpoint",
    "*.pt": "PyTorch weights under another name than pytorch_model.bin",
    "*.pth": "PyTorch weights under another name than pytorch_model.bin",
}


def check_weights(directory: Path, config: dict[str, Any], *, packed: bool = False) -> None:
    """See that the weight files are there and whole.

    Args:
        directory: the checkpoint's.
        config: its config.json.
        packed: some weights are packed in a way that is read (engine/checkpoints/packed.py looks at them).

    Raises:
        ModelError: no weights, of a format that is not read, a shard or the index is missing, or a file is cut off.
    """
    files = weight_files(directory)
    for file in files:
        check_content(file)
        if file.suffix == ".safetensors":
            names = read_headers([file])
            if not packed and quantization(config) is None:
                check_tensor_names(directory, names)
                _check_types(names.values())
        elif not _is_whole_pickle(file):
            raise ModelError(f"{file} is truncated or broken; copy it again")


def _check_types(tensors: Iterable[Stored]) -> None:
    """Weights that nothing packs are floating-point numbers: others would be taken for such. Raises ModelError."""
    for one in tensors:
        if one.name.endswith(".weight") and one.dtype.startswith(("I", "U", "BOOL")):
            raise ModelError(
                f"{one.file} holds whole numbers ({one.dtype}) as {one.name}, and config.json says nothing of "
                "quantisation; give the checkpoint in 16 or 32 bits"
            )


class Stored(NamedTuple):
    """A tensor of a safetensors file, by its header: `dtype` as the format calls it (F16, I32, F8_E4M3, ...)."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Its size in the file."""
        bits = int("".join(c for c in self.dtype.partition("_")[0] if c.isdigit()) or 8)
        return math.prod(self.shape) * bits // 8


def read_headers(files: Iterable[Path]) -> dict[str, Stored]:
    """Every tensor of some safetensors files by name. Raises ModelError: a file is cut off or broken."""
    found = {}
    for file in files:
        try:
            with safe_open(file, framework="numpy") as opened:
                for name in opened.keys():  # noqa: SIM118 - no mapping
                    one = opened.get_slice(name)
                    found[name] = Stored(name, file, one.get_dtype(), tuple(one.get_shape()))
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file} is truncated or broken ({one_line(error)}); copy it again") from error
    return found


def read_integers(stored: Stored) -> list[int]:
    """The content of a small tensor of integers."""
    with safe_open(stored.file, framework="numpy") as opened:
        return [int(value) for value in opened.get_tensor(stored.name).flatten()]


def _is_whole_pickle(file: Path) -> bool:
    """torch.save writes a zip archive, whose end is its table of contents; before torch 1.6 it wrote a bare pickle."""
    if zipfile.is_zipfile(file):
        return True
    with file.open("rb") as stream:
        return stream.read(1) == b"\x80"


def weight_files(directory: Path) -> list[Path]:
    """The files that transformers would read, in its order of preference. Raises ModelError: they are not there."""
    for single, index in ((SAFETENSORS, SAFETENSORS_INDEX), (PICKLE, PICKLE_INDEX)):
        file = directory / single
        if file.is_file() or file.is_symlink():
            return [file]
        if (directory / index).is_file():
            return _shards(directory, directory / index)
        _check_index_is_there(directory, single, index)
    raise ModelError(f"{directory} holds no weights: {_what_is_there(directory)}")


def _shards(directory: Path, index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index} has no weight_map; copy it again")
    names = sorted({str(name) for name in weight_map.values()})
    elsewhere = next((name for name in names if Path(name).is_absolute() or ".." in Path(name).parts), None)
    if elsewhere is not None:
        raise ModelError(f"{index} names {elsewhere}, which is no file of its directory; copy it again")
    missing = [name for name in names if not (directory / name).is_file() and not (directory / name).is_symlink()]
    if missing:
        more = f" and {len(missing) - 1} more of {len(names)} files" if len(missing) > 1 else ""
        raise ModelError(
            f"{directory} lacks {missing[0]}{more}, which {index.name} names; copy {'them' if more else 'it'} again"
        )
    return [directory / name for name in names]


def _check_index_is_there(directory: Path, single: str, index: str) -> None:
    """Shards without the list of what is in which cannot be read; nor can a single file under another name."""
    stem, _, suffix = single.rpartition(".")
    shards = sorted(directory.glob(f"{stem}-*-of-*.{suffix}"))
    if shards:
        raise ModelError(
            f"{directory} holds {len(shards)} shards such as {shards[0].name} and lacks {index}, which says what is in "
            "which; copy it too"
        )
    others = [
        file
        for file in sorted(directory.glob(f"*.{suffix}"))
        if suffix == "safetensors" and not file.name.startswith(("adapter", "consolidated"))
    ]
    if others:
        raise ModelError(
            f"{directory} holds {others[0].name} and no {single}; if it holds the whole model, rename it to {single}"
        )


def _what_is_there(directory: Path) -> str:
    for pattern, what in FORMATS.items():
        found = next(iter(sorted(directory.glob(pattern))), None)
        if found is not None:
            return f"{found.name} is {what} and is not read; give the model's checkpoint with {SAFETENSORS}"
    return (
        f"{SAFETENSORS} or {SAFETENSORS_INDEX} with its shards is missing (model.load_format=dummy runs the shape "
        "without weights)"
    )
