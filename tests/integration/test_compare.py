"""`mindprint compare` on PyTorch and MLX: one configuration trained on each, in a process of its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from mindprint.cli import main
from mindprint.curriculum.records import AnswerRecord, as_line
from mindprint.inference import open_adapter

sys.path.insert(0, str(Path(__file__).parents[2] / "packages" / "mindprint-core" / "tests"))

from run_samples import write_lines

PROMPTS = ("What is the use of a fender?", "Who lights the lamps?", "What do bees eat?")


def test_torch_and_mlx_are_equivalent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses within the tolerances, adapters that change the base alike, and the same greedy answers."""
    monkeypatch.chdir(tmp_path)
    rows = [
        {"topic": "sea", "prompt": f"{prompt} {n}", "completion": "Aye, my dear."} for n, prompt in enumerate(PROMPTS)
    ]
    pairs = [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": "Yes.", "topic": "sea"} for r in rows]
    Path("data").mkdir()
    write_lines(Path("data/sft.jsonl"), rows)
    write_lines(Path("data/preferences.jsonl"), pairs)
    stages = "sft: {steps_per_topic: 4, learning_rate: 1e-3}\ndpo: {steps_per_topic: 3, learning_rate: 1e-4}\n"
    Path("mindprint.yaml").write_text(f"model: {{name: 'builtin:tiny'}}\n{stages}", encoding="utf-8")

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

    runs = [Path("runs/compare-001") / name for name in ("torch", "mlx")]
    for run in runs:
        with open_adapter(run) as opened:
            said = [answer.text for answer in opened.answer(PROMPTS)]
        lines = [as_line(AnswerRecord("sea", *one)) for one in zip(PROMPTS, PROMPTS, PROMPTS, said, strict=True)]
        write_lines(run / "answers.jsonl", lines)
    assert main(["compare", "--runs", *map(str, runs)]) == 0
    assert "answers: 3 of 3 identical, word for word" in capsys.readouterr().out
