"""Several processes on torch.distributed: NCCL between CUDA devices, gloo for everything else."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor

from mindprint.contract import UInt8
from mindprint.errors import BackendError, RankError, first_line
from mindprint.plugins.launched import torchrun_world

PATIENCE = timedelta(hours=2)
"""The longest wait for another rank, which may be writing a fingerprint. That one has ended is noticed at once."""


def gather(values: UInt8) -> UInt8:
    """Return the bytes of all ranks, uint8 `[ranks, n]`."""
    _, size = torchrun_world()
    rows = torch.empty((size, len(values)), dtype=torch.uint8)
    if size == 1:
        return values[None].copy()
    join()
    _rest()
    exchanged(lambda: dist.all_gather(list(rows), torch.from_numpy(values.copy())))
    return rows.numpy()


def sum_over_ranks(gradients: Callable[[], Sequence[Tensor]], loss: Tensor) -> Tensor:
    """Sum the gradients over all ranks, in place, and return the sum of the losses. A rank that is alone does nothing.

    All of them travel in one buffer: a step communicates once.
    """
    if torchrun_world()[1] == 1:
        return loss
    join()
    _rest()
    parts = gradients()
    flat = torch.cat([*(part.reshape(-1) for part in parts), loss.reshape(1).to(parts[0].device, torch.float32)])
    if flat.device.type == "cuda":
        # NCCL waits long for a process that has ended. Gloo, which all of them reach first, notices it at once.
        exchanged(lambda: dist.all_reduce(torch.zeros(1)))
        exchanged(lambda: dist.all_reduce(flat))
    else:
        summed = flat.cpu()
        exchanged(lambda: dist.all_reduce(summed))
        flat = summed.to(flat.device)
    start = 0
    for part in parts:
        part.copy_(flat[start : start + part.numel()].view_as(part))
        start += part.numel()
    return flat[-1]


def announce(number: int) -> list[int]:
    """Return the small numbers of all ranks, in their order."""
    _, size = torchrun_world()
    told = torch.empty((size, 1), dtype=torch.int64)
    exchanged(lambda: dist.all_gather(list(told), torch.tensor([number])))
    return told[:, 0].tolist()


def rest_before_exchanges(rest: Callable[[], None] | None) -> None:
    """Call `rest` before each exchange of gradients or bytes, in which a rank waits for the others; None: nothing."""
    _resting[:] = [] if rest is None else [rest]


_resting: list[Callable[[], None]] = []
"""The work of a rank while it waits for the others: with a sharded base, it lends its shares to them."""


def _rest() -> None:
    for rest in _resting:
        rest()


@cache
def join() -> None:
    """Connect this process with the others, once."""
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= count:
            raise BackendError(
                f"this is process {local + 1} on a machine that shows {count} CUDA devices: start no more processes "
                "than devices (--nproc-per-node), or set backend.device=cpu"
            )
        # "cuda" means this device from now on.
        torch.cuda.set_device(local)
    if not dist.is_initialized():
        exchanged(lambda: dist.init_process_group(backend, timeout=PATIENCE))


def exchanged(call: Callable[[], object]) -> None:
    """Make a call that exchanges something. Raises `RankError` if another rank has ended."""
    try:
        call()
    except RuntimeError as error:
        raise RankError(
            f"lost the other ranks: one of them has ended, and says why itself unless it was killed; the last "
            f"checkpoint is kept ({first_line(error)[:200]})"
        ) from error
