"""Several processes on mx.distributed: the ring over TCP, RDMA over Thunderbolt, or NCCL between CUDA devices."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import cache

import mlx.core as mx
import numpy as np

from mindprint.contract import UInt8
from mindprint.errors import RankError, first_line
from mindprint.plugins.launched import mlx_world
from mindprint_mlx.arrays import scalar

Factors = Mapping[str, mx.array]


def gather(values: UInt8) -> UInt8:
    """Return the bytes of all ranks, uint8 `[ranks, n]`."""
    if mlx_world()[1] == 1:
        return values[None].copy()
    rows = _exchanged(lambda group: mx.distributed.all_gather(mx.array(values)[None], group=group))
    return np.array(rows, dtype=np.uint8)


def sum_over_ranks(gradients: Factors, loss: float) -> tuple[float, Factors]:
    """Return the sums of losses and gradients over all ranks. A rank that is alone gets its own.

    All of them travel in one array: a step communicates once.
    """
    if mlx_world()[1] == 1:
        return loss, gradients
    # Sorted, so that the order is the same on every rank.
    names = sorted(gradients)
    parts = [gradients[name].reshape(-1) for name in names] + [mx.array([loss], mx.float32)]
    # The gradients are computed where the model is, and communicated by another stream.
    flat = mx.concatenate(parts)
    mx.eval(flat)
    flat = _exchanged(lambda group: mx.distributed.all_sum(flat, group=group))
    summed, start = {}, 0
    for name in names:
        size = gradients[name].size
        summed[name] = flat[start : start + size].reshape(gradients[name].shape)
        start += size
    return scalar(flat[-1]), summed


def _exchanged(exchange: Callable[[mx.distributed.Group], mx.array]) -> mx.array:
    """Return the evaluated result of an exchange. Raises `RankError` if another rank has ended."""
    group = _group()
    try:
        # Only NCCL communicates on a GPU, and `mlx.launch` sets this variable for it alone.
        with mx.stream(mx.gpu if "MLX_WORLD_SIZE" in os.environ else mx.cpu):
            result = exchange(group)
            mx.eval(result)
    except RuntimeError as error:
        raise RankError(
            f"lost the other ranks: one of them has ended, and says why itself unless it was killed; the last "
            f"checkpoint is kept ({first_line(error)[:200]})"
        ) from error
    return result


@cache
def _group() -> mx.distributed.Group:
    """Connect this process with the others, once. Raises `RankError` if they do not answer."""
    try:
        return mx.distributed.init(strict=True)
    except RuntimeError as error:
        raise RankError(
            f"cannot connect with the other ranks: one of them has ended or was not started, or is on a host that this "
            f"one does not reach ({first_line(error)[:200]})"
        ) from error
