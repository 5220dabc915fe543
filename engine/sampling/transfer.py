"""Small host arrays to the device, without waiting for it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """`array` on `device`; through pinned memory and asynchronously when that is a GPU."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def copy_to(array: np.ndarray, target: Tensor) -> None:
    """`array` into `target`, of as many elements and its type, in one copy; asynchronously as in `to_device`."""
    tensor = torch.from_numpy(array)
    target.copy_(tensor.pin_memory() if target.is_cuda else tensor, non_blocking=True)
