"""The measures of a voice: each is fitted on a person against a background, and then gives every text a number.

Five measures make different errors. `scoring` standardises and averages them:

- `characters`: 1- to 5-grams of characters, TF-IDF, a ridge classifier. Character n-grams with TF-IDF are the baseline
  of PAN's authorship verification tasks (Kestemont et al. 2020), there compared by cosine.
- `words`: single words and pairs with punctuation as root frequencies (Hellinger distance), a ridge classifier.
- `delta`: z-scores of word frequencies, as in Burrows's Delta (2002), a ridge classifier in place of a distance.
- `surprise`: nats per character under a character model of the background, less those under the person's: compression
  as attribution (Teahan & Harper 2003), with interpolated Witten-Bell smoothing (1991).
- `phrases`: the same per word, with two words of context: a language model for each author (Huang et al. 2024).

`TfidfCosine` and `CosineDelta` are the classical forms. The masked measures see only frequent words, and the shape of
all others, because rare words show the subject more than the voice (text distortion, Stamatatos 2018). On authors that
did not take part in the choice they gained nothing for certain. benchmarks/voice.py compares both with the five.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from mindprint.contract import Fitted, Float64, Measure
from mindprint.text.ngrams import (
    Float32,
    UInt64,
    characters,
    count_matrix,
    document_frequencies,
    grams,
    joined,
    lookup,
    word_symbols,
    word_tokens,
)
from mindprint.text.words import plain, tokens

VOCABULARY = 10_000
"""The most common n-grams, which a classifier looks at: rarer ones show names and subjects more than voice."""

RIDGE = 1.0
"""Weight of the ridge penalty in units of the mean squared length of the centred rows."""


class Rows(Protocol):
    """A function from counts of n-grams to rows of features."""

    def __call__(self, counts: Float32, /) -> Float32:
        """Return features, float32 `[texts, vocabulary]`, for counts of the same shape."""


@dataclass(frozen=True, eq=False)
class Tfidf:
    """`(1 + ln count) · (ln((1 + N) / (1 + df)) + 1)`, each row of length 1 (scikit-learn's smooth, sublinear form)."""

    idf: Float32

    @classmethod
    def of(cls, frequencies: NDArray[np.int64], documents: int) -> Tfidf:
        """Return the weights for the number of documents that have each n-gram."""
        return cls((np.log((1 + documents) / (1 + frequencies)) + 1).astype(np.float32))

    def __call__(self, counts: Float32, /) -> Float32:
        rows, there = np.zeros_like(counts), counts > 0
        # The logarithm of 0 is -inf, so absent n-grams are left at 0.
        rows[there] = 1 + np.log(counts[there])
        return unit_rows(rows * self.idf)


def hellinger(counts: Float32) -> Float32:
    """Return roots of relative frequencies: the Euclidean distance of two rows is √2 times Hellinger's."""
    root: Float32 = np.sqrt(relative(counts))
    return root


@dataclass(frozen=True, eq=False)
class ZScores:
    """Each feature less its mean, divided by its standard deviation among the fitted texts (Burrows 2002)."""

    mean: Float32
    deviation: Float32
    root: bool = False

    @classmethod
    def of(cls, counts: Float32, *, root: bool = False) -> ZScores:
        """Return the scores for the counts of the fitted texts. `root` takes Hellinger's roots first."""
        rows = hellinger(counts) if root else relative(counts)
        deviation = rows.std(axis=0)
        # A feature that never varies among the fitted texts has a deviation of 0. Divided by 1 it scores 0 on them
        # instead of NaN.
        return cls(rows.mean(axis=0), np.where(deviation > 0, deviation, 1).astype(np.float32), root)

    def __call__(self, counts: Float32, /) -> Float32:
        rows = hellinger(counts) if self.root else relative(counts)
        scores: Float32 = (rows - self.mean) / self.deviation
        return scores


def relative(counts: Float32) -> Float32:
    """Divide each row by its sum. A row of zeros is unchanged."""
    shares: Float32 = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    return shares


def unit_rows(rows: Float32) -> Float32:
    """Divide each row by its Euclidean length. A row of zeros is unchanged."""
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return (rows / np.where(length > 0, length, 1)).astype(np.float32)


@dataclass(frozen=True, eq=False)
class Mask:
    """The words that a measure sees as they are. Of any other it sees whether it is capitalised, and about how long."""

    kept: frozenset[str]

    @classmethod
    def of(cls, texts: Sequence[str], most_frequent: int) -> Mask:
        """Return the mask that leaves the most frequent words of the texts."""
        counts = Counter(word for text in texts for word, _ in _shaped(text))
        return cls(frozenset(word for word, _ in counts.most_common(most_frequent)))

    def __call__(self, text: str) -> list[str]:
        kept = self.kept
        return [word if word in kept else shape for word, shape in _shaped(text)]


# Each masked measure reads every text, to count its words and to mask them.
@lru_cache(maxsize=1024)
def _shaped(text: str) -> tuple[tuple[str, str], ...]:
    """Return each word, case folded, and its shape. A number and a sign of punctuation are their own shape."""
    return tuple((word.casefold(), _shape(word)) for word in tokens(plain(text)))


# Texts say the same words again and again. The bound keeps a long run from filling the memory.
@lru_cache(maxsize=2**16)
def _shape(word: str) -> str:
    if not word[0].isalpha():
        return word
    # Three letters more or less are one shape: single lengths would be rare, and name a word again.
    return f"{'A' if word[0].isupper() else 'a'}{min(len(word), 9) // 3}"


@dataclass(frozen=True)
class _NGrams:
    """A choice of n-grams: of characters or words, from the lowest to the highest n."""

    symbols: str  # "characters" or "words"
    lowest: int
    highest: int

    def of(self, texts: Sequence[str], mask: Mask | None = None) -> list[UInt64]:
        """Return the keys of each text's n-grams, in the text as the mask shows it."""
        return [joined(self._read(text, mask), self.lowest, self.highest) for text in texts]

    def _read(self, text: str, mask: Mask | None) -> UInt64:
        if self.symbols == "characters":
            return characters(text if mask is None else " ".join(mask(text)))
        return word_tokens(text) if mask is None else word_symbols(mask(text))


@dataclass(frozen=True)
class RidgeMeasure:
    """A ridge classifier on n-grams. `features` is `tfidf`, `hellinger` or `zscores`.

    With `unmasked` only this number of the most frequent words is seen as they are.
    """

    name: str
    ngrams: _NGrams
    features: str
    unmasked: int | None = None
    most: int = VOCABULARY

    def fit(self, own: Sequence[str], background: Sequence[str]) -> Fitted:
        """Fit on the person's texts against the background's."""
        mask = None if self.unmasked is None else Mask.of([*own, *background], self.unmasked)
        documents = self.ngrams.of([*own, *background], mask)
        # An n-gram of one passage only can be learned by heart, and tells nothing about any other passage.
        vocabulary, frequencies = document_frequencies(documents, 2, self.most)
        counts = count_matrix(documents, vocabulary)
        rows = _features(self.features, counts, frequencies)
        labels = np.repeat([1.0, -1.0], [len(own), len(background)])
        return FittedRidge(self.ngrams, vocabulary, rows, ridge(rows(counts), labels), mask)


class Ridge(NamedTuple):
    """A fitted classifier: weights `[features]`, and the decision on each fitted row by a fit without that row."""

    weights: Float32
    bias: float
    left_out: Float64


@dataclass(frozen=True, eq=False)
class FittedRidge:
    """A fitted ridge classifier of texts, by their n-grams."""

    ngrams: _NGrams
    vocabulary: UInt64
    rows: Rows
    learned: Ridge
    mask: Mask | None = None

    def __call__(self, texts: Sequence[str], /) -> Float64:
        parts = [self.rows(count_matrix(self.ngrams.of(part, self.mask), self.vocabulary)) for part in _parts(texts)]
        return np.concatenate([part @ self.learned.weights + self.learned.bias for part in parts]).astype(np.float64)


def ridge(rows: Float32, labels: Float64, penalty: float = RIDGE) -> Ridge:
    """Return the least-squares classifier for labels ±1, where both classes have the same total weight.

    It is solved in the dual, so that the size of the problem is the number of rows: least-squares support vectors with
    an unpenalised bias (Suykens & Vandewalle 1999, eq. 10). The penalty is in units of the rows' mean squared length
    about their (weighted) mean. With M the matrix of the system, the decision on row i by a fit without row i is
    `y_i − α_i / (M⁻¹)_ii` (Cawley & Talbot 2007, eq. 8), so no second fit is needed.
    """
    share = np.where(labels > 0, 0.5 / (labels > 0).sum(), 0.5 / (labels < 0).sum())
    # The rows are float32 to save memory. The system is small, and its inverse needs the digits of float64.
    kernel = (rows @ rows.T).astype(np.float64)
    # The mean of |x_i − x̄|², from inner products alone.
    spread = float(np.mean(np.diag(kernel) - 2 * kernel @ share + share @ kernel @ share))
    size = len(labels)
    # The system is [[0, 1ᵀ], [1, K + D]] · [bias, α] = [0, y]. Its first row says that the α sum to 0.
    system = np.ones((size + 1, size + 1))
    system[0, 0] = 0
    # The weight of a row is size · share, which is 1 on average. It divides the penalty, so that errors on the smaller
    # class cost more. Rows that are all equal have no spread, and without any penalty the system would be singular.
    system[1:, 1:] = kernel + np.diag(penalty * max(spread, 1e-12) / (size * share))
    # The decisions without a row need the diagonal of the inverse, so `solve` would not be enough.
    inverse = np.linalg.inv(system)
    bias, *others = inverse @ np.concatenate([[0.0], labels])
    alphas = np.array(others)
    # The weights w = Σ α_i x_i make a decision one product, and the fitted rows need not be kept.
    return Ridge((alphas @ rows).astype(np.float32), float(bias), labels - alphas / np.diag(inverse)[1:])


def _features(kind: str, counts: Float32, frequencies: NDArray[np.int64]) -> Rows:
    if kind == "tfidf":
        return Tfidf.of(frequencies, len(counts))
    return ZScores.of(counts, root=True) if kind == "zscores" else hellinger


def _parts(texts: Sequence[str], size: int = 200) -> Sequence[Sequence[str]]:
    """Split texts into small parts: the counts of a thousand answers at once would take gigabytes."""
    # One empty part for no texts, because NumPy cannot concatenate an empty list.
    return [texts[start : start + size] for start in range(0, len(texts), size)] or [[]]


@dataclass(frozen=True, eq=False)
class _Order:
    """Counts of n-grams by key, and for each context its count and the number of different symbols after it."""

    keys: UInt64
    counts: NDArray[np.int64]
    contexts: UInt64
    totals: NDArray[np.int64]
    kinds: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class SymbolModel:
    """A model of symbols, each order interpolated with the one below (Witten & Bell 1991, method C).

    `p_n(c | h) = (count(h c) + kinds(h) · p_{n-1}(c | h')) / (total(h) + kinds(h))`, with 1 / `alphabet` at the bottom.
    """

    orders: tuple[_Order, ...]
    alphabet: int

    @classmethod
    def of(cls, texts: Sequence[UInt64], order: int, alphabet: int) -> SymbolModel:
        """Count the n-grams of texts, with up to `order` symbols of context."""
        return cls(tuple(_order(*level) for level in _levels(texts, order)), alphabet)

    def log_probs(self, texts: Sequence[UInt64]) -> Float64:
        """Return the mean log-prob of each text's symbols under each order, in nats: float64 `[orders, texts]`.

        The first order has no context, the last one the longest. A text without symbols gets 0.
        """
        return self.read(_levels(texts, len(self.orders) - 1), [len(text) for text in texts])

    def read(self, levels: Sequence[tuple[UInt64, UInt64]], lengths: Sequence[int]) -> Float64:
        """Return the `log_probs` of texts of the given lengths, from the contexts and keys of all their symbols."""
        owner = np.repeat(np.arange(len(lengths)), lengths)
        sizes = np.maximum(np.bincount(owner, minlength=len(lengths)), 1)
        p = np.full(len(owner), 1 / self.alphabet)
        means = np.zeros((len(self.orders), len(lengths)))
        # All texts are read in one go: a call of NumPy for each text and order would take longer than the sums.
        for n, (level, (contexts, keys)) in enumerate(zip(self.orders, levels, strict=True)):
            place, known = lookup(level.contexts, contexts)
            # `lookup` returns a place for unknown keys too. The product with `known` makes their counts 0.
            total, kinds = level.totals[place] * known, level.kinds[place] * known
            place, seen = lookup(level.keys, keys)
            count = level.counts[place] * seen
            # A context that was never seen says nothing, so the probability of the order below stays.
            p = np.where(known, (count + kinds * p) / np.maximum(total + kinds, 1), p)
            means[n] = np.bincount(owner, weights=np.log(p), minlength=len(lengths)) / sizes
        return means


def _levels(texts: Sequence[UInt64], order: int) -> list[tuple[UInt64, UInt64]]:
    """Return for each order 0 to `order` the keys of every symbol's context, and of the context with the symbol.

    The symbols are those of all texts, one after the other. Each text is preceded by `order` spaces, so that its first
    symbol has a context too.
    """
    padding = np.full(order, ord(" "), dtype=np.uint64)
    line = np.concatenate([part for text in texts for part in (padding, text)] or [padding])
    lengths = np.array([len(text) for text in texts], dtype=np.int64)
    # Before a symbol of text i there are the symbols before it in all texts, and the spaces of i + 1 texts.
    places = np.arange(lengths.sum()) + np.repeat(order * np.arange(1, len(texts) + 1), lengths)
    # All n-grams are hashed in one pass over the line. Those that reach into the text before are never looked at.
    hashed = grams(line, 1, order + 1)
    levels = [(np.zeros(len(places), dtype=np.uint64), hashed[0][places])]
    levels += [(hashed[n - 1][places - n], hashed[n][places - n]) for n in range(1, order + 1)]
    return levels


def _order(contexts: UInt64, keys: UInt64) -> _Order:
    unique, first, counts = np.unique(keys, return_index=True, return_counts=True)
    # Each different key is one kind of symbol after its context. So the keys of a context count its kinds, and their
    # counts add up to its total.
    heads, inverse = np.unique(contexts[first], return_inverse=True)
    totals = np.bincount(inverse, weights=counts).astype(np.int64)
    return _Order(unique, counts, heads, totals, np.bincount(inverse))


@dataclass(frozen=True)
class Surprise:
    """The surprise of a text under a model of the background less that under the person's, in nats per symbol."""

    name: str
    symbols: str  # "characters" or "words"
    order: int
    alphabet: int

    def fit(self, own: Sequence[str], background: Sequence[str]) -> Fitted:
        """Fit a model of symbols on each side."""
        person, others = (SymbolModel.of([self._read(text) for text in side], self.order, self.alphabet)
                          for side in (own, background))  # fmt: skip

        def decide(texts: Sequence[str]) -> Float64:
            symbols = [self._read(text) for text in texts]
            levels, lengths = _levels(symbols, self.order), [len(text) for text in symbols]
            difference: Float64 = person.read(levels, lengths)[-1] - others.read(levels, lengths)[-1]
            return difference

        return decide

    def left_out(self, own: Sequence[str], background: Sequence[str], folds: int) -> Float64:
        """Return the decisions on all fitted texts, own first, each by models without that text's fold."""
        texts = [self._read(text) for text in (*own, *background)]
        sides = np.repeat([0, 1], [len(own), len(background)])
        fold = np.concatenate([np.arange(len(own)) % folds, np.arange(len(background)) % folds])
        owner = np.repeat(np.arange(len(texts)), [len(text) for text in texts])
        if not len(owner):
            return np.zeros(len(texts))
        p = np.full((2, len(owner)), 1 / self.alphabet)
        for contexts, keys in _levels(texts, self.order):
            _, first, key = np.unique(keys, return_index=True, return_inverse=True)
            heads, context = np.unique(contexts, return_inverse=True)
            head = context[first]
            # The n-grams are numbered once, and counted by side and fold. The counts of all folds but one are then a
            # sum, where a model for each fold would sort the n-grams again.
            part = (sides * folds + fold)[owner] * len(first) + key
            counts = np.bincount(part, minlength=2 * folds * len(first)).reshape(2, folds, len(first))
            for side in (0, 1):
                whole = counts[side].sum(axis=0)
                for number in range(folds):
                    here = np.flatnonzero(fold[owner] == number)
                    count = whole - counts[side, number]
                    total = np.bincount(head, weights=count, minlength=len(heads))[context[here]]
                    kinds = np.bincount(head, weights=count > 0, minlength=len(heads))[context[here]]
                    below = p[side, here]
                    seen = (count[key[here]] + kinds * below) / np.maximum(total + kinds, 1)
                    p[side, here] = np.where(total > 0, seen, below)
        sizes = np.maximum(np.bincount(owner, minlength=len(texts)), 1)
        decided: Float64 = np.bincount(owner, weights=np.log(p[0] / p[1]), minlength=len(texts)) / sizes
        return decided

    def _read(self, text: str) -> UInt64:
        return characters(text) if self.symbols == "characters" else word_tokens(text)


@dataclass(frozen=True)
class TfidfCosine:
    """The cosine of character 4-gram TF-IDF with the person's mean (the baseline of PAN 2020 and after)."""

    name: str = "tfidf cosine"

    def fit(self, own: Sequence[str], background: Sequence[str]) -> Fitted:
        """Fit on the person's texts. The background gives document frequencies or z-scores."""
        ngrams = _NGrams("characters", 4, 4)
        documents = ngrams.of([*own, *background])
        vocabulary, frequencies = document_frequencies(documents, 1, VOCABULARY)
        rows = Tfidf.of(frequencies, len(documents))
        mean = unit_rows(rows(count_matrix(documents[: len(own)], vocabulary)).mean(axis=0, keepdims=True))[0]

        def decide(texts: Sequence[str]) -> Float64:
            cosines: Float64 = (rows(count_matrix(ngrams.of(texts), vocabulary)) @ mean).astype(np.float64)
            return cosines

        return decide


@dataclass(frozen=True)
class CosineDelta:
    """The cosine of z-scored frequencies of common words with the mean (Evert et al. 2017, section 2.2)."""

    name: str = "cosine delta"
    most_frequent: int = 150

    def fit(self, own: Sequence[str], background: Sequence[str]) -> Fitted:
        """Fit on the person's texts. The background gives document frequencies or z-scores."""
        ngrams = _NGrams("words", 1, 1)
        documents = ngrams.of([*own, *background])
        keys, counts = np.unique(np.concatenate(documents), return_counts=True)
        vocabulary = np.sort(keys[np.argsort(-counts, kind="stable")[: self.most_frequent]])
        scores = ZScores.of(count_matrix(documents, vocabulary))
        mean = unit_rows(scores(count_matrix(documents[: len(own)], vocabulary)).mean(axis=0, keepdims=True))[0]

        def decide(texts: Sequence[str]) -> Float64:
            rows = unit_rows(scores(count_matrix(ngrams.of(texts), vocabulary)))
            cosines: Float64 = (rows @ mean).astype(np.float64)
            return cosines

        return decide


MASKED_CHARACTERS = RidgeMeasure("masked characters", _NGrams("characters", 1, 5), "tfidf", unmasked=150)
MASKED_WORDS = RidgeMeasure("masked words", _NGrams("words", 1, 2), "zscores", unmasked=400, most=2_000)
"""The first two measures with rare words masked, for comparison."""


@cache
def measures() -> tuple[Measure, ...]:
    """Return the measures of a voice score."""
    # Cached, because `scoring` recognises the built-in measures by identity.
    return (
        RidgeMeasure("characters", _NGrams("characters", 1, 5), "tfidf"),
        RidgeMeasure("words", _NGrams("words", 1, 2), "hellinger"),
        RidgeMeasure("delta", _NGrams("words", 1, 1), "zscores"),
        Surprise("surprise", "characters", 3, 128),
        Surprise("phrases", "words", 2, 20_000),
    )
