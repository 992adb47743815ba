"""The time of commands that compute nothing, and the heavy libraries that they import.

    python benchmarks/startup.py

Medians of seven starts each, next to that of an interpreter that does nothing. Then `--help` with thirty dummy plugins
installed and with none, in turns.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "packages" / "mindprint-core" / "tests"))

from toy_base import install_dummies

COMMANDS = ("--help", "plugins", "--version")
HEAVY = ("torch", "mlx", "transformers", "datasets", "pandas")
STARTS = 7


def main() -> None:
    """Print a line for each command."""
    print(f"heavy: {', '.join(HEAVY)}")
    print(f"{'interpreter':22s} {median([sys.executable, '-c', 'pass']):6.3f} s")
    for command in COMMANDS:
        seconds = median([sys.executable, "-m", "mindprint", command])
        print(f"{'mindprint ' + command:22s} {seconds:6.3f} s   heavy imports: {imported(command) or 'none'}")
    more = with_dummies(30)
    print(f"30 dummy plugins cost --help {1000 * more:.0f} ms more than none (must stay under 100)")


def with_dummies(count: int) -> float:
    """Return how many seconds longer `--help` takes with plugins installed, from medians of starts in turns."""
    with tempfile.TemporaryDirectory() as many, tempfile.TemporaryDirectory() as none:
        install_dummies(Path(many), count)
        times: dict[str, list[float]] = {many: [], none: []}
        # In turns, so that a slow moment of the machine hits both.
        for _ in range(STARTS):
            for site, taken in times.items():
                started = time.perf_counter()
                command = [sys.executable, "-m", "mindprint", "--help"]
                subprocess.run(command, check=True, capture_output=True, env={**os.environ, "PYTHONPATH": site})
                taken.append(time.perf_counter() - started)
    return statistics.median(times[many]) - statistics.median(times[none])


def median(command: list[str]) -> float:
    times = []
    for _ in range(STARTS):
        started = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def imported(command: str) -> str:
    # In a fresh interpreter: this one has imported who knows what.
    code = (
        "import sys; from mindprint.cli import main\n"
        f"main([{command!r}])\n"
        f"print(*(name for name in {HEAVY!r} if name in sys.modules), file=sys.stderr)"
    )
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stderr.strip()


if __name__ == "__main__":
    main()
