"""Mindprint on one GPU next to TRL, with and without Liger's kernels: speed, memory, losses, parity, generation.

    bash benchmarks/gpu.sh run --out results          # at most 8 minutes on an H100
    python benchmarks/gpu.py --tiny                   # the same code on tiny shapes, on a CPU too

`gpu.sh` installs everything that a bare machine lacks. The figures are printed as they come, and written to `gpu.json`
in the folder of `--out` (or of the environment's `OUT`). Each contestant is a process, so that one that fails or runs
out of memory loses only its own figures. A run keeps within `--seconds`. The most valuable sections come first, and
those that do not fit are left out.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from on_gpu.sections import FULL, SECTIONS, TINY, OutOfTime, Run, measure_peak, say, title
from on_gpu.workers import CallError, Workers

LOG_CHARACTERS = 200_000
"""The characters of each worker's log that are kept."""


def main() -> int:
    """Run the sections that were asked for. Return 1 if anything failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS), metavar="SECTION",
                        help=f"some of: {', '.join(SECTIONS)}")  # fmt: skip
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, which try every call on any device")
    parser.add_argument("--lengths", nargs="+", type=int, help="other lengths of rows, the most important first")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "gpu-results")), help="a folder")
    parser.add_argument("--seconds", type=float, default=460.0, help="the time of the whole run (default: 460)")
    parser.add_argument("--patience", type=float, default=1.0, help="a factor of every call's own limit")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as logs:
        workers = Workers(Path(logs))
        try:
            sizes = TINY if options.tiny else FULL
            if options.lengths:
                sizes = replace(sizes, lengths=tuple(options.lengths))
            return measure(Run(options.out, workers, sizes, options.seconds, options.patience), options.only)
        finally:
            workers.stop()
            keep_logs(Path(logs), options.out / "workers.log")


def keep_logs(folder: Path, file: Path) -> None:
    """Write the ends of all workers' logs into one file."""
    logs = sorted(folder.glob("*.log"), key=lambda log: int(log.stem.rpartition("-")[2]))
    ends = (f"== {log.stem}\n{log.read_text(errors='replace')[-LOG_CHARACTERS:]}\n" for log in logs)
    file.write_text("".join(ends))


def measure(run: Run, names: list[str]) -> int:
    """Measure the peak, then each section, as long as there is time."""
    run.workers.prepare(2)
    with run.surviving("peak", "the section"):
        measure_peak(run)
    if run.device == "cpu" and run.sizes.models == FULL.models:
        say("no CUDA device is visible; `--tiny` tries the same code on a CPU")
        return 0
    for name in (name for name in SECTIONS if name in names):
        try:
            SECTIONS[name](run)
        except OutOfTime:
            say(f"  {name}: no time left (--seconds {run.seconds:.0f})")
            run.keep(name, skipped="no time left")
        except CallError as error:
            run.fail(name, "the section", error)
    title(run, f"done, {len(run.failures)} failures")
    for failure in run.failures:
        say(f"  {failure}")
    return 1 if run.failures else 0


if __name__ == "__main__":
    sys.exit(main())
