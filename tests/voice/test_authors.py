"""The scale on real authors: where the person, other people, and text that is not text are on it.

MINDPRINT_AUTHORS is a folder with a folder for each of four authors, with two works each. Each author in turn is the
person, known by one work. Two others are the background. The fourth is in nothing, and is scored. The floor is made of
passages of the background that nothing was fitted on, the ceiling of such passages of the person's known work.

The place of even odds on the scale is chosen for each author on the cases that are about the other authors. The means
that are tested have these choices, so no author's figure was seen by what chose for it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from mindprint.voice import scoring
from mindprint.voice.scoring import Scale, VoiceReference, VoiceScore, VoiceScorer, fit_scorer

LENGTH = 100
KNOWN, SCORED = 100, 40  # passages of the person, and of each work that is scored or an end of the scale
BACKGROUND = 50  # passages of each of the four works in the background
EDGES = 500  # words left out at both ends of a work: title pages, tables of contents, notes
ODDS = (0.35, 0.40, 0.45, 0.50, 0.55)  # places of even odds that are chosen between
OTHER_WORK, STRANGER = 0.75, 0.40  # what is asked of the person's other work, and of the author who is in nothing
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


def scores(person: str, stranger: str, known: int) -> dict[float, dict[str, float]]:
    """Return the score of each kind of text on the person's scale, for each place of even odds."""
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
    shipped, found = scoring.EVEN_ODDS, {}
    try:
        for scoring.EVEN_ODDS in ODDS:
            # A copy has no values in its caches, which are of other odds.
            fresh = replace(scale)
            values = {kind: fresh.score(part) for kind, part in texts.items()}
            assert all(isinstance(score, VoiceScore) for score in values.values())
            found[scoring.EVEN_ODDS] = {k: score.value for k, score in values.items() if isinstance(score, VoiceScore)}
    finally:
        scoring.EVEN_ODDS = shipped
    return found


def cases() -> Iterator[tuple[str, str, int]]:
    yield from (
        (person, other, known) for person in works() for other in works() if other != person for known in (0, 1)
    )


@cache
def table() -> dict[tuple[str, str, int], dict[str, float]]:
    by_odds = {case: scores(*case) for case in cases()}
    chosen = {author: best_odds(author, by_odds) for author in works()}
    print("".join(f"\neven odds chosen without {author}: {odds:g}" for author, odds in chosen.items()))
    rows = {case: found[chosen[case[0]]] for case, found in by_odds.items()}
    kinds = list(next(iter(rows.values())))
    for odds in ODDS:
        means = "".join(f"{np.mean([found[odds][kind] for found in by_odds.values()]):12.2f}" for kind in kinds)
        print(f"even odds at {odds:g} for all{means}")
    print(f"\n{'person':10s}{'scored':10s}{'known':>6s}" + "".join(f"{kind:>12s}" for kind in kinds))
    for (person, stranger, known), row in rows.items():
        print(f"{person:10s}{stranger:10s}{known:6d}" + "".join(f"{row[kind]:12.2f}" for kind in kinds), flush=True)
    print(f"{'mean':26s}" + "".join(f"{np.mean([row[kind] for row in rows.values()]):12.2f}" for kind in kinds))
    return rows


def best_odds(left_out: str, by_odds: dict[tuple[str, str, int], dict[float, dict[str, float]]]) -> float:
    """Return the place of even odds that meets both goals best in the cases that are about the other authors."""
    others = [found for (person, stranger, _), found in by_odds.items() if left_out not in (person, stranger)]

    def reserve(odds: float) -> float:
        own, stranger = (np.mean([found[odds][kind] for found in others]) for kind in ("other work", "stranger"))
        return float(min(own - OTHER_WORK, STRANGER - stranger))

    return max(ODDS, key=reserve)


def mean(kind: str) -> float:
    return float(np.mean([row[kind] for row in table().values()]))


def test_the_persons_other_work_is_near_the_person() -> None:
    assert mean("other work") >= OTHER_WORK


def test_people_who_are_in_nothing_are_nearer_to_the_others() -> None:
    assert mean("stranger") <= STRANGER


@pytest.mark.parametrize("kind", ["shuffled", "looped", "salad"])
def test_text_that_is_not_text_is_at_the_floor(kind: str) -> None:
    assert all(row[kind] <= 0.15 for row in table().values())
