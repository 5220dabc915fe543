"""The packed linear layers among a checkpoint's tensors, each with its parts and their shapes checked.

    AWQ                                     GPTQ                                   K inputs, N outputs, G groups
    qweight int32 [K, N/8]                  int32 [K/8, N]                         eight codes of 4 bits in an int32
    qzeros  int32 [G, N/8]                  int32 [G, N/8]
    scales  float [G, N]                    float [G, N]
                                            g_idx int32 [K], where it is there     the group of each input

    compressed-tensors: weight_packed int32 [N, K/8] (4 bits) or [N, K/4] (8), or weight int8 / float8 [N, K], with
    weight_scale [N, G], [N, 1], [1] or one of each block; weight_zero_point, weight_g_idx where they are there

Source: AutoAWQ's `WQLinear_GEMM`, AutoGPTQ's `QuantLinear`, compressed-tensors' `pack_to_int32`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kvarena.engine.checkpoints.packed_settings import AWQ, PackedSettings
from kvarena.engine.checkpoints.weights import Stored, read_integers
from kvarena.engine.errors import ModelError

FLOATS = ("F16", "BF16", "F32")
INTEGERS = ("I32", "I64")
PACK = 8  # codes of 4 bits in an int32


@dataclass(frozen=True)
class PackedEntry:
    """A packed linear layer.

    Attributes:
        name: the layer's, without the part's suffix.
        parts: its tensors by suffix, without its bias.
        num_outputs, num_inputs: of the layer.
        num_groups: scales of an output; 1: one for all inputs.
        group_size: inputs of a group; the last one may have fewer.
        bits: of a code: 4 or 8.
        share: of its parts' bytes that are its own: less than 1 for some outputs of a matrix that holds more.
    """

    name: str
    parts: Mapping[str, Stored]
    num_outputs: int
    num_inputs: int
    num_groups: int
    group_size: int
    bits: int = 4
    share: float = 1.0

    @property
    def num_bytes(self) -> int:
        """Bytes of its parts in the files."""
        return round(self.share * sum(part.num_bytes for part in self.parts.values()))

    @property
    def kind(self) -> str:
        """4 bits in groups of 128, and the like."""
        code = "fp8" if self.bits == 8 and "weight" in self.parts and self.parts["weight"].dtype != "I8" else None
        groups = f"groups of {self.group_size}" if self.num_groups > 1 else "one group"
        return f"{code or f'{self.bits} bits'} in {groups}"


def gptq_entries(settings: PackedSettings, headers: Mapping[str, Stored]) -> dict[str, PackedEntry]:
    """The layers that AWQ or GPTQ packed. Raises ModelError: see `_Parts`."""
    found = {}
    for name, names in _grouped(headers, ("qweight", "qzeros", "scales", "g_idx"), "qweight").items():
        parts = _Parts(name, names, settings)
        if settings.method == AWQ:
            rows, packed = parts.matrix("qweight", ("I32",))
            num_inputs, num_outputs = rows, packed * PACK
            if num_inputs % PACK:
                raise parts.misshapen("qweight", f"a multiple of {PACK} inputs")
        else:
            rows, num_outputs = parts.matrix("qweight", ("I32",))
            num_inputs = rows * PACK
            if num_outputs % PACK:
                raise parts.misshapen("qweight", f"a multiple of {PACK} outputs")
        group_size = min(settings.group_size or num_inputs, num_inputs)
        num_groups = -(-num_inputs // group_size)
        why = f"{num_inputs} inputs in groups of {group_size}"
        parts.expect("scales", FLOATS, [(num_groups, num_outputs)], why)
        parts.expect("qzeros", ("I32",), [(num_groups, num_outputs // PACK)], f"{why}, {num_outputs} outputs of 4 bits")
        if "g_idx" in names and settings.method != AWQ:
            parts.expect("g_idx", INTEGERS, [(num_inputs,)], f"{num_inputs} inputs")
        found[name] = PackedEntry(name, names, num_outputs, num_inputs, num_groups, group_size)
    return found


def compressed_entries(settings: PackedSettings, headers: Mapping[str, Stored]) -> dict[str, PackedEntry]:
    """The layers that compressed-tensors packed. Raises ModelError: see `_Parts`."""
    suffixes = ("weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape", "input_scale")
    found = {}
    for name, names in _grouped(headers, suffixes, "weight_packed").items():
        parts = _Parts(name, names, settings)
        num_outputs, packed = parts.matrix("weight_packed", ("I32",))
        parts.expect("weight_shape", INTEGERS, [(2,)], "outputs and inputs")
        rows, num_inputs = read_integers(names["weight_shape"])
        bits = 32 * packed // num_inputs if num_inputs else 0
        if rows != num_outputs or bits not in (4, 8) or packed * 32 != bits * num_inputs:
            raise parts.misshapen("weight_packed", f"a weight of [{rows}, {num_inputs}] in 4 or 8 bits")
        found[name] = _compressed(parts, num_outputs, num_inputs, bits)
    for full, stored in headers.items():
        name = full.removesuffix(".weight")
        if name != full and stored.dtype in ("I8", "F8_E4M3"):
            names = {suffix: headers[f"{name}.{suffix}"] for suffix in suffixes if f"{name}.{suffix}" in headers}
            parts = _Parts(name, names | {"weight": stored}, settings)
            found[name] = _compressed(parts, *parts.matrix("weight", (stored.dtype,)), 8)
    return found


def _compressed(parts: _Parts, num_outputs: int, num_inputs: int, bits: int) -> PackedEntry:
    scale = parts.need("weight_scale")
    shape = scale.shape
    if scale.dtype not in FLOATS:
        raise parts.misshapen("weight_scale", f"one of {', '.join(FLOATS)}")
    is_matrix = len(shape) == 2 and shape[1] >= 1 and num_inputs % shape[1] == 0
    fits = is_matrix and num_outputs % max(1, shape[0]) == 0
    if not fits and shape not in ((), (1,), (num_outputs,)):
        raise parts.misshapen("weight_scale", f"a divisor of {num_outputs} outputs and {num_inputs} inputs")
    num_groups = shape[1] if is_matrix else 1
    if "weight_zero_point" in parts.names:
        rows = num_outputs * bits // 32 if "weight_packed" in parts.names else num_outputs
        parts.expect("weight_zero_point", ("I32", "I8", "F8_E4M3"), [(rows, num_groups)], f"{num_outputs} outputs")
    if "weight_g_idx" in parts.names:
        parts.expect("weight_g_idx", INTEGERS, [(num_inputs,)], f"{num_inputs} inputs")
    return PackedEntry(
        parts.name, parts.names, num_outputs, num_inputs, num_groups, num_inputs // num_groups, bits
    )  # fmt: skip


def _grouped(headers: Mapping[str, Stored], suffixes: tuple[str, ...], main: str) -> dict[str, dict[str, Stored]]:
    """Tensors with one of `suffixes` by layer, where the layer has `main`, or nothing but such parts."""
    layers: dict[str, dict[str, Stored]] = {}
    for full, stored in headers.items():
        name, _, suffix = full.rpartition(".")
        if suffix in suffixes:
            layers.setdefault(name, {})[suffix] = stored
    return {name: parts for name, parts in layers.items() if main in parts or f"{name}.weight" not in headers}


class _Parts:
    """A layer's tensors while they are checked; each fault is a ModelError with the tensor's name and the file."""

    def __init__(self, name: str, names: Mapping[str, Stored], settings: PackedSettings) -> None:
        self.name, self.names, self._settings = name, names, settings

    def need(self, suffix: str) -> Stored:
        """The part. Raises ModelError: it is not there."""
        if suffix not in self.names:
            other = next(iter(self.names.values()))
            raise ModelError(
                f"{other.file} holds {other.name} and no file of the model {self.name}.{suffix}, which "
                f"{self._settings.name} needs; copy the model again"
            )
        return self.names[suffix]

    def matrix(self, suffix: str, dtypes: tuple[str, ...]) -> tuple[int, int]:
        """The shape of a part that must be a matrix of one of `dtypes`. Raises ModelError."""
        part = self.need(suffix)
        if len(part.shape) != 2 or part.dtype not in dtypes or 0 in part.shape:
            raise self.misshapen(suffix, f"a matrix of {' or '.join(dtypes)}")
        return part.shape[0], part.shape[1]

    def expect(self, suffix: str, dtypes: tuple[str, ...], shapes: list[tuple[int, ...]], why: str) -> None:
        """See that a part has one of `shapes`. Raises ModelError."""
        part = self.need(suffix)
        if part.shape not in shapes or part.dtype not in dtypes:
            raise self.misshapen(suffix, f"{list(shapes[0])} of {' or '.join(dtypes)} ({why})")

    def misshapen(self, suffix: str, what: str) -> ModelError:
        """What to say of a part of another shape or type."""
        part = self.names[suffix]
        return ModelError(
            f"{part.file}: {part.name} is {list(part.shape)} of {part.dtype}, and {self._settings.name} by "
            f"{self._settings.file.name} asks for {what}; settings and weights do not belong together, or the file is "
            "broken"
        )
