"""Near-duplicate prompts: equal without case, whitespace and punctuation, or nearly equal.

Two texts are near-duplicates if their sets of character 4-grams have a Jaccard similarity of `THRESHOLD` or more and
the numbers in them are the same (`question 12` and `question 13` are different prompts). Candidates come from MinHash
signatures in bands (Broder 1997; Leskovec, Rajaraman & Ullman, Mining of Massive Datasets, section 3.4), and every one
is then compared exactly. Groups are transitive: a text is in the group of any text that it nearly equals.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from mindprint.contract import Bool, Float32

THRESHOLD = 0.7
"""Jaccard similarity from which two texts are near-duplicates."""

GRAM = 4
"""Characters of a gram."""

BANDS, ROWS = 90, 6
"""A pair at the threshold shares no band with probability (1 - 0.7^6)^90 = 1.3e-5, one at 0.8 with 3e-12."""

SKETCH = 512
"""Grams that a text's signature is made of, those with the smallest hashes. Exact comparison uses all grams."""

MANY_CANDIDATES = 300_000
"""Candidates of all bands together above which it is faster to compare all texts by matrix products."""

COLUMNS = 2048
"""Columns of those products. With more grams than columns, a product is an upper bound."""

BLOCK = 1024
"""Texts in one product."""

CHECKED_AT_ONCE = 20_000
"""Pairs that are compared exactly at a time."""

Ints = NDArray[np.int64]
Hashes = NDArray[np.uint64]


def normalised(text: str) -> str:
    """Return text in NFKC without case, punctuation and runs of whitespace. Text that is all punctuation keeps it."""
    # Case folding can leave text that is not in NFKC, so it is normalised again.
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(folded.translate(_WITHOUT_PUNCTUATION).split()) or " ".join(folded.split())


def near_duplicate_groups(texts: Sequence[str]) -> Ints:
    """Return the group of each text, as the index of the group's first text: int64 `[texts]`."""
    plain = [normalised(text) for text in texts]
    # Read backwards, so that the first appearance of a text is the one that the dict keeps.
    first = {text: index for index, text in reversed(list(enumerate(plain)))}
    places = {text: place for place, text in enumerate(dict.fromkeys(plain))}
    labels = _grouped(_Grams.of(list(places)))
    members = np.array([first[text] for text in places], dtype=np.int64)
    # Unique texts are in the order of their first appearance, so the smallest label is that of the first text.
    return np.array([members[labels[places[text]]] for text in plain], dtype=np.int64)


class _Spaces(dict[int, int]):
    """A table for `str.translate`, filled as characters come: punctuation, separators and controls become a space."""

    def __missing__(self, code: int) -> int:
        kind = unicodedata.category(chr(code))[0]
        self[code] = 0x20 if kind in "PZC" else code
        return self[code]


_WITHOUT_PUNCTUATION = _Spaces()


