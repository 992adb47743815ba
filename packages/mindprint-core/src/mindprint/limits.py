"""A limit on time and memory for code that came with somebody else's files, such as a chat template."""

from __future__ import annotations

import os
import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MEMORY = 2**29
"""Bytes that limited code may add to those of the process."""

_PAGES = Path("/proc/self/statm")


class LimitError(Exception):
    """A limit was reached; the message says which."""


@contextmanager
def limited(seconds: float, memory: int = MEMORY) -> Iterator[None]:
    """Raise `LimitError` if the block takes longer or needs more memory.

    Time is limited in the main thread, where Python handles signals. Memory is limited where the system tells how much
    a process has mapped (Linux). Elsewhere the block runs as it is.
    """
    try:
        with _time_limit(seconds), _memory_limit(memory):
            yield
    except MemoryError:
        raise LimitError(f"takes more than {memory // 2**20} MB of memory") from None


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    # A process has one such timer. If it runs already, it belongs to a caller, whose limit a new one would cancel.
    if threading.current_thread() is not threading.main_thread() or signal.getitimer(signal.ITIMER_REAL)[0]:
        yield
        return

    def stop(_signal: int, _frame: object) -> None:
        raise LimitError(f"takes more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    # Again every second: an exception can be lost where C code calls back into Python.
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _memory_limit(memory: int) -> Iterator[None]:
    if not _PAGES.is_file():
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    # The limit counts all that is mapped, so it starts from the present size: the first field of statm, in pages
    # (proc(5)).
    mapped = int(_PAGES.read_text(encoding="ascii").split()[0]) * os.sysconf("SC_PAGE_SIZE")
    wanted = mapped + memory
    if soft != resource.RLIM_INFINITY:
        wanted = min(wanted, soft)
    resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
