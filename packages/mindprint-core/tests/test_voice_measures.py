"""The measures of a voice, worked by hand."""

import math

import numpy as np
import pytest

from mindprint.contract import Measure
from mindprint.text.ngrams import characters, count_matrix, document_frequencies, grams, joined, word_tokens
from mindprint.text.words import passages, plain, words
from mindprint.voice.measures import (
    CosineDelta,
    Surprise,
    SymbolModel,
    Tfidf,
    TfidfCosine,
    ZScores,
    hellinger,
    measures,
    ridge,
    unit_rows,
)

OWN = ["the cat and the dog and the cat and so on and on", "and so the cat and so the dog and so on"]
OTHERS = ["a cat with a dog, because of a cat, because of it", "because a dog, because a cat, of it and a dog"]


def test_a_typesetters_choices_are_made_alike() -> None:
    assert plain("“It’s—well…”  she\n_said_") == '"It\'s -- well..." she said'
    assert plain("It's--well") == plain("It’s – well") == "It's -- well"
    assert words("Don’t you, O'Brien? 3 well-worn É") == ["don't", "you", "o'brien", "3", "well-worn", "é"]


def test_passages_by_hand() -> None:
    assert list(passages("a b c d e f g", 3)) == ["a b c", "d e f g"]
    assert list(passages("a b c d e", 3)) == ["a b c", "d e"]
    assert list(passages("a", 3)) == ["a"]


def test_ngrams_are_counted_by_hand() -> None:
    """` abab `: two of `ab`, one each of ` a`, `ba`, `b `."""
    found, counts = np.unique(grams(characters("abab"), 2, 2)[0], return_counts=True)
    assert len(found) == 4 and sorted(counts.tolist()) == [1, 1, 1, 2]
    assert len(joined(word_tokens("One, two"), 1, 2)) == 3 + 2
    assert np.array_equal(word_tokens("One"), word_tokens("one"))
    assert not len(joined(characters(""), 3, 5)) and not len(joined(word_tokens(""), 1, 2))


def test_vocabulary_and_counts_by_hand() -> None:
    documents = [word_tokens(text) for text in ("a a b", "a c", "b a d")]
    vocabulary, frequencies = document_frequencies(documents, 2, 10)
    order = [vocabulary.tolist().index(word_tokens(word)[0]) for word in ("a", "b")]
    assert frequencies[order].tolist() == [3, 2]
    assert count_matrix(documents, vocabulary)[:, order].tolist() == [[2, 1], [1, 0], [1, 1]]
    commonest, _ = document_frequencies(documents, 1, 1)
    assert commonest.tolist() == [word_tokens("a")[0]]


def test_tfidf_by_hand() -> None:
    """Counts 3 and 1 in 3 documents of df 2 and 1: (1 + ln 3)·(ln(4/3) + 1) and ln(4/2) + 1, to length 1."""
    rows = Tfidf.of(np.array([2, 1]), 3)(np.array([[3, 1], [0, 0]], np.float32))
    first, second = (1 + math.log(3)) * (math.log(4 / 3) + 1), math.log(2) + 1
    length = math.hypot(first, second)
    assert rows[0] == pytest.approx([first / length, second / length], rel=1e-6)
    assert rows[1].tolist() == [0, 0]


def test_hellinger_and_zscores_by_hand() -> None:
    counts = np.array([[1, 3], [3, 1]], np.float32)
    assert hellinger(counts)[0] == pytest.approx([0.5, math.sqrt(0.75)], rel=1e-6)
    scores = ZScores.of(counts)
    assert scores(counts).tolist() == [[-1, 1], [1, -1]]
    assert scores(np.array([[1, 1]], np.float32)).tolist() == [[0, 0]]
    assert np.isfinite(ZScores.of(np.ones((2, 2), np.float32))(counts)).all()


def test_cosine_delta_by_hand() -> None:
    """Own `a a a b`, others `a b b b`: a's shares 3/4 and 1/4, z ±1, the person is (1, −1)/√2."""
    decide = CosineDelta().fit(["a a a b"], ["a b b b"])
    assert decide(["a a a b", "b b a b", "a a a a"]) == pytest.approx([1, -1, 1], abs=1e-6)


def test_tfidf_cosine_by_hand() -> None:
    """4-grams of ` aaa ` are ` aaa` and `aaa `: the same text has cosine 1, one that shares none has 0."""
    decide = TfidfCosine().fit(["aaa"], ["bbb"])
    assert decide(["aaa", "bbb", "AAA"]) == pytest.approx([1, 0, 0], abs=1e-6)


