"""Torch tensors for core's losses (`mindprint.losses.ArrayNamespace`), and from NumPy's token ids."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from mindprint.contract import Int32


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


def on_device(device: torch.device, values: Int32) -> Tensor:
    """Return token ids or positions on the device, int64 as torch indexes."""
    return torch.from_numpy(values.astype(np.int64)).to(device)
