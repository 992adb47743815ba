"""How a micro-batch is cut for a CPU: groups of rows of like length, which its cores read side by side.

MLX computes on one thread a stream, and only matrix products use more. So rows are dealt to as many threads as there
are cores, each with a stream of its own, and products that take no other core. It also takes less padding, and fewer
activations at once. Gradients are sums over rows, so that nothing changes but their rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from threading import Lock, local
from typing import TypeVar

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mindprint.contract import Int32, PreferenceBatch, TokenBatch
from mindprint_mlx import blas, points
from mindprint_mlx.model import Handle

Rows = NDArray[np.intp]

MOST_THREADS = 8
GROUP_TOKENS = 512
"""About how many tokens a group has: enough for products to run at full speed, few enough for caches and memory."""

LEAST_TOKENS = 64
LEAST_WORK = 10**9
"""A batch with fewer tokens a core, or fewer times the model's parameters, is not worth a graph for each group."""


BUILDING = Lock()
"""Held while a graph is made: the layers of a model then hold what gradients are traced through."""

T = TypeVar("T")


def cores(device: mx.Device) -> int:
    """How many groups are computed at once: as many as the BLAS has threads, on a CPU whose BLAS is ours to tell."""
    return min(blas.prepare().threads, MOST_THREADS) if device == mx.Device(mx.cpu) else 1


def side_by_side(device: mx.Device, tasks: Sequence[Callable[[], T]]) -> Iterator[T]:
    """What each task makes: arrays, evaluated, each task's on a core of its own. In the order of the tasks.

    Of the tasks themselves, which make the graphs, only one runs at a time.
    """
    if len(tasks) == 1:
        result = tasks[0]()
        mx.eval(result)
        yield result
        return
    pool = _threads(cores(device))
    with blas.threads(1):
        futures = [pool.submit(_computed, device, task) for task in tasks]
        try:
            while futures:
                yield futures.pop(0).result()
        finally:
            wait(futures)


@cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="mindprint-mlx")


def _computed(device: mx.Device, task: Callable[[], T]) -> T:
    with mx.stream(_own_stream(device)):
        with BUILDING, points.noted() as on_the_way:
            result = task()
        points.evaluate(on_the_way)
        mx.eval(result)
    return result


_own = local()


def _own_stream(device: mx.Device) -> mx.Stream:
    """A thread's stream: MLX allows no other thread to use it."""
    if not hasattr(_own, "stream"):
        _own.stream = mx.new_stream(device)
    stream: mx.Stream = _own.stream
    return stream


def row_groups(lengths: Int32, count: int, least: int = 1) -> list[Rows]:
    """Rows in groups of like length, for so many cores; one group where a core would have less than `least` tokens."""
    total = int(lengths.sum())
    if count == 1 or total < count * least:
        return [np.arange(len(lengths))]
    groups = count * -(-total // (count * GROUP_TOKENS))
    order = np.argsort(lengths, kind="stable")
    middles = np.cumsum(lengths[order]) - lengths[order] / 2
    numbers = (middles * groups / total).astype(int)
    return [order[numbers == number] for number in np.unique(numbers)]


def token_groups(handle: Handle, batch: TokenBatch) -> list[Rows]:
    """Groups of a batch's rows, for `layouts.token_rows`: rows that share a prompt stay together."""
    if batch.shared is None:
        return _groups(handle, batch.lengths)
    half = len(batch.shared)
    own = batch.lengths[:half] + batch.lengths[half:] - batch.shared
    return [np.concatenate([pairs, pairs + half]) for pairs in _groups(handle, own)]


def pair_groups(handle: Handle, batch: PreferenceBatch) -> list[Rows]:
    """Groups of a batch's pairs."""
    return _groups(handle, batch.prompt_lengths + batch.chosen_lengths + batch.rejected_lengths)


def _groups(handle: Handle, lengths: Int32) -> list[Rows]:
    least = max(LEAST_TOKENS, LEAST_WORK // max(handle.parameters, 1))
    return row_groups(lengths, cores(handle.device), least)
