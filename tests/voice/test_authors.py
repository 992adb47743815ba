"""The scale on real authors: where the person, other people, and text that is no text are on it.

MINDPRINT_AUTHORS is a folder with a folder for each of four authors, with two works each. Each author in turn is the
person, known by one work. Two others are the background. The fourth is in nothing, and is scored. The floor is made of
passages of the background that nothing was fitted on, the ceiling of such passages of the person's known work.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from mindprint.voice.scoring import Scale, VoiceReference, VoiceScore, VoiceScorer, fit_scorer

LENGTH = 100
KNOWN, SCORED = 100, 40  # passages of the person, and of each work that is scored or an end of the scale
BACKGROUND = 50  # passages of each of the four works in the background
EDGES = 500  # words left out at both ends of a work: title pages, tables of contents, notes
FUNCTION_WORDS = "the of and was that had upon to it he his which with in a you I my there have so no"


@cache
def works() -> dict[str, list[list[str]]]:
    authors = sorted(path for path in Path(os.environ["MINDPRINT_AUTHORS"]).iterdir() if path.is_dir())
    return {
        author.name: [work.read_text("utf-8").split() for work in sorted(author.glob("*.txt"))] for author in authors
    }


def passages(author: str, work: int, count: int) -> list[str]:
    inner = works()[author][work][EDGES:-EDGES]
    starts = np.random.default_rng([work, count]).permutation(len(inner) // LENGTH)[:count] * LENGTH
    return [" ".join(inner[start : start + LENGTH]) for start in starts]


def scores(person: str, stranger: str, known: int) -> dict[str, float]:
    """Return the score of each kind of text on the person's scale."""
    own = passages(person, known, KNOWN + SCORED)
    others = [
        passages(author, work, BACKGROUND + SCORED // 2)
        for author in works()
        if author not in (person, stranger)
        for work in (0, 1)
    ]
    background = tuple(text for texts in others for text in texts[:BACKGROUND])
    scorer = fit_scorer(VoiceReference(tuple(own[:KNOWN]), background), passage_words=LENGTH)
    assert isinstance(scorer, VoiceScorer)
    scale = scorer.calibrated([text for texts in others for text in texts[BACKGROUND:]], own[KNOWN:])
    assert isinstance(scale, Scale)
    rng = np.random.default_rng(0)
    texts = {
        "other work": passages(person, 1 - known, SCORED),
        "stranger": [text for work in (0, 1) for text in passages(stranger, work, SCORED)],
        "shuffled": [" ".join(rng.permutation(text.split())) for text in own[KNOWN:]],
        "looped": [" ".join(text.split()[:12] * 7) for text in own[KNOWN:]],
        "salad": [" ".join(rng.choice(FUNCTION_WORDS.split(), LENGTH)) for _ in range(SCORED)],
    }
    found = {kind: scale.score(part) for kind, part in texts.items()}
    assert all(isinstance(score, VoiceScore) for score in found.values())
    return {kind: score.value for kind, score in found.items() if isinstance(score, VoiceScore)}


def cases() -> Iterator[tuple[str, str, int]]:
    yield from (
        (person, other, known) for person in works() for other in works() if other != person for known in (0, 1)
    )


@cache
def table() -> dict[tuple[str, str, int], dict[str, float]]:
    rows = {case: scores(*case) for case in cases()}
    kinds = list(next(iter(rows.values())))
    print(f"\n{'person':10s}{'scored':10s}{'known':>6s}" + "".join(f"{kind:>12s}" for kind in kinds))
    for (person, stranger, known), row in rows.items():
        print(f"{person:10s}{stranger:10s}{known:6d}" + "".join(f"{row[kind]:12.2f}" for kind in kinds), flush=True)
    print(f"{'mean':26s}" + "".join(f"{np.mean([row[kind] for row in rows.values()]):12.2f}" for kind in kinds))
    return rows


def mean(kind: str) -> float:
    return float(np.mean([row[kind] for row in table().values()]))


def test_the_persons_other_work_is_near_the_person() -> None:
    assert mean("other work") >= 0.75


def test_people_who_are_in_nothing_are_nearer_to_the_others() -> None:
    assert mean("stranger") <= 0.40


@pytest.mark.parametrize("kind", ["shuffled", "looped", "salad"])
def test_text_that_is_no_text_is_at_the_floor(kind: str) -> None:
    assert all(row[kind] <= 0.15 for row in table().values())
