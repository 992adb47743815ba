"""Near-duplicate prompts, against comparing every pair as sets."""

import math
import random
import time
from collections import Counter
from collections.abc import Callable
from itertools import combinations

import numpy as np
import pytest

from mindprint.text import near_duplicates
from mindprint.text.near_duplicates import near_duplicate_groups, normalised


def by_sets(texts: list[str]) -> list[int]:
    """The definition, pair by pair."""
    plain = [normalised(text) for text in texts]
    grams = [{f" {text} ".ljust(4)[i : i + 4] for i in range(max(len(text) - 1, 1))} for text in plain]
    # Weights are those of the different texts, each once.
    different = dict(zip(plain, grams, strict=True)).values()
    owners = Counter(gram for text in different for gram in text)
    weight = {gram: round(16 * (0.25 + math.log2((len(different) + 100) / (n + 100)))) for gram, n in owners.items()}

    def heavy(some: set[str]) -> int:
        return sum(weight[gram] for gram in some)

    digits = ["".join(c if c.isdigit() else " " for c in text).split() for text in plain]
    labels = list(range(len(texts)))
    for a, b in combinations(range(len(texts)), 2):
        near = plain[a] == plain[b] or 10 * heavy(grams[a] & grams[b]) >= 7 * heavy(grams[a] | grams[b])
        if near and digits[a] == digits[b] and labels[a] != labels[b]:
            low, high = sorted((labels[a], labels[b]))
            labels = [low if label == high else label for label in labels]
    return labels


def drawn_words(count: int, rng: random.Random) -> list[str]:
    return ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(3, 8))) for _ in range(count)]


def of_words(count: int, vocabulary: int, length: int) -> list[str]:
    rng = random.Random(vocabulary)
    words = drawn_words(vocabulary, rng)
    return [" ".join(rng.choices(words, k=length)) for _ in range(count)]


def from_a_template(count: int, template: str) -> list[str]:
    rng = random.Random(0)
    first, second = drawn_words(100, rng), drawn_words(100, rng)
    return [template.format(a, b) for a in first for b in second][:count]


CASES: dict[str, Callable[[int], list[str]]] = {
    "ten words": lambda count: of_words(count, 10, 8),
    "twenty words": lambda count: of_words(count, 20, 8),
    "a thousand words": lambda count: of_words(count, 1000, 10),
    "a template": lambda count: from_a_template(count, "What is the {} of {}?"),
    "a long template": lambda count: from_a_template(count, "Please tell me now what the {} of the {} is"),
    "numbers": lambda count: [f"question {number}" for number in range(count)],
}


@pytest.mark.parametrize(
    ("first", "second", "near"),
    [
        ("Is there tea?", "is  there TEA", True),
        ("Is there tea?", "Is there tea", True),
        ("What do you make of the old lighthouse?", "What do you make of the old lighthouses?", True),
        ("What do you make of the old lighthouse?", "What do you make of the new harbour?", False),
        ("question 12", "question 13", False),
        ("Explain rule 3.5 of the ferry", "Explain rule 3.6 of the ferry", False),
        ("ﬁne ＴＥＡ", "fine tea", True),
        ("Straße", "STRASSE", True),
        ("?", "!", False),
        ("", "", True),
        ("किताब", "कतब", False),
    ],
)
def test_what_is_near(first: str, second: str, near: bool) -> None:
    assert near_duplicate_groups([first, second]).tolist() == [0, 0 if near else 1]


def test_the_threshold_is_met_exactly() -> None:
    """`abcdefg` has 6 grams with a space on either side. One letter more: 5 shared of 8. Fifteen and one: 14 of 17."""
    assert near_duplicate_groups(["abcdefg", "abcdefgh"]).tolist() == [0, 1]  # 5 / 8 = 0.625
    assert near_duplicate_groups(["abcdefgijk", "abcdefgijkl"]).tolist() == [0, 0]  # 8 / 11 = 0.727
    # 7 / 10 on the nose: 8 grams against 9, 7 of them shared.
    assert near_duplicate_groups(["abcdefghi", "abcdefghij"]).tolist() == [0, 0]


def test_groups_are_transitive_and_named_by_their_first_text() -> None:
    chain = ["tell me of the ferry and the sea" + " and the wind and the rain"[:end] for end in range(0, 29, 7)]
    ends = near_duplicate_groups([chain[0], chain[-1]]).tolist()
    assert ends == [0, 1]
    assert near_duplicate_groups(["apples", *chain, "pears"]).tolist() == [0, 1, 1, 1, 1, 1, 6]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("large", "grams"), [(near_duplicates.LARGE_BUCKET, 50), (2, near_duplicates.GRAMS_AT_ONCE)])
def test_as_comparing_every_pair(case: str, large: int, grams: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Buckets as they are, with grams in many blocks, and each bucket treated as a large one."""
    monkeypatch.setattr(near_duplicates, "LARGE_BUCKET", large)
    monkeypatch.setattr(near_duplicates, "GRAMS_AT_ONCE", grams)
    texts = CASES[case](300)
    assert near_duplicate_groups(texts).tolist() == by_sets(texts)


def test_prompts_from_one_template_are_not_one_group() -> None:
    """With all 4-grams alike, prompts with 80 letters of template around two words are one group of near-duplicates."""
    template = "Please write a letter to your aunt in which you tell her how the {} of the {} came to be lost."
    texts = from_a_template(3000, template)
    groups, sizes = np.unique(near_duplicate_groups(texts), return_counts=True)
    assert len(groups) > 2900
    assert sizes.max() < 20
    # The same words with another ending are still near-duplicates.
    assert near_duplicate_groups([*texts, texts[7][:-1] + " indeed"])[-1] == 7


def test_the_search_says_how_far_it_is() -> None:
    told: list[tuple[int, int]] = []
    near_duplicate_groups(["Is there tea?", "Is there tea now?"], lambda done, total: told.append((done, total)))
    assert told == [(done, 180) for done in range(1, 181)]


@pytest.mark.parametrize("grams", [1000, near_duplicates.GRAMS_AT_ONCE])
def test_long_texts_are_found_by_a_sketch(grams: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two texts of 800 words with 5 % of the words changed; another of the same words in another order is not near."""
    monkeypatch.setattr(near_duplicates, "GRAMS_AT_ONCE", grams)
    rng = random.Random(1)
    words = rng.choices(drawn_words(3000, rng), k=800)
    changed = [word if index % 20 else "other" for index, word in enumerate(words)]
    shuffled = rng.sample(words, len(words))
    assert near_duplicate_groups([" ".join(text) for text in (words, changed, shuffled)]).tolist() == [0, 0, 2]


@pytest.mark.parametrize("case", CASES)
def test_ten_thousand_prompts_take_seconds(case: str) -> None:
    """In processor seconds, which others' work changes little."""
    texts = CASES[case](10_000)
    started = time.process_time()
    groups = near_duplicate_groups(texts)
    seconds = time.process_time() - started
    print(f"10,000 prompts, {case}: {seconds:.1f} processor seconds")
    assert seconds < 20
    assert np.array_equal(groups[groups], groups)
