"""Torch tensors for core's losses (`mindprint.losses.ArrayNamespace`), and from NumPy's token ids."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional


class TorchArrays:
    """The namespace of torch: every function differentiates, in the dtype of its input (float32 in steps)."""

    def log_sigmoid(self, x: Tensor) -> Tensor:
        return functional.logsigmoid(x)

    def sigmoid(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x)

    def relu(self, x: Tensor) -> Tensor:
        return torch.relu(x)

    def exp(self, x: Tensor) -> Tensor:
        return torch.exp(x)

    def log1p(self, x: Tensor) -> Tensor:
        return torch.log1p(x)

    def sum(self, x: Tensor) -> Tensor:
        return torch.sum(x)


TORCH = TorchArrays()


def on_device(device: torch.device, values: NDArray[np.integer]) -> Tensor:
    """Return token ids or positions on the device, int64 as torch indexes."""
    return _copied(device, torch.from_numpy(values.astype(np.int64)))


def floats_on_device(device: torch.device, values: NDArray[np.generic]) -> Tensor:
    """Return numbers on the device, float32."""
    return _copied(device, torch.from_numpy(values.astype(np.float32)))


def _copied(device: torch.device, tensor: Tensor) -> Tensor:
    if device.type == "cuda":
        # A copy from pinned memory is queued behind the device's work. Without, the host would wait for all of it.
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
