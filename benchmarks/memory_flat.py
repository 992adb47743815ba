"""Resident memory of this process over a thousand steps of SFT, then of DPO: it must stay flat.

    python benchmarks/memory_flat.py [--backend torch] [--model FOLDER] [--steps 1000]

Trains on the first topic of the sample curriculum through `mindprint.train`, checkpoints and guards included.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
from collections import defaultdict
from importlib.resources import files
from pathlib import Path

import mindprint
from mindprint.events import Event, StepDone

SETTLED = 50
"""The step from which memory must not grow: pools and caches have been filled by then."""


def resident_mib() -> float:
    """Return resident memory now, or the most so far where /proc is missing."""
    status = Path("/proc/self/statm")
    if status.exists():
        return int(status.read_text(encoding="ascii").split()[1]) * resource.getpagesize() / 2**20
    # ru_maxrss never falls, so that it shows growth but not its end.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Print memory along the way, and how far it strays from that of step 50."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backend", default="torch")
    parser.add_argument("--model", default="builtin:tiny")
    parser.add_argument("--steps", type=int, default=1000, help="of each stage")
    arguments = parser.parse_args()
    seen: dict[str, list[float]] = defaultdict(list)

    def note(event: Event) -> None:
        if isinstance(event, StepDone):
            seen[event.stage].append(resident_mib())

    with tempfile.TemporaryDirectory() as folder:
        mindprint.train(configuration(arguments, Path(folder)), run=Path(folder) / "run", on_event=note)
    for stage, memory in seen.items():
        # Relative to the step by which pools and caches were filled: growth after it would be a leak.
        base = memory[SETTLED - 1]
        least, greatest = (100 * (bound(memory[SETTLED:]) / base - 1) for bound in (min, max))
        steps = [step for step in (1, SETTLED, 100, 200, 500, 1000, 2000) if step <= len(memory)]
        print(
            f"{arguments.backend} {stage}: " + ", ".join(f"step {step}: {memory[step - 1]:.0f} MiB" for step in steps)
        )
        print(f"  from step {SETTLED} to {len(memory)}: {least:+.2f} % to {greatest:+.2f} % of {base:.0f} MiB")


def configuration(arguments: argparse.Namespace, folder: Path) -> dict[str, object]:
    """Return a configuration with one topic of the sample curriculum, so that a stage is as long as asked."""
    curriculum = Path(str(files("mindprint").joinpath("resources", "curriculum")))
    for name in ("sft.jsonl", "preferences.jsonl"):
        lines = (curriculum / name).read_text(encoding="utf-8").splitlines(keepends=True)
        topic = json.loads(lines[0])["topic"]
        rows = [line for line in lines if json.loads(line)["topic"] == topic]
        (folder / name).write_text("".join(rows), encoding="utf-8")
    steps = {"steps_per_topic": arguments.steps}
    return {
        "model": {"name": arguments.model},
        "backend": arguments.backend,
        "data": {"path": str(folder)},
        "sft": steps,
        "dpo": steps,
    }


if __name__ == "__main__":
    main()
