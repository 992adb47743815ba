"""The functions that core's losses need, for torch tensors (`mindprint.losses.ArrayNamespace`)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


class TorchArrays:
    """Everything differentiates, and computes in the dtype it is given (float32 in steps)."""

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
