"""Freed memory, which the process keeps, so that the next step need not ask for it again."""

from __future__ import annotations

import ctypes
import gc
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import mlx.core as mx

MMAP_THRESHOLD, TRIM_THRESHOLD, ARENA_MAX = -3, -1, -8
"""The numbers of these settings of `mallopt` in glibc's malloc.h."""

KEPT_BYTES = 2**30
"""Arrays up to this size come from the heap and stay in it. Newer versions of glibc allow any limit."""

SMALL_BYTES = 2**17
"""Arrays up to this size come from the heap while a model is loaded: glibc's own first limit."""

OLD_GLIBC_LIMIT = 32 * 2**20
"""The most that other versions accept (`DEFAULT_MMAP_THRESHOLD_MAX` on 64 bits)."""


@contextmanager
def loading(device: mx.Device) -> Iterator[None]:
    """Keep no freed memory within this context. Afterwards keep what a step frees, on Metal wired, as mlx-lm does."""
    # Tensors are read and cast one by one. MLX would keep the buffers of those that are done for others of their size,
    # and the heap has holes that a larger tensor does not fit into: together a tenth of the weights and more.
    before = mx.set_cache_limit(0)
    library = _glibc()
    if library:
        library.mallopt(MMAP_THRESHOLD, SMALL_BYTES)
    try:
        yield
    finally:
        mx.set_cache_limit(before)
        give_back()
        if mx.metal.is_available() and device == mx.Device(mx.gpu):
            mx.set_wired_limit(int(mx.device_info(device)["max_recommended_working_set_size"]))
        elif library:
            _keep_freed(library)


def _keep_freed(library: ctypes.CDLL) -> None:
    """Make the C library keep the memory that a step frees."""
    # It gives every large array back to the system as soon as it is freed, and the system clears the pages of the next
    # one: 6 % of a step and more.
    if not library.mallopt(MMAP_THRESHOLD, KEPT_BYTES):
        library.mallopt(MMAP_THRESHOLD, OLD_GLIBC_LIMIT)
    library.mallopt(TRIM_THRESHOLD, KEPT_BYTES)
    # One heap for all threads, so that each can take the memory that another has freed. With a heap each, a step
    # kept half as much again as it used at once.
    library.mallopt(ARENA_MAX, 1)


def give_back() -> None:
    """Return unused memory to the system."""
    gc.collect()
    mx.clear_cache()
    if library := _glibc():
        library.malloc_trim(0)


@cache
def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