def test_ridge_solves_the_weighted_problem_and_leaves_each_row_out_exactly() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(9, 4)).astype(np.float32)
    labels = np.repeat([1.0, -1.0], [3, 6])
    found = ridge(rows, labels)
    share = np.where(labels > 0, 0.5 / 3, 0.5 / 6)
    centred = rows - share @ rows
    penalty = float((centred.astype(float) ** 2).sum(axis=1).mean())
    weights, bias = _primal(rows, labels, share, penalty)
    assert found.weights == pytest.approx(weights, rel=1e-4)
    assert found.bias == pytest.approx(bias, rel=1e-4)
    for out in range(9):
        rest = np.arange(9) != out
        weights, bias = _primal(rows[rest], labels[rest], share[rest], penalty)
        assert found.left_out[out] == pytest.approx(float(rows[out] @ weights) + bias, rel=1e-3)


def _primal(rows: np.ndarray, labels: np.ndarray, share: np.ndarray, penalty: float) -> tuple[np.ndarray, float]:
    """min |w|²·penalty + 9·Σ share (y − w·x − b)², by the normal equations."""
    extended = np.column_stack([rows, np.ones(len(rows))]).astype(float)
    matrix = 9 * extended.T @ (share[:, None] * extended) + penalty * np.diag([1] * rows.shape[1] + [0])
    *weights, bias = np.linalg.solve(matrix, 9 * extended.T @ (share * labels))
    return np.array(weights), float(bias)


def test_the_character_model_by_hand() -> None:
    """Read ` ab ` (no context): 4 symbols, 3 kinds: p(a) = (1 + 3/128)/7, p(space) = (2 + 3/128)/7, p(z) = 3/128/7."""
    model = SymbolModel.of([characters("ab")], 0, 128)
    a, space, z = ((count + 3 / 128) / 7 for count in (1, 2, 0))
    assert model.log_probs([characters("a")])[-1, 0] == pytest.approx((math.log(a) + 2 * math.log(space)) / 3)
    assert model.log_probs([characters("z")])[-1, 0] == pytest.approx((math.log(z) + 2 * math.log(space)) / 3)


def test_the_character_model_interpolates_by_hand() -> None:
    """Of ` aab `, after `a`: a and b once each. p(a | a) = (1 + 2·p(a)) / 4, with p(a) = (2 + 3/128) / 8."""
    model = SymbolModel.of([characters("aab")], 1, 128)
    one = {sign: (count + 3 / 128) / 8 for sign, count in ((" ", 2), ("a", 2), ("b", 1))}
    after_space = 1 + 1  # a space (the padding) and an `a`
    p = [
        (1 + 2 * one[" "]) / (after_space + 2),
        (1 + 2 * one["a"]) / (after_space + 2),
        (1 + 2 * one["a"]) / (2 + 2),
        (1 + 2 * one["b"]) / (2 + 2),
        (1 + one[" "]) / (1 + 1),
    ]
    assert model.log_probs([characters("aab")])[-1, 0] == pytest.approx(float(np.log(p).mean()))


@pytest.mark.parametrize("measure", measures(), ids=lambda measure: measure.name)
def test_every_measure_prefers_the_person(measure: Measure) -> None:
    decide = measure.fit(OWN, OTHERS)
    own, other = decide(["and so the dog and the cat and so on", "because of a dog, because of it"])
    assert own > other
    assert decide([]).shape == (0,)
    assert np.isfinite(decide(["", "?!", "ξένος"])).all()


@pytest.mark.parametrize("symbols", ["characters", "words"])
def test_a_model_decides_on_each_text_as_a_fit_without_its_fold(symbols: str) -> None:
    own = [*OWN, "and so on and so the cat", "the dog and so", ""]
    measure = Surprise("surprise", symbols, 2, 128)
    decided = measure.left_out(own, OTHERS, 2)
    assert decided.shape == (7,)
    for fold in (0, 1):
        fitted = measure.fit(own[1 - fold :: 2], OTHERS[1 - fold :: 2])
        assert decided[:5][fold::2] == pytest.approx(fitted(own[fold::2]), abs=1e-12)
        assert decided[5:][fold::2] == pytest.approx(fitted(OTHERS[fold::2]), abs=1e-12)


def test_unit_rows_leave_nothing_alone() -> None:
    assert unit_rows(np.array([[3, 4], [0, 0]], np.float32)).tolist() == [
        pytest.approx([0.6, 0.8]),
        [0, 0],
    ]
