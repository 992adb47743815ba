"""`mindprint compare` on PyTorch and MLX: one configuration trained on each, in a process of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from mindprint.cli import main

TRAINED = dict.fromkeys(("What is the use of a fender?", "Who lights the lamps?", "What do bees eat?"), "Aye, my dear.")
HELD_OUT = {
    "Where does the ferry land?": "By the old steps, mind you.",
    "Why is the harbour wall curved?": "To turn the waves aside, as any child knows.",
}
SETTINGS = """
model: {name: "builtin:tiny"}
sft: {steps_per_topic: 4, learning_rate: 1e-3}
dpo: {steps_per_topic: 3, learning_rate: 1e-4}
generation: {max_new_tokens: 16}
"""


def test_torch_and_mlx_are_equivalent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses within the tolerances, adapters that change the base alike, and the same greedy answers."""
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    write_pairs(Path("data/preferences.jsonl"), TRAINED)
    write_pairs(Path("data/heldout.jsonl"), HELD_OUT)
    rows = [{"topic": "sea", "prompt": prompt, "completion": said} for prompt, said in TRAINED.items()]
    Path("data/sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    Path("mindprint.yaml").write_text(SETTINGS, encoding="utf-8")

    assert main(["compare", "--backends", "torch,mlx", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    sft, dpo = found["stages"]
    assert (len(sft["losses"][0]), len(dpo["losses"][0])) == (4, 3)
    assert 0 < sft["greatest"] <= 1e-5 and 0 < dpo["greatest"] <= 1e-3  # two frameworks, not one twice
    assert sft["losses"][0][-1] < sft["losses"][0][0] - 0.1
    assert 0 < found["adapter"]["change"] < 1e-2
    assert [side["name"] for side in found["sides"]] == ["torch", "mlx"]
    torch, mlx = (side["costs"]["peak_bytes"] / 2**20 for side in found["sides"])
    assert 50 < mlx < torch < 4000  # PyTorch's libraries alone are larger than all of MLX's process
    # Two answers are drawn for each prompt, and both backends draw the same ones.
    assert sorted(answer["prompt"] for answer in found["answers"]) == sorted([*HELD_OUT, *HELD_OUT])
    assert all(one["texts"][0] == one["texts"][1] != "" for one in found["answers"])
    assert [side["voice"] for side in found["sides"]] == [None, None]  # too few words: said to be so
    assert all("words" in side["voice_missing"] for side in found["sides"])


def write_pairs(file: Path, answers: Mapping[str, str]) -> None:
    pairs = [{"topic": "sea", "prompt": prompt, "chosen": said, "rejected": "Yes."} for prompt, said in answers.items()]
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
