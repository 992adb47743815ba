"""Threads that write parts of large files: positions are absolute (pread, pwrite), so that they need no lock."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

from mindprint import atomic

COPY_BYTES = 2**24
WORKERS = min(4, os.cpu_count() or 1)


class FileThreads:
    """Two pools of threads: one works on parts of files, few at a time, the other flushes files in the background."""

    def __init__(self) -> None:
        self._work, self._flush = ThreadPoolExecutor(WORKERS), ThreadPoolExecutor(1)
        self._waiting: deque[Future[None]] = deque()
        self._flushed: list[Future[None]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, failed: object, *_: object) -> None:
        for pool in (self._work, self._flush):
            # After a failure the rest of the work is dropped, because its folder is removed anyway.
            pool.shutdown(cancel_futures=failed is not None)
        if failed is None:
            for flushed in self._flushed:
                flushed.result()  # the kernel tells of a failed write once, to whoever flushes first

    def do(self, task: Callable[..., None], *arguments: Any) -> None:
        """Run a task in the background, and wait first if too many are waiting already."""
        self._waiting.append(self._work.submit(task, *arguments))
        # A bounded queue: parts that wait hold copies of their factors, and a shard can have thousands.
        if len(self._waiting) > 4 * WORKERS:
            self._waiting.popleft().result()

    def wait(self) -> None:
        """Wait for every task, and raise what one of them raised."""
        while self._waiting:
            self._waiting.popleft().result()

    def flush(self, path: Path) -> None:
        """Flush a file to the disk in the background."""
        self._flushed.append(self._flush.submit(atomic.sync, path))

    def copy(self, source: int, target: int, stretch: tuple[int, int], at: int) -> None:
        """Copy the bytes of a stretch of one open file to the place `at` in another."""
        start, stop = stretch
        for position in range(start, stop, COPY_BYTES):
            length = min(COPY_BYTES, stop - position)
            self.do(_copy_part, source, target, position, length, at + position - start)


def write_at(target: int, content: bytes | memoryview, start: int) -> None:
    """Write bytes at a place of an open file, however many calls that takes."""
    while content:
        written = os.pwrite(target, content, start)
        content, start = content[written:], start + written


def _copy_part(source: int, target: int, start: int, length: int, at: int) -> None:
    write_at(target, os.pread(source, length, start), at)
