"""Seconds to find near-duplicates among prompts made from one template: `python benchmarks/near_duplicates.py`.

The time should grow with the number of prompts, and most prompts should be in a group of their own kind: with one
single group the split holds out nothing.
"""

from __future__ import annotations

import random
import time

import numpy as np

from mindprint.text.near_duplicates import near_duplicate_groups

TEMPLATE = "Please write a short letter to {} in which you tell them how the {} of the {} came to be lost."
SIZES = (3_200, 10_000, 50_000)


def prompts(count: int) -> list[str]:
    """Return different prompts from one template, with words of three lists."""
    rng = random.Random(0)  # noqa: S311 (the same words each time)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(3, 9))) for _ in range(120)]
    made: dict[str, None] = {}
    while len(made) < count:
        made[TEMPLATE.format(*rng.choices(words, k=3))] = None
    return list(made)


def main() -> None:
    for count in SIZES:
        texts = prompts(count)
        started = time.perf_counter(), time.process_time()
        groups = near_duplicate_groups(texts)
        seconds, computed = time.perf_counter() - started[0], time.process_time() - started[1]
        sizes = np.unique(groups, return_counts=True)[1]
        print(
            f"{count:6,} prompts: {seconds:5.1f} s ({computed:.1f} s of processor), {len(sizes):,} groups, "
            f"the largest of {sizes.max():,}",
            flush=True,
        )


if __name__ == "__main__":
    main()
