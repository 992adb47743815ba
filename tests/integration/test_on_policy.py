"""Pairs on policy on both backends: the embedded model gives the same greedy answers to the same prompts."""

from __future__ import annotations

import json
from pathlib import Path

import mindprint

ROWS = [
    {"prompt": "Is it far?", "completion": "Far enough that my boots and I stopped talking."},
    {"prompt": "Will it rain?", "completion": "It will, and it will not ask you first."},
    {"prompt": "Is it far?", "chosen": "Far enough to be sorry, and near enough to go.", "rejected": "It is far."},
    {"prompt": "Will it rain?", "chosen": "Ask the cows. They have sat down.", "rejected": "It might rain."},
]


def test_both_backends_answer_the_prompts_of_their_pairs_alike(tmp_path: Path) -> None:
    runs = []
    for backend in ("torch", "mlx"):
        config = {
            "model": "builtin:tiny",
            "backend": {"type": backend, "device": "cpu", "dtype": "float32"},
            "data": {"path": None, "heldout_fraction": 0},
            "sft": {"steps_per_topic": 2, "batch_size": 2},
            "dpo": {"steps_per_topic": 1, "batch_size": 2, "pairs": "on_policy", "iterations": 2},
            "evaluation": {"levels": []},
        }
        runs.append(mindprint.train(config, rows=ROWS, run=tmp_path / backend).run)
    torch, mlx = (
        [json.loads((run / "on_policy" / name).read_text())["answers"] for name in ("0001.json", "0002.json")]
        for run in runs
    )
    assert torch == mlx
    assert all(answer.strip() for answers in torch for answer in answers)
