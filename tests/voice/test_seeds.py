"""Runs that differ only in their seed: do their voices differ by less than their intervals say?"""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path

import numpy as np

import mindprint
from mindprint.cli import main
from mindprint.voice.scoring import VoiceScore

RUNS, AGREE = 20, 18
BACKENDS = ("torch", "mlx")


def backend() -> str:
    """Return the backend that is installed. `nox -s voice` installs one."""
    found = {point.name for point in entry_points(group="mindprint.backends")}
    return next(name for name in BACKENDS if name in found)


def test_the_intervals_of_runs_that_differ_only_in_seed_overlap(tmp_path: Path) -> None:
    """The embedded example with the built-in tiny model, which needs no download."""
    name = backend()
    assert main(["init", str(tmp_path / "voice")]) == 0
    scores = []
    for seed in range(RUNS):
        run = mindprint.train(
            str(tmp_path / "voice"), seed=seed, backend=name, evaluation={"levels": []}, run=tmp_path / f"run-{seed}"
        ).run
        found = mindprint.evaluate(run).voice
        assert found is not None and isinstance(found.overall.tuned, VoiceScore)
        score = found.overall.tuned
        print(f"seed {seed:2d}: {score.value:.2f} ({score.low:.2f} to {score.high:.2f})", flush=True)
        scores.append(score)
    middle = sorted(scores, key=lambda score: score.value)[RUNS // 2]
    overlapping = [score.low <= middle.high and middle.low <= score.high for score in scores]
    print(f"{sum(overlapping)} of {RUNS} intervals overlap that of the run in the middle; the values spread by "
          f"{np.std([score.value for score in scores]):.3f}")  # fmt: skip
    assert sum(overlapping) >= AGREE
