"""`eval` on a backend that does not train: the figures follow from llama.cpp's own log-probs and answers."""

from __future__ import annotations

import json
import sys
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

import mindprint
from mindprint.data.collate import whole_sequences
from mindprint.text.ngrams import is_loop
from mindprint.text.words import words

sys.path.insert(0, str(Path(__file__).parents[2] / "mindprint-core" / "tests"))

from served import write_tiny_voice


def test_eval_measures_both_models(tmp_path: Path) -> None:
    """Perplexity of the chosen answers, reward accuracy, and the loops among the answers of `generate`."""
    sample = files("mindprint").joinpath("resources", "curriculum", "heldout.jsonl").read_text("utf-8")
    lines = sample.splitlines()[:4]
    heldout = tmp_path / "heldout.jsonl"
    heldout.write_text("\n".join(lines) + "\n", encoding="utf-8")
    rows = [json.loads(line) for line in lines]
    voice = write_tiny_voice(tmp_path / "voice")
    result = mindprint.evaluate(voice, heldout=heldout, backend="llamacpp")
    assert result.pairs is not None
    with mindprint.open_adapter(voice, backend="llamacpp") as opened:

        def sums(name: str, *, adapter: bool) -> tuple[np.ndarray, int]:
            """Return the log-prob of each answer, and the tokens of all."""
            totals, tokens = [], 0
            for row in rows:
                prompt = opened.render(row["prompt"])
                answer = opened.tokenizer.encode_all([row[name]])[0]
                whole = np.concatenate([prompt, answer, [opened.tokenizer.eos_id]]).astype(np.int32)
                scored = opened.backend.log_probs(opened.model, whole_sequences([whole]), adapter=adapter)
                totals.append(scored[0, len(prompt) :].sum())
                tokens += len(whole) - len(prompt)
            return np.array(totals), tokens

        for adapter, measured in ((False, result.pairs.overall.base), (True, result.pairs.overall.tuned)):
            totals, tokens = sums("chosen", adapter=adapter)
            assert measured.perplexity == pytest.approx(np.exp(-totals.sum() / tokens), rel=1e-5)
        rewards = [sums(name, adapter=True)[0] - sums(name, adapter=False)[0] for name in ("chosen", "rejected")]
        assert result.pairs.overall.reward_accuracy == np.mean(rewards[0] > rewards[1])
        for adapter, share in ((False, result.figures.base_loops), (True, result.figures.loops)):
            answers = opened.answer([row["prompt"] for row in rows], adapter=adapter)
            assert share == np.mean([is_loop(words(answer.text)) for answer in answers])
