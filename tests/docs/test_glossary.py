"""docs/glossary.md names the keys that files and JSON really have, and leaves out no figure and no threshold."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from mindprint.config import Thresholds
from mindprint.events import StepDone
from mindprint.runs.records import OLD_FIGURES, AnswerRecord, Figures
from mindprint.voice.preferences import ModelFigures
from mindprint.voice.scoring import NotScored, VoiceScore

GLOSSARY = Path(__file__).parents[2] / "docs" / "glossary.md"
KEY = re.compile(r"^\| `(\w+)` \|", re.MULTILINE)


def names(*records: type) -> set[str]:
    return {field.name for record in records for field in fields(record)}


def keys(section: str) -> list[str]:
    """Return the keys of a section's tables."""
    text = GLOSSARY.read_text(encoding="utf-8")
    (body,) = (part for part in text.split("\n## ") if part.startswith(section))
    return KEY.findall(body)


@pytest.mark.parametrize(
    ("section", "known"),
    [
        ("Thresholds in the configuration", set(Thresholds.model_fields)),
        ("Figures in evaluations.jsonl", names(Figures)),
    ],
)
def test_every_figure_and_threshold_is_defined_once(section: str, known: set[str]) -> None:
    assert sorted(keys(section)) == sorted(known)


@pytest.mark.parametrize(
    ("section", "known"),
    [
        ("Details in `mindprint eval --json`", names(ModelFigures, VoiceScore, NotScored)),
        ("Steps in metrics.jsonl", names(StepDone)),
        ("Answers in answers.jsonl", names(AnswerRecord)),
    ],
)
def test_every_key_exists(section: str, known: set[str]) -> None:
    defined = keys(section)
    assert defined
    assert set(defined) <= known


def test_every_old_name_is_told() -> None:
    text = GLOSSARY.read_text(encoding="utf-8")
    for old, new in OLD_FIGURES.items():
        assert f"`{old}`" in text
        assert f"`{new}`" in text
