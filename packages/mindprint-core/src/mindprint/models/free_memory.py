"""Memory of this machine: how much is free for a run, and the return of what a program no longer needs."""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
_PROCESS = Path("/proc/self")
_MMAP_THRESHOLD = -3
"""M_MMAP_THRESHOLD of glibc's malloc.h: larger blocks are mapped each for itself."""


def free_bytes() -> int | None:
    """Return the bytes that a program can take without pushing others out, None where the system does not say."""
    if _MEMINFO.is_file():
        available = _field(_MEMINFO.read_text(encoding="ascii"), r"MemAvailable:\s+(\d+) kB")
        free = None if available is None else available * 1024
        limits = [value for value in (free, _container_free()) if value is not None]
        return min(limits, default=None)
    return _free_on_macos()


def reset_peak() -> int | None:
    """Begin to measure the most memory that this process has resident, and return its present size in bytes.

    Returns None where the system does not tell: anywhere but on Linux.
    """
    try:
        # proc(5): 5 sets the highest resident size to the present one.
        (_PROCESS / "clear_refs").write_text("5", encoding="ascii")
        return _kilobytes("VmRSS")
    except OSError:
        return None


def peak_bytes() -> int | None:
    """Return the most memory that was resident since `reset_peak`, in bytes, None where the system does not tell."""
    try:
        return _kilobytes("VmHWM")
    except OSError:
        return None


def trim_heap() -> None:
    """Return freed memory of the C heap to the system, where the C library is glibc. Elsewhere do nothing.

    glibc keeps blocks that were freed, up to 32 MiB each, because the program may ask again (mallopt(3)). After
    loading a model it will not: conversions of weights leave several tens of megabytes.
    """
    if sys.platform != "linux":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def return_freed_arrays() -> None:
    """Let glibc give every freed array of 256 KiB or more back to the system at once. Elsewhere do nothing.

    A program that allocates and frees whole layers between arrays that it keeps would leave gaps of their size.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        # Set once, the threshold no longer rises to the size of the largest array that was freed (mallopt(3)).
        mallopt(_MMAP_THRESHOLD, 256 << 10)


def _container_free() -> int | None:
    """Return the bytes left of a container's limit (cgroup, version 2), None without a limit."""
    try:
        limit = (_CGROUP / "memory.max").read_text(encoding="ascii").strip()
        used = int((_CGROUP / "memory.current").read_text(encoding="ascii"))
        # Cached file pages count as used, and are given back when memory is short.
        cached = _field((_CGROUP / "memory.stat").read_text(encoding="ascii"), r"^inactive_file (\d+)$") or 0
        return None if limit == "max" else max(int(limit) - used + cached, 0)
    except (OSError, ValueError):
        return None


def _free_on_macos() -> int | None:
    try:
        report = subprocess.run(["/usr/bin/vm_stat"], capture_output=True, text=True, check=True, timeout=5).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    page = _field(report, r"page size of (\d+) bytes")
    # Inactive and purgeable pages are given away before anything is swapped out.
    pages = [_field(report, rf"Pages {kind}:\s+(\d+)") for kind in ("free", "inactive", "speculative", "purgeable")]
    counted = [count for count in pages if count is not None]
    return page * sum(counted) if page and counted else None


def _kilobytes(name: str) -> int | None:
    size = _field((_PROCESS / "status").read_text(encoding="utf-8"), rf"^{name}:\s+(\d+) kB")
    return None if size is None else 1024 * size


def _field(text: str, pattern: str) -> int | None:
    match = re.search(pattern, text, re.MULTILINE)
    return int(match[1]) if match else None
