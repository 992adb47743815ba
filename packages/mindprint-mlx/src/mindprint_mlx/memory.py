"""Who keeps freed memory: the process, so that the next step need not ask for it again."""

from __future__ import annotations

import ctypes
import gc
import platform
from functools import cache

import mlx.core as mx

MMAP_THRESHOLD, TRIM_THRESHOLD, ARENA_MAX = -3, -1, -8
"""`mallopt`'s names for them in glibc."""

KEPT_BYTES = 2**30
OLD_GLIBC_LIMIT = 32 * 2**20


@cache
def prepare(device: mx.Device) -> None:
    """Let a process keep what a step frees: on Metal wired, as mlx-lm does; on Linux CPUs in glibc's heap.

    MLX has no cache of buffers on CPUs. The C library gives every large array back to the system as soon as it is
    freed, and the system clears the pages of the next one.
    """
    if mx.metal.is_available() and device == mx.Device(mx.gpu):
        mx.set_wired_limit(int(mx.device_info(device)["max_recommended_working_set_size"]))
    elif library := _glibc():
        if not library.mallopt(MMAP_THRESHOLD, KEPT_BYTES):
            library.mallopt(MMAP_THRESHOLD, OLD_GLIBC_LIMIT)
        library.mallopt(TRIM_THRESHOLD, KEPT_BYTES)
        # What one thread frees, another can take: with a heap each, a step kept half as much again as it used at once.
        library.mallopt(ARENA_MAX, 1)


def give_back() -> None:
    """Return what nothing uses any more to the system."""
    gc.collect()
    mx.clear_cache()
    if library := _glibc():
        library.malloc_trim(0)


@cache
def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
