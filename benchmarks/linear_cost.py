"""The cost of a step by the length of its sequences: seconds a token up to `max_length`, as a plot in text.

    python benchmarks/linear_cost.py [--backend torch] [--max-length 1024] [--rows 2] [--repeats 3]

SFT steps of the 50M-parameter model of the comparisons; the second half of every sequence is the completion.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import numpy as np

from mindprint.contract import TokenBatch, Update
from side_by_side import contestants, work

WIDTH = 50


def main() -> None:
    """Print seconds and milliseconds a token for each length, and how well a straight line fits."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backend", default="torch")
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    lengths = [arguments.max_length * eighth // 8 for eighth in range(1, 9)]
    with tempfile.TemporaryDirectory() as folder:
        work.write_model(Path(folder))
        step = stepper(arguments.backend, Path(folder), arguments.rows)
        step(lengths[-1])  # the longest first, untimed: it fills caches and memory pools
        rounds = [[step(length) for length in lengths] for _ in range(arguments.repeats)]
    seconds = [statistics.median(column) for column in zip(*rounds, strict=True)]
    for length, second in zip(lengths, seconds, strict=True):
        bar = "#" * round(WIDTH * second / max(seconds))
        print(
            f"{length:6d} tokens a row {second:7.3f} s {1000 * second / length / arguments.rows:6.2f} ms/token  {bar}"
        )
    # Attention is quadratic: how little a straight line leaves unexplained says how little that matters here.
    slope, start = np.polyfit(lengths, seconds, 1)
    rest = np.asarray(seconds) - (slope * np.asarray(lengths) + start)
    explained = 1 - rest.var() / np.var(seconds)
    print(f"{arguments.backend}: a straight line explains {100 * explained:.2f} % of the variance")


def stepper(backend_name: str, folder: Path, rows: int) -> Callable[[int], float]:
    """Return a function that takes an SFT step on rows of a length and returns its seconds."""
    backend, model = contestants.loaded(backend_name, folder)

    def step(length: int) -> float:
        tokens = np.random.default_rng(length).integers(work.FIRST_WORD, work.VOCABULARY, (rows, length))
        mask = np.broadcast_to(np.arange(length) >= length // 2, tokens.shape)
        batch = TokenBatch(tokens.astype(np.int32), np.full(rows, length, np.int32), mask)
        started = perf_counter()
        backend.sft_step(model, [batch], Update(work.LEARNING_RATE, batch.loss_tokens))
        return perf_counter() - started

    return step


if __name__ == "__main__":
    main()
