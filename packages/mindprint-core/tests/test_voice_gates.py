"""Text must be text before its voice counts: loops, shuffled words, salad, other languages, and one-word answers."""

import json
from functools import cache
from importlib.resources import files

import numpy as np
import pytest

from mindprint.text.ngrams import is_loop, repeated_share
from mindprint.text.words import passages, unspaced_share, word_count, words
from mindprint.voice.gates import (
    EMPTY,
    FEW_WORDS,
    NO_ORDER,
    ONE_WORD,
    OTHER_LANGUAGE,
    REPEATS,
    different_share,
    fit_gates,
)
from mindprint.voice.scoring import Scale, VoiceReference, VoiceScore, VoiceScorer, fit_scorer

FRENCH = (
    "Longtemps je me suis couché de bonne heure, et parfois mes yeux se fermaient si vite que je n'avais pas le temps "
    "de me dire que je m'endormais, et une demi-heure après la pensée qu'il était temps de chercher le sommeil"
)
JAPANESE = (
    "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。何で"
    "も薄暗いじめじめした所で泣いていた事だけは記憶している。"
)


def column(name: str, field: str) -> list[str]:
    text = files("mindprint").joinpath("resources", "curriculum", name).read_text(encoding="utf-8")
    return [json.loads(line)[field] for line in text.splitlines()]


@cache
def scorer() -> VoiceScorer:
    own = column("sft.jsonl", "completion") + column("preferences.jsonl", "chosen")
    fitted = fit_scorer(VoiceReference(tuple(own), tuple(column("preferences.jsonl", "rejected"))))
    assert isinstance(fitted, VoiceScorer)
    return fitted


@cache
def scale() -> Scale:
    ends = scorer().calibrated(column("heldout.jsonl", "rejected"), column("heldout.jsonl", "chosen"))
    assert isinstance(ends, Scale)
    return ends


def shuffled(texts: list[str]) -> list[str]:
    rng = np.random.default_rng(0)
    return [" ".join(rng.permutation(text.split())) for text in texts]


def test_shares_by_hand() -> None:
    """`a b c d` said three times is 9 runs of four words, of which 4 are different."""
    assert repeated_share(["a", "b", "c", "d"] * 3) == pytest.approx(5 / 9)
    assert repeated_share(["a", "b", "c"]) == 0


def test_a_loop_says_nearly_a_third_again() -> None:
    """Of 20 words 17 runs of four: a sentence of eight words that comes back is 5 of them, and of nine words 6."""
    letters = list("abcdefghijkl")
    assert not is_loop([*letters, *letters[:8]])
    assert is_loop([*letters[:11], *letters[:9]])
    assert not is_loop([])
    assert different_share(["a", "b", "a", "b"]) == 0.5
    assert different_share([]) == 0


def test_the_persons_own_text_passes() -> None:
    held_out = column("heldout.jsonl", "chosen")
    reasons = scorer().gates.reasons(held_out)
    assert sum(reason is not None for reason in reasons) <= len(held_out) // 20


@pytest.mark.parametrize(
    ("make", "reasons"),
    [
        (shuffled, {NO_ORDER}),
        (lambda texts: [" ".join(text.split()[:12] * 7) for text in texts], {REPEATS}),
        (lambda texts: ["".join(text.split()[:1]) for text in texts], {ONE_WORD}),
        (lambda texts: [FRENCH for _ in texts], {OTHER_LANGUAGE}),
    ],
    ids=["shuffled", "looped", "one word", "French"],
)
def test_what_is_no_text_of_the_person_is_at_the_floor(make, reasons: set[str]) -> None:
    texts = make(column("heldout.jsonl", "chosen")) * 3
    found = scale().score(texts)
    assert isinstance(found, VoiceScore)
    assert found.value <= 0.15
    assert reasons <= found.failed.keys()


def test_random_function_words_are_too_few() -> None:
    rng = np.random.default_rng(0)
    common = sorted({word for text in column("sft.jsonl", "completion") for word in words(text)})[:20]
    assert scorer().gates.reasons([" ".join(rng.choice(common, 90))]) in [(FEW_WORDS,), (OTHER_LANGUAGE,), (NO_ORDER,)]


def test_failures_are_counted_and_empty_answers_among_them() -> None:
    held_out = column("heldout.jsonl", "chosen")
    found = scale().score([*held_out, "", "Yes"])
    assert isinstance(found, VoiceScore)
    assert found.failed[EMPTY] == found.empty == 1 and found.failed[ONE_WORD] == 1


def test_a_person_in_two_languages_passes_in_either() -> None:
    english = column("sft.jsonl", "completion")
    gates = fit_gates([*english, *passages(FRENCH * 8, 40)], column("preferences.jsonl", "rejected"))
    assert OTHER_LANGUAGE not in gates.reasons([*english[:20], FRENCH])


def test_scripts_without_spaces_are_counted_by_letters() -> None:
    assert word_count([JAPANESE]) == len([sign for sign in JAPANESE if sign != "。"])
    assert words("ที่นี่ abc") == ["ที่", "นี่", "abc"]
    pieces = list(passages(JAPANESE, 20))
    assert len(pieces) == 3 and "".join(pieces) == JAPANESE
    assert unspaced_share([JAPANESE]) == 1 and unspaced_share(["abc"]) == 0