def _numbers(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\d+", text))


@dataclass(frozen=True, eq=False)
class _Grams:
    """The set of grams of each text, one after another: `flat[starts[i]:starts[i + 1]]`, sorted, each once.

    `numbers` int64 `[texts]` is the same for texts with the same numbers in the same order.
    """

    flat: Hashes
    starts: Ints
    numbers: Ints

    @classmethod
    def of(cls, texts: Sequence[str]) -> _Grams:
        sets = [_gram_set(text) for text in texts]
        known: dict[tuple[str, ...], int] = {}
        numbers = [known.setdefault(_numbers(text), len(known)) for text in texts]
        starts = np.cumsum([0, *(len(grams) for grams in sets)], dtype=np.int64)
        flat = np.concatenate(sets) if sets else np.zeros(0, dtype=np.uint64)
        return cls(flat, starts, np.array(numbers, dtype=np.int64))

    @property
    def sizes(self) -> Ints:
        return np.diff(self.starts)

    def places(self, texts: Ints) -> tuple[Ints, Ints]:
        """Return for each gram of `texts`, in order, which of `texts` has it, and its place in `flat`."""
        lengths = self.sizes[texts]
        owner = np.repeat(np.arange(len(texts)), lengths)
        # The position in the whole, less the position at which the text starts, counts from 0 in each text.
        within = np.arange(len(owner)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        return owner, self.starts[texts[owner]] + within

    def sketch(self) -> tuple[Hashes, Ints]:
        """Return at most `SKETCH` grams per text, and each text's start: the smallest hashes are a random choice."""
        # Each set is sorted, so its first grams are those with the smallest hashes.
        kept = np.minimum(self.sizes, SKETCH)
        starts = np.cumsum(kept) - kept
        return self.flat[np.repeat(self.starts[:-1] - starts, kept) + np.arange(kept.sum())], starts


def _gram_set(text: str) -> Hashes:
    """Return 64-bit hashes of the 4-grams of a text with a space on either side, or of the whole if it is shorter."""
    # Padding gives each text a gram: for an empty set `reduceat` in `_buckets` would read the next text's first gram.
    codes = np.frombuffer(f" {text} ".ljust(GRAM).encode("utf-32-le"), dtype=np.uint32).astype(np.uint64)
    grams = codes[: len(codes) - GRAM + 1].copy()
    for offset in range(1, GRAM):
        # A character has 21 bits: four of them do not fit 64, so the sum is mixed as it grows.
        grams = _mixed(grams) + codes[offset : len(codes) - GRAM + 1 + offset]
    return np.unique(_mixed(grams))


def _mixed(values: Hashes) -> Hashes:
    """Apply the finaliser of SplitMix64 (Steele, Lea & Flood 2014): each bit of the result depends on every bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _grouped(grams: _Grams) -> Ints:
    """Return the smallest index in the group of each text: int64 `[texts]`."""
    labels = np.arange(len(grams.sizes), dtype=np.int64)
    if len(labels) < 2:
        return labels
    buckets = list(_buckets(grams))
    if sum(int((sizes * (sizes - 1) // 2).sum()) for _, sizes in buckets) > MANY_CANDIDATES:
        involved = np.unique(np.concatenate([members for members, _ in buckets]))
        return _by_products(grams, involved, labels)
    for members, sizes in buckets:
        labels = _joined_if_near(grams, _pairs_within(members, sizes), labels)
    return labels


def _buckets(grams: _Grams) -> Iterator[tuple[Ints, Ints]]:
    """Yield for each band the texts that share their part of the signature, bucket by bucket, and the bucket sizes."""
    sketch, starts = grams.sketch()
    # A fixed seed finds the same groups in the same data, so a split can be repeated.
    rng = np.random.default_rng(0)
    for _ in range(BANDS):
        # Texts with different numbers are never near-duplicates, so the numbers are part of the bucket's key.
        keys = _mixed(grams.numbers.astype(np.uint64))
        for _ in range(ROWS):
            factor, offset = rng.integers(0, 2**64, 2, dtype=np.uint64)
            # Multiplication by an odd number is invertible modulo 2^64, so this is a permutation of all hashes. The
            # least permuted hash is one value of the MinHash signature (Broder 1997).
            keys = _mixed(keys + np.minimum.reduceat(sketch * (factor | np.uint64(1)) + offset, starts))
        _, bucket, counts = np.unique(keys, return_inverse=True, return_counts=True)
        order = np.argsort(bucket, kind="stable")
        yield order[counts[bucket[order]] > 1], counts[counts > 1]


def _pairs_within(members: Ints, sizes: Ints) -> Ints:
    """Return all pairs of each bucket: int64 `[pairs, 2]`."""
    pairs = [np.zeros((0, 2), dtype=np.int64)]
    ends = np.cumsum(sizes)
    # Buckets of one size are handled together: NumPy is called once for each size and not for each bucket.
    for size, group in groupby(sorted(zip(sizes.tolist(), ends.tolist(), strict=True)), key=lambda bucket: bucket[0]):
        rows = members[np.array([end for _, end in group])[:, None] - size + np.arange(size)]
        first, second = np.triu_indices(size, 1)
        pairs.append(np.stack([rows[:, first], rows[:, second]], axis=-1).reshape(-1, 2))
    return np.concatenate(pairs)


def _joined_if_near(grams: _Grams, pairs: Ints, labels: Ints) -> Ints:
    """Compare the pairs that are in different groups exactly, and join the groups of near-duplicates."""
    # Groups are transitive, so a pair that earlier portions put in one group need not be compared any more.
    while len(pairs := pairs[labels[pairs[:, 0]] != labels[pairs[:, 1]]]):
        now, pairs = pairs[:CHECKED_AT_ONCE], pairs[CHECKED_AT_ONCE:]
        labels = joined(labels, now[_near(grams, now)])
    return labels


def _near(grams: _Grams, pairs: Ints) -> Bool:
    """Return which pairs are near-duplicates: bool `[pairs]`."""
    owner, places = grams.places(pairs[:, 0])
    there = _contains(grams, pairs[owner, 1], grams.flat[places])
    shared = np.bincount(owner[there], minlength=len(pairs))
    (first, second), (number, other) = grams.sizes[pairs].T, grams.numbers[pairs].T
    near: Bool = _alike(shared, first, second) & (number == other)
    return near


def _contains(grams: _Grams, texts: Ints, gram: Hashes) -> Bool:
    """Return whether each gram is in its text's set, by a bisection of all of them at once."""
    low, high = grams.starts[texts], grams.starts[texts + 1]
    end = high
    # A bisection of n grams ends within as many steps as n has bits. The largest set decides for all.
    for _ in range(int(grams.sizes.max()).bit_length()):
        middle = (low + high) // 2
        # A bisection that has ended can point past the last gram. Its index is clipped, and its value does not count.
        below = (middle < high) & (grams.flat[np.minimum(middle, len(grams.flat) - 1)] < gram)
        low, high = np.where(below, middle + 1, low), np.where(below, high, middle)
    there: Bool = (low < end) & (grams.flat[np.minimum(low, len(grams.flat) - 1)] == gram)
    return there


def _alike(shared: Ints | Float32, first: Ints, second: Ints) -> Bool:
    """Return whether |A ∩ B| / |A ∪ B| ≥ 0.7, in whole numbers: 10 · shared ≥ 7 · union."""
    # |A ∪ B| = |A| + |B| - shared. Whole numbers keep the comparison exact at the threshold itself.
    tenths = round(THRESHOLD * 10)
    alike: Bool = (10 + tenths) * shared >= tenths * (first + second)
    return alike


def _by_products(grams: _Grams, texts: Ints, labels: Ints) -> Ints:
    """Compare all of `texts` by matrix products of their sets, each with those of at least 0.7 of its size."""
    texts = texts[np.argsort(grams.sizes[texts], kind="stable")]
    sizes, numbers = grams.sizes[texts], grams.numbers[texts]
    kinds, column = np.unique(grams.flat, return_inverse=True)
    # Grams that share a column can make a product too large and never too small. So no pair is missed, and those
    # that are kept need the exact comparison.
    exact = len(kinds) <= COLUMNS
    for start in range(0, len(texts), BLOCK):
        rows = slice(start, start + BLOCK)
        # Sets whose sizes differ by more cannot reach the threshold, so they are not compared.
        least = np.searchsorted(sizes, THRESHOLD * sizes[start] - 1e-9)
        block = _matrix(grams, column, texts[rows])
        for other in range(int(least), min(start + BLOCK, len(texts)), BLOCK):
            those = slice(other, min(other + BLOCK, start + BLOCK))
            shared = block @ _matrix(grams, column, texts[those]).T
            near = _alike(shared, sizes[rows, None], sizes[None, those])
            near &= numbers[rows, None] == numbers[None, those]
            near &= labels[texts[rows], None] != labels[None, texts[those]]
            pairs = np.argwhere(near) + np.array([start, other])
            # The product is symmetric: below its diagonal each pair appears once, and no text is paired with itself.
            pairs = texts[pairs[pairs[:, 0] > pairs[:, 1]]]
            labels = joined(labels, pairs) if exact else _joined_if_near(grams, pairs, labels)
    return labels


def _matrix(grams: _Grams, column: Ints, texts: Ints) -> Float32:
    """Return the number of a text's grams in each column: float32 `[texts, COLUMNS]`. Products are whole numbers."""
    owner, places = grams.places(texts)
    # If no column is shared, a product is at most `COLUMNS`. float32 holds whole numbers up to 2^24 exactly.
    cells = owner * COLUMNS + column[places] % COLUMNS
    return np.bincount(cells, minlength=len(texts) * COLUMNS).reshape(-1, COLUMNS).astype(np.float32)


def joined(labels: Ints, pairs: Ints) -> Ints:
    """Join the groups of each pair (int64 `[pairs, 2]`): every label is the smallest index of its group."""
    labels = labels.copy()
    while len(pairs := pairs[labels[pairs[:, 0]] != labels[pairs[:, 1]]]):
        ends = np.sort(labels[pairs], axis=1)
        # A label can be in several pairs. `minimum.at` keeps the least value, an assignment would keep the last.
        np.minimum.at(labels, ends[:, 1], ends[:, 0])
        # Each label points to a smaller one of its group. Following the pointers ends at the group's first text.
        while (labels[labels] != labels).any():
            labels = labels[labels]
    return labels
