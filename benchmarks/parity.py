"""The numbers of torch and MLX next to each other: the table of docs/numerics.md, and all of docs/architectures.md.

    python benchmarks/parity.py numbers
    python benchmarks/parity.py architectures > docs/architectures.md

The work is that of `tests/parity`: the same random models, batches and projects, in float32 on the CPU.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch  # isort: skip  (first: it then keeps its own BLAS)
import mindprint_mlx  # noqa: F401  # isort: skip  (before mlx: it decides what MLX multiplies matrices with)
import numpy as np

import mindprint
from architectures import MATRIX, architectures_page, compare
from mindprint.contract import Update
from mindprint.runs.folder import RunFolder
from parity_cases import (
    Opened,
    losses,
    open_model,
    relative_difference,
    take_step,
    token_batch,
    trajectory_project,
)
from random_models import save_qwen2

STEPS = 100


def main() -> None:
    """Print the table or the page that was asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("table", choices=sorted(TABLES))
    with tempfile.TemporaryDirectory() as folder:
        for line in TABLES[parser.parse_args().table](Path(folder)):
            print(line, flush=True)


def numbers(folder: Path) -> Iterator[str]:
    """Yield the table of deviations of torch from MLX."""
    model = save_qwen2(folder / "qwen2")
    yield "| compared | tolerance | seen |"
    yield "|---|---|---|"
    mean, greatest = log_prob_deviation(model)
    yield f"| log-probs, a token | 1e-5 mean, 1e-4 greatest | {mean:.1e} mean, {greatest:.1e} greatest |"
    yield f"| SFT gradients, the worst adapter tensor | 1e-4 relative norm | {gradient_deviation(model):.1e} |"
    for stage in ("sft", "dpo"):
        seen = resynchronised(model, stage)
        yield f"| {stage.upper()} loss, re-synchronised before each of {STEPS} steps | 1e-5 · (1 + loss) | {seen:.1e} |"
    # One project for all runs, so that they differ in the backend or the number of threads alone.
    (folder / "data").mkdir()
    project = trajectory_project(model, folder / "data", STEPS)
    runs = {name: train(project, folder / name, name) for name in ("torch", "mlx")}
    with torch_threads(1):
        runs["torch, one thread"] = train(project, folder / "one", "torch")
    tolerances = {"sft": "1e-5", "dpo": "1e-3"}
    for stage, tolerance in tolerances.items():
        seen = curve_deviation(runs["torch"], runs["mlx"], stage)
        yield f"| {stage.upper()} loss, {STEPS} steps running free | {tolerance} · (1 + loss) | {seen:.1e} |"
    for stage in tolerances:
        seen = curve_deviation(runs["torch"], runs["torch, one thread"], stage)
        threads = f"torch with {torch.get_num_threads()} threads and with 1"
        yield f"| {stage.upper()} loss, {STEPS} steps running free: {threads} | | {seen:.1e} |"


def log_prob_deviation(model: Path) -> tuple[float, float]:
    """Return the mean and the greatest difference of log-probs, in nats a token."""
    batch = token_batch(1)
    first, second = (each.backend.log_probs(each.model, batch) for each in both(model))
    difference = np.abs(first - second)[batch.loss_mask]
    return float(difference.mean()), float(difference.max())


def gradient_deviation(model: Path) -> float:
    """Return the greatest relative norm of a difference of gradients, over all adapter tensors."""
    # AdamW's first moments after one step are 0.1 times the gradients.
    batch = token_batch(1)
    states = []
    for each in both(model):
        each.backend.sft_step(each.model, [batch], Update(1e-3, tokens=batch.loss_tokens, max_grad_norm=None))
        states.append(each.save().first_moments)
    return max(
        relative_difference(first, second)
        for site, factors in states[0].items()
        for first, second in zip(factors, states[1][site], strict=True)
    )


def resynchronised(model: Path, stage: str) -> float:
    """Return the greatest deviation of a loss over 1 + loss, where both restore one state before each step."""
    first, second = both(model)
    greatest = 0.0
    for step in range(STEPS):
        # Trajectories amplify rounding: from one state, only the difference of a single step is left.
        second.restore(first.save())
        first_loss, second_loss = (take_step(opened, stage, step).loss for opened in (first, second))
        greatest = max(greatest, abs(first_loss - second_loss) / (1 + abs(first_loss)))
    return greatest


def both(model: Path) -> tuple[Opened, Opened]:
    """Open the model on torch and on MLX."""
    return open_model("torch", model), open_model("mlx", model)


def train(project: dict[str, object], run: Path, backend: str) -> RunFolder:
    """Train a project on a backend."""
    mindprint.train(project, run=run, backend={"type": backend})
    return RunFolder(run)


def curve_deviation(first: RunFolder, second: RunFolder, stage: str) -> float:
    """Return the greatest deviation of two runs' losses over 1 + loss."""
    first_losses, second_losses = losses(first, stage), losses(second, stage)
    return float(np.max(np.abs(first_losses - second_losses) / (1 + np.abs(first_losses))))


class torch_threads:  # noqa: N801  (a context manager)
    """A context in which torch computes with a number of threads."""

    def __init__(self, threads: int) -> None:
        self._threads, self._before = threads, torch.get_num_threads()

    def __enter__(self) -> None:
        torch.set_num_threads(self._threads)

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self._before)


def architectures(folder: Path) -> Iterator[str]:
    """Yield the lines of docs/architectures.md, made of rows that are computed now."""
    rows = [compare(model_type, folder / model_type) for model_type in sorted(MATRIX)]
    yield from architectures_page(rows).splitlines()


TABLES = {"numbers": numbers, "architectures": architectures}


if __name__ == "__main__":
    from transformers.utils import logging as transformers_logging

    logging.disable()
    transformers_logging.disable_progress_bar()
    main()
