"""What a run says of its data before it trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from mindprint.config import make_config
from mindprint.errors import DataError
from mindprint.models.positions import has_learned_positions, longest_sequence
from mindprint.training.prepare import Prepared, prepare

PLACES = ["boat", "barn", "house", "mill", "church", "inn", "quay", "loft"]
THINGS = ["rope", "lamp", "bell", "bread", "clock", "salt", "anchor", "kettle"]


def rows(count: int, **more: Any) -> list[dict[str, Any]]:
    asked = [f"{thing}, {place} and {thing[::-1]}?" for thing in THINGS for place in PLACES]
    return [{"prompt": text, "completion": "In the barrel, my dear.", **more} for text in asked[:count]]


def prepared(
    folder: Path, sft: list[dict[str, Any]], pairs: list[dict[str, Any]] | None = None, **data: Any
) -> Prepared:
    for name, records in (("sft", sft), ("preferences", pairs or [])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in records), encoding="utf-8")
    values = {"data": {"path": ".", **data}, "dpo": {"enabled": pairs is not None}}
    return prepare(make_config(values, folder))


def told(of: Prepared, *, warning: bool = False) -> list[str]:
    return [notice.message for notice in of.notes if notice.warning is warning]


def test_one_line_counts_the_rows_trained_held_out_cut_and_left_out(tmp_path: Path) -> None:
    sft = [
        *rows(40),
        {"prompt": "w " * 100, "completion": "Yo"},
        {"prompt": "Tell me", "completion": "a b c d e " * 30},
    ]
    pairs = [{"prompt": row["prompt"], "chosen": "In the barrel.", "rejected": "There."} for row in rows(20)]
    pairs.append({"prompt": "And then?", "chosen": "Tea.", "rejected": "Tea."})
    of = prepared(tmp_path, sft, pairs, max_length=60, heldout_fraction=0.3)
    facts = of.split.facts.topics["main"]
    assert facts.sft.held_out
    line = told(of)[-1]
    assert line == (
        f"SFT rows: {facts.sft.train - 1} trained, 1 of them cut at data.max_length = 60 tokens, "
        f"{facts.sft.held_out} held out, 1 left out (the prompt alone fills data.max_length); "
        f"preference pairs: {facts.preferences.train - 1} trained, {facts.preferences.held_out} held out, "
        "1 left out (both answers are the same)"
    )
    assert len(of.examples["dpo"]["main"]) == facts.preferences.train - 1


def test_topics_that_are_about_as_many_as_rows_get_a_warning(tmp_path: Path) -> None:
    own = [{**row, "topic": f"https://example.org/{number}"} for number, row in enumerate(rows(12))]
    (warning,) = [words for words in told(prepared(tmp_path, own), warning=True) if "topics" in words]
    assert warning.startswith("there are 12 topics for 12 rows, and each is trained by itself")
    two = [{**row, "topic": f"part {number % 2}"} for number, row in enumerate(rows(12))]
    assert not [words for words in told(prepared(tmp_path, two), warning=True) if "topics" in words]
    # A link for each row is not a topic, and is named with the way to make it one.
    linked = [{**row, "source": f"https://example.org/{number}"} for number, row in enumerate(rows(12))]
    of = prepared(tmp_path, linked)
    assert of.outline.topics == ("main",)
    assert any(words.startswith("ignored columns: source (data.topic=source") for words in told(of))


def test_rows_longer_than_the_base_has_positions_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = [{"prompt": "Hi", "completion": "a b c d e " * 60}, *rows(12)]
    monkeypatch.setattr("mindprint.training.prepare.longest_sequence", lambda _: 100)
    (warning,) = [words for words in told(prepared(tmp_path, long), warning=True) if "positions" in words]
    assert warning.startswith("1 rows have more tokens than the base has positions for (100), the first is ")
    assert "sft.jsonl: line 1" in warning
    assert warning.endswith("set data.max_length=100, or shorten them")
    monkeypatch.setattr("mindprint.training.prepare.has_learned_positions", lambda _: True)
    with pytest.raises(DataError, match="1 rows have more tokens than the base has positions for"):
        prepared(tmp_path, long)


@pytest.mark.parametrize(
    ("config", "length"),
    [
        ({"max_position_embeddings": 256}, 256),
        ({"n_positions": 64}, 64),
        ({"text_config": {"max_position_embeddings": 512}}, 512),
        ({"max_position_embeddings": None}, None),
        ({}, None),
    ],
)
def test_the_positions_of_a_base(tmp_path: Path, config: dict[str, Any], length: int | None) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "x", **config}), encoding="utf-8")
    assert longest_sequence(tmp_path) == length
    for name, learned in (("transformer.wpe.weight", True), ("model.layers.0.mlp.up_proj.weight", False)):
        save_file({name: np.zeros((4, 2), np.float32)}, tmp_path / "model.safetensors")
        assert has_learned_positions(tmp_path) is learned
