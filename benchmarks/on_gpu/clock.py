"""Seconds and peak memory of work on a device."""

from __future__ import annotations

import gc
import resource
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any


def wait_for(device: str) -> None:
    """Return when the device has done everything that it was given."""
    import torch  # noqa: PLC0415

    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(device: str, action: Callable[[], Any], repeats: int, warm_up: int) -> list[float]:
    """Return the seconds of each of `repeats` runs, the device's work included."""
    for _ in range(warm_up):
        action()
    seconds = []
    for _ in range(repeats):
        wait_for(device)
        started = perf_counter()
        action()
        wait_for(device)
        seconds.append(perf_counter() - started)
    return seconds


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Return the median, the least and the greatest of times."""
    return {"seconds": statistics.median(seconds), "least": min(seconds), "greatest": max(seconds)}


def start_peak(device: str) -> None:
    """Free cached memory, and measure peak memory from here."""
    import torch  # noqa: PLC0415

    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib(device: str) -> float:
    """Return the peak of this process: of the device's tensors since `start_peak`, or of all memory on a CPU."""
    import torch  # noqa: PLC0415

    if device == "cuda":
        return float(torch.cuda.max_memory_allocated()) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def held_gib(device: str) -> float:
    """Return the memory that this process holds now: of the device's tensors, or all that is resident on a CPU."""
    import torch  # noqa: PLC0415

    gc.collect()
    if device == "cuda":
        return float(torch.cuda.memory_allocated()) / 2**30
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 2**20 for line in lines if line.startswith("VmRSS:"))
