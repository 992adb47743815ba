"""Groups of a micro-batch's rows, which the cores of a CPU read at the same time.

MLX computes on one thread a stream, and only matrix products use more. So groups of rows (`division.py`) are taken from
a queue by as many threads as there are cores, each with its own stream, and products that take no other core. It also
takes less padding, and fewer activations at once. Gradients are sums over rows, so that nothing changes but their
rounding. They are added in the order of the groups, whichever is done first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from functools import cache
from threading import Lock, local
from typing import TypeVar

import mlx.core as mx

from mindprint import layouts
from mindprint.contract import Int32, TokenBatch
from mindprint_mlx import blas, division, points
from mindprint_mlx.division import PairGroup, Rows, Work
from mindprint_mlx.model import MlxModel

MOST_THREADS = 8

LEAST_TOKENS = 64
LEAST_WORK = 10**9
"""A batch with fewer tokens a core, or fewer times the model's parameters, is not worth a graph for each group."""

READ_TOKENS = 32
READ_WORK = 10**9
"""A further read costs about as much as this many tokens, or as this number divided by the model's parameters."""

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
    if len(tasks) == 1 or core_count(device) == 1:
        for task in tasks:
            result = task()
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


def work_of(model: MlxModel) -> Work | None:
    """Return the cores that read a micro-batch of this model and the costs of reading, or None on a GPU."""
    return work(model.device, model.parameters, model.head_tokens)


def work(device: mx.Device, parameters: int, head_tokens: float) -> Work | None:
    """Return the cores that read a micro-batch and the costs of reading, or None on a GPU.

    Args:
        device: The device that computes.
        parameters: The number of the model's parameters.
        head_tokens: How many tokens the model's body reads in the time of one log-prob.
    """
    if device != mx.Device(mx.cpu):
        return None
    least = max(LEAST_TOKENS, LEAST_WORK // max(parameters, 1))
    read = max(READ_TOKENS, READ_WORK // max(parameters, 1))
    return Work(core_count(device), read, head_tokens, least)


def token_groups(model: MlxModel, batch: TokenBatch) -> list[tuple[Rows, TokenBatch]]:
    """Return groups of a batch's rows, and the rows themselves. Of two rows that share a prompt, both or one."""
    if batch.shared is None:
        return [(rows, layouts.token_rows(batch, rows)) for rows in division.row_groups(batch, work_of(model))]
    pairs = len(batch.shared)
    completions = batch.lengths.reshape(2, pairs) - batch.shared
    groups = pair_groups(model, batch.shared, completions)
    alone = replace(batch, shared=None)
    return [
        (rows, layouts.token_rows(alone if group.apart else batch, rows))
        for group in groups
        for rows in group.rows(pairs)
    ]


def pair_groups(model: MlxModel, prompts: Int32, completions: Int32, *, share_prompts: bool = True) -> list[PairGroup]:
    """Return groups of pairs, by the lengths of prompts, `[pairs]`, and completions, `[2, pairs]`."""
    # A loss scale keeps small gradients from vanishing only if it is in the loss that is differentiated.
    share = share_prompts and int(prompts.max() + completions.max()) <= model.longest_shared
    return division.pair_groups(prompts, completions, work_of(model), share=share, split=model.loss_scale is None)
