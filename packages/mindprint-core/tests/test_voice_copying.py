"""Copying, repetition and length, by hand."""

import math

import pytest

from mindprint.voice.concepts import coverage
from mindprint.voice.copying import Copying, N, TrainingText, measure_copying, self_bleu
from mindprint.voice.scoring import NotScored

TRAINING = ["one two three four five six seven eight nine ten", "red two three blue", "one two red"]
SPLIT = [text.split() for text in TRAINING]


def lengths(answer: str) -> list[int]:
    return [length for length, _ in TrainingText(SPLIT).matches(answer.split())]


def test_matching_runs_by_hand() -> None:
    assert lengths("two three four") == [1, 2, 3]
    assert lengths("two three blue red two") == [1, 2, 3, 1, 2]
    assert lengths("two red two three four five") == [1, 2, 2, 3, 3, 4]
    assert lengths("nothing ten red") == [0, 1, 1]  # no run crosses from one text into the next


def test_matching_runs_are_those_found_by_trying_all() -> None:
    """Against every run of every text, on words of an alphabet so small that texts repeat themselves."""
    texts = [[f"{(n * n + 7 * t * n + t) % 3}" for n in range(25)] for t in range(4)]
    runs = {tuple(text[i:j]) for text in texts for i in range(25) for j in range(i + 1, 26)}
    answer = [f"{(n * n * n + 5 * n) % 7 % 3}" for n in range(40)]
    expected = [max(k for k in range(end + 1) if not k or tuple(answer[end - k : end]) in runs) for end in range(1, 41)]
    matched = list(TrainingText(texts).matches(answer))
    assert [length for length, _ in matched] == expected
    for end, (length, source) in enumerate(matched, 1):
        run = tuple(answer[end - length : end])
        assert any(tuple(texts[source][i : i + length]) == run for i in range(26 - length))


def measured(answers: list[str], person: list[str] | None = None) -> Copying:
    found = measure_copying(answers, TRAINING, person or [])
    assert isinstance(found, Copying)
    return found


def test_copying_by_hand() -> None:
    """Of 8 + 10 words the first 8 are one overlap; `two three` in the second answer is too short to count."""
    found = measured(["One, two, three, four, five, six, seven, eight!", "oh two three " + "so " * 7])
    assert (found.longest.words, found.longest.answer, found.longest.source) == (8, 0, 0)
    assert found.longest.text == "one two three four five six seven eight"
    assert found.copy_rate == pytest.approx(8 / 18)
    assert (found.recited, found.words, found.length) == (0.5, 9, None)
    assert found.flagged and found.flagged[0].startswith("recites training text: 50% of the answers")


def test_seven_words_in_a_row_are_no_copy_and_overlaps_are_counted_once() -> None:
    assert N == 8
    seven = measured(["one two three four five six seven"])
    assert (seven.copy_rate, seven.recited, seven.flagged) == (0, 0, ())
    assert measured(["x " + TRAINING[0] + " y"]).copy_rate == pytest.approx(10 / 12)


def test_what_the_person_repeats_herself_is_no_fault() -> None:
    saying = TRAINING[0] + " and then some other words that nobody has ever read before now"
    found = measured([saying] * 1, [saying])
    assert found.copy_rate == found.person_copy_rate == pytest.approx(10 / 22)
    assert found.flagged == ()
    recited = measured([TRAINING[0]], [saying])
    assert recited.recited == 1 and any("recites" in flag for flag in recited.flagged)


def test_length_beside_the_persons() -> None:
    assert measured(["a b"], ["a b c d e"]).length == pytest.approx(0.4)
    assert any("0.40 times as long" in flag for flag in measured(["a b"], ["a b c d e"]).flagged)


def test_self_bleu_by_hand() -> None:
    """`a b c d e` against `a b c d f`: precisions 4/5, 3/4, 2/3, 1/2, no brevity; the fourth root of 0.2."""
    assert self_bleu([list("abcde"), list("abcdf")]) == pytest.approx((4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)
    assert self_bleu([list("abcd")] * 3) == pytest.approx(1)
    assert self_bleu([list("abcd"), list("efgh")]) == 0
    assert self_bleu([list("abcd"), []]) is None


def test_self_bleu_clips_and_is_brief_by_hand() -> None:
    """`a a` against `a b a`: 2/2 words, `a a` never; 0. `a b` against `a b c d`: precisions 1, brevity exp(1 − 4/2)."""
    assert self_bleu([list("aa"), list("aba")]) == 0
    short, long = math.exp(1 - 4 / 2), 0.0  # the other way `a b c d` shares no three words with `a b`
    assert self_bleu([list("ab"), list("abcd")]) == pytest.approx((short + long) / 2)


def test_repetition_is_flagged() -> None:
    found = measured(["the very same answer to all of it"] * 4, ["this is one", "that is quite another thing"])
    assert found.self_bleu == pytest.approx(1) and any("repeat each other" in flag for flag in found.flagged)


def test_nothing_is_not_a_number() -> None:
    assert measure_copying(["", "!"], TRAINING) == NotScored("all 2 answers are empty")
    assert measure_copying([], TRAINING) == NotScored("there are no answers")


def test_key_concepts() -> None:
    found = coverage("The tides turned when the moon pulled them.", ["tide", "moon|sun", "turning tide", "harbour"])
    assert found.found == ("tide", "moon|sun", "turning tide") and found.missing == ("harbour",)
    assert found.share == 0.75
    assert coverage("cart", ["car"]).share == 0
    assert coverage("", ["car"]).share == 0
    for wrong in ([], [""], ["tide|"]):
        with pytest.raises(ValueError, match="key concepts"):
            coverage("a", wrong)
