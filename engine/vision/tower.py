"""Vision towers: tiles of pixels to rows that stand in a prompt like token embeddings. The contract, and loading.

uint8 [3, h, w] -> values -> a tower and projector of transformers -> [tokens, (1 + levels) * hidden]
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from kvarena.engine.checkpoints.directory import one_line
from kvarena.engine.errors import ModelError
from kvarena.engine.pool.memory_limits import is_out_of_memory
from kvarena.engine.vision.checkpoint import Tensors
from kvarena.engine.vision.processing import Processing, byte_values


class VisionTower(nn.Module):
    """A family's tower, and what a pixel's byte is worth.

    Args:
        processing: how its images are prepared.
        hidden_size: of the language model.
        num_levels: further features of each token, for the stream behind the first layers.

    Attributes:
        processing, hidden_size, num_levels: as given.
    """

    values: Tensor

    def __init__(self, processing: Processing, hidden_size: int, num_levels: int = 0) -> None:
        super().__init__()
        self.processing, self.hidden_size, self.num_levels = processing, hidden_size, num_levels
        self.register_buffer("values", torch.from_numpy(byte_values(processing)), persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """Of weights, and of what comes out."""
        return next(self.parameters()).dtype

    def pixel_values(self, tiles: Tensor) -> Tensor:
        """What the library's processor makes of bytes, in the tower's dtype: uint8 [..., 3, h, w] to the same shape."""
        channels = torch.arange(tiles.shape[-3], device=tiles.device)[:, None, None]
        return self.values[channels, tiles.int()].to(self.dtype)

    def restore(self, device: torch.device) -> None:
        """Make again, on `device` and in full precision, what no checkpoint holds."""
        self.values = torch.from_numpy(byte_values(self.processing)).to(device)

    def fuse(self) -> None:
        """Compute in few passes from now on, where there is such a form. Weights must be in place, and restored."""

    @abstractmethod
    def forward(self, tiles: list[Tensor]) -> list[Tensor]:
        """Encode tiles, each uint8 [3, h, w], to [tokens, (1 + levels) * hidden], a token's levels side by side."""


def load_tower(
    make: Callable[[], VisionTower], tensors: Tensors, dtype: torch.dtype, device: torch.device, name: str
) -> VisionTower:
    """A tower with its weights, each read to `device` by itself.

    Args:
        make: makes the tower.
        tensors: by the native classes' names.
        dtype: of the weights there.
        device: where they go.
        name: of the checkpoint, for errors.

    Raises:
        ModelError: a weight is missing, has another shape, or has no place.
    """
    with torch.device("meta"):
        tower = _made(make, name)
    wanted = tower.state_dict()
    missing = sorted(set(wanted) - set(tensors))
    if missing:
        raise ModelError(f"{name} lacks the weights {_first(missing)}; copy the model again")
    surplus = sorted(set(tensors) - set(wanted))
    if surplus:
        raise ModelError(
            f"{name} holds weights that its vision tower has no place for: {_first(surplus)}; config.json and weights "
            "do not belong together"
        )
    for key, place in wanted.items():
        value = tensors[key][...]
        if value.shape != place.shape:
            raise ModelError(
                f"{name}: weight {key} has shape {list(value.shape)} and config.json asks for {list(place.shape)}; "
                "config.json and weights do not belong together"
            )
        owner, _, last = key.rpartition(".")
        moved = nn.Parameter(value.to(device=device, dtype=dtype).contiguous(), requires_grad=False)
        setattr(tower.get_submodule(owner), last, moved)
    tower.restore(device)
    tower.eval().fuse()
    return tower


def dummy_tower(make: Callable[[], VisionTower], dtype: torch.dtype, device: torch.device, seed: int) -> VisionTower:
    """A tower with random weights, drawn where they will be used. The caller's random state stays as it was."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []), device:
        torch.manual_seed(seed)
        tower = _made(make, "the model").to(dtype).eval().requires_grad_(False)
    tower.restore(device)
    tower.fuse()
    return tower


def _made(make: Callable[[], VisionTower], name: str) -> VisionTower:
    try:
        return make()
    # Anything: a config may be valid field by field and still not make a tower.
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise ModelError(f"{name}: vision_config makes no tower ({type(error).__name__}: {one_line(error)})") from error


def _first(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")
