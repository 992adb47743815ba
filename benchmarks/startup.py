"""How long the commands that compute nothing take to answer, and what they import.

    python benchmarks/startup.py

Medians of seven starts each, beside that of an interpreter that does nothing.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

COMMANDS = ("--help", "plugins", "--version")
HEAVY = ("torch", "mlx", "transformers", "datasets", "pandas")
STARTS = 7


def main() -> None:
    """Print one line a command."""
    print(f"heavy: {', '.join(HEAVY)}")
    print(f"{'interpreter':22s} {median([sys.executable, '-c', 'pass']):6.3f} s")
    for command in COMMANDS:
        seconds = median([sys.executable, "-m", "mindprint", command])
        print(f"{'mindprint ' + command:22s} {seconds:6.3f} s   heavy imports: {imported(command) or 'none'}")


def median(command: list[str]) -> float:
    times = []
    for _ in range(STARTS):
        started = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def imported(command: str) -> str:
    code = (
        "import sys; from mindprint.cli import main\n"
        f"main([{command!r}])\n"
        f"print(*(name for name in {HEAVY!r} if name in sys.modules), file=sys.stderr)"
    )
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stderr.strip()


if __name__ == "__main__":
    main()
