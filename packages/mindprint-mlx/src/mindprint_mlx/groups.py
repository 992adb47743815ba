"""A micro-batch cut for a CPU: groups of rows of like length, which its cores read at the same time.

MLX computes on one thread a stream, and only matrix products use more. So rows are dealt to as many threads as there
are cores, each with its own stream, and products that take no other core. It also takes less padding, and fewer
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
from mindprint.layouts import pair_lengths
from mindprint_mlx import blas, points
from mindprint_mlx.model import MlxModel

Rows = NDArray[np.intp]

MOST_THREADS = 8
GROUP_TOKENS = 512
"""About how many tokens a group has: enough for products to run at full speed, few enough for caches and memory."""

LEAST_TOKENS = 64
LEAST_WORK = 10**9
"""A batch with fewer tokens a core, or fewer times the model's parameters, is not worth a graph for each group."""

BUILDING = Lock()
"""Held while a graph is made: the layers of a model then hold the arrays that gradients are traced through."""

T = TypeVar("T")


def core_count(device: mx.Device) -> int:
    """Return how many groups are computed at once: the BLAS's threads, on a CPU whose BLAS takes our word for them."""
    return min(blas.prepare().threads, MOST_THREADS) if device == mx.Device(mx.cpu) else 1


def side_by_side(device: mx.Device, tasks: Sequence[Callable[[], T]]) -> Iterator[T]:
    """Yield the arrays that each task makes, evaluated, each task's on its own core, in the order of the tasks.

    Of the tasks themselves, which make the graphs, only one runs at a time.
    """
    if not tasks:
        return
    if len(tasks) == 1:
        result = tasks[0]()
        mx.eval(result)
        yield result
        return
    pool = _thread_pool(core_count(device))
    # Two threads whose products each take all cores would wait for each other.
    with blas.threads(1):
        futures = [pool.submit(_compute, device, task) for task in tasks]
        try:
            # Popped, so that a result is freed as soon as the caller is done with it.
            while futures:
                yield futures.pop(0).result()
        finally:
            wait(futures)


@cache
def _thread_pool(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="mindprint-mlx")


def _compute(device: mx.Device, task: Callable[[], T]) -> T:
    with mx.stream(_thread_stream(device)):
        with BUILDING, points.noted() as on_the_way:
            result = task()
        points.evaluate(on_the_way)
        mx.eval(result)
    return result


_thread = local()


def _thread_stream(device: mx.Device) -> mx.Stream:
    # MLX lets no other thread use a stream, so that each thread makes one and keeps it.
    if not hasattr(_thread, "stream"):
        _thread.stream = mx.new_stream(device)
    stream: mx.Stream = _thread.stream
    return stream


def groups_of_equal_work(lengths: Int32, count: int, least: int = 1) -> list[Rows]:
    """Return rows in groups of like length and about as many tokens, for `count` cores that work at the same time.

    There is one group where a core would have less than `least` tokens. Core's `layouts.groups_of_like_length` is for
    one reader that takes groups in turn: it minimises padding, and its groups may be as unequal as they like.
    """
    total = int(lengths.sum())
    if count == 1 or total < count * least:
        return [np.arange(len(lengths))]
    # A multiple of the cores, so that none waits for the last group of the others.
    groups = count * -(-total // (count * GROUP_TOKENS))
    order = np.argsort(lengths, kind="stable")
    # A row goes to the group in whose share of all tokens its middle lies.
    middles = np.cumsum(lengths[order]) - lengths[order] / 2
    numbers = (middles * groups / total).astype(int)
    return [order[numbers == number] for number in np.unique(numbers)]


def token_groups(model: MlxModel, batch: TokenBatch) -> list[Rows]:
    """Return groups of a batch's rows, for `layouts.token_rows`. Rows that share a prompt stay together."""
    if batch.shared is None:
        return _row_groups(model, batch.lengths)
    half = len(batch.shared)
    own = batch.lengths[:half] + batch.lengths[half:] - batch.shared
    return [np.concatenate([pairs, pairs + half]) for pairs in _row_groups(model, own)]


def pair_groups(model: MlxModel, batch: PreferenceBatch) -> list[Rows]:
    """Return groups of a batch's pairs."""
    return _row_groups(model, pair_lengths(batch))


def _row_groups(model: MlxModel, lengths: Int32) -> list[Rows]:
    least = max(LEAST_TOKENS, LEAST_WORK // max(model.parameters, 1))
    return groups_of_equal_work(lengths, core_count(model.device), least)
