"""Near-duplicate prompts: equal without case, whitespace and punctuation, or nearly equal.

Two texts are near-duplicates if their sets of character 4-grams have a weighted Jaccard similarity of `THRESHOLD` or
more and the numbers in them are the same (`question 12` and `question 13` are different prompts). A gram weighs less if
more of the texts have it, as in inverse document frequency (Sparck Jones 1972): text that comes from a template counts
little, and prompts made from one template are told apart by the words put into it. Among few texts all grams weigh the
same.

Candidates come from weighted MinHash signatures in bands (Broder 1997; Leskovec, Rajaraman & Ullman, Mining of Massive
Datasets, section 3.4), and are then compared exactly. Groups are transitive: a text is in the group of any text that it
nearly equals. The time grows with the number of texts, and not with that of their pairs.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mindprint.contract import Bool, Float64
from mindprint.draws import mixed

THRESHOLD = 0.7
"""Jaccard similarity from which two texts are near-duplicates."""

GRAM = 4
"""Characters of a gram."""

PRIOR = 100
"""Texts that are added to all counts: about this number must share a gram before it weighs clearly less."""

STEPS = 16
"""Weights are whole numbers, this many to a factor of two, so that comparisons are exact."""

LEAST_WEIGHT = 0.25
"""The weight of a gram that every text has, in factors of two. Not zero, so that no text is without weight."""

BANDS, ROWS = 90, 6
"""A pair at the threshold shares no band with probability (1 - 0.7^6)^90 = 1.3e-5, one at 0.8 with 3e-12."""

SKETCH = 512
"""Grams that a text's signature is made of, those with the smallest hashes. Exact comparison uses all grams."""

SIGNATURE, SIGNATURE_LEAST = 128, 64
"""Values of the signature that are kept, and how many a pair must share to be compared exactly.

A pair at the threshold shares 90 of them, with a standard deviation of 5.2: it is missed once in three million times.
"""

LARGE_BUCKET, ROUNDS = 24, 6
"""Texts of a bucket from which on they are compared with its first text, and then with the first of the rest, so often.

All pairs of it would make the time quadratic. Those that are missed have 89 further bands to be found in.
"""

SIGNED_AT_ONCE, CHECKED_AT_ONCE = 50_000, 20_000
"""Pairs whose signatures are compared, and that are compared exactly, at a time."""

GRAMS_AT_ONCE = 2**21
"""About how many grams are sorted, counted or ranked at a time: arrays of them are all that is large."""

OnProgress = Callable[[int, int], None]
"""Receives how many bands have been searched, of how many."""

Ints = NDArray[np.int64]
Hashes = NDArray[np.uint64]
Kinds = NDArray[np.int32]
Signatures = NDArray[np.uint8]


def normalised(text: str) -> str:
    """Return text in NFKC without case, punctuation and runs of whitespace. Text that is all punctuation keeps it."""
    # Case folding can leave text that is not in NFKC, so it is normalised again.
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(folded.translate(_WITHOUT_PUNCTUATION).split()) or " ".join(folded.split())


def prompt_digest(plain: str) -> bytes:
    """Return the BLAKE2b digest of a normalised text, 16 bytes."""
    return hashlib.blake2b(plain.encode(), digest_size=16).digest()


def near_duplicate_groups(texts: Iterable[str], on_progress: OnProgress | None = None) -> Ints:
    """Return the group of each text, as the index of the group's first text: int64 `[texts]`."""
    return near_duplicates(texts, on_progress)[0]


def near_duplicates(texts: Iterable[str], on_progress: OnProgress | None = None) -> tuple[Ints, Hashes]:
    """Return the group of each text, as the index of the group's first text, and the texts' digests.

    The groups are int64 `[texts]`, the digests uint64 `[texts, 2]`, the first half and the second one. The texts are
    read twice, so that only their grams are ever together.
    """
    search = PromptSearch(texts)
    candidates = search.candidates(range(BANDS), on_progress or (lambda _done, _total: None))
    return search.groups([candidates], on_progress), search.digests


@dataclass(frozen=True, eq=False)
class Candidates:
    """The candidates in some of the bands: texts that share their part of a signature, bucket by bucket, and sizes.

    `signatures` uint8 `[texts, columns]` are bits of the values of the texts' signatures that these bands made.
    """

    bands: Mapping[int, tuple[NDArray[np.int32], NDArray[np.int32]]]
    columns: tuple[int, ...]
    signatures: Signatures


class PromptSearch:
    """The search for near-duplicates among texts, in two parts: candidates, band by band, and their comparison.

    Bands do not depend on each other, so processes that each have the texts can divide them. The texts are read twice.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        content = bytearray().join(prompt_digest(normalised(text)) for text in texts)
        self.digests: Hashes = np.frombuffer(content, dtype=">u8").astype(np.uint64).reshape(-1, 2)
        self._first, self._places = _first_of_each(self.digests)
        is_first = np.zeros(len(self.digests), dtype=np.bool_)
        is_first[self._first] = True
        # In the order of their first appearance, so the smallest label is that of the first text.
        plain = (normalised(text) for text, new in zip(texts, is_first, strict=True) if new)
        self._search = _Search(_Grams.of(plain))

    def candidates(self, bands: Collection[int], on_progress: OnProgress = lambda _done, _total: None) -> Candidates:
        """Return the candidates in some of the bands."""
        columns = tuple(place for place in range(SIGNATURE) if place // ROWS in bands)
        signatures = np.zeros((len(self._first), len(columns)), dtype=np.uint8)
        if len(self._first) < 2:
            return Candidates({}, columns, signatures)
        return Candidates(dict(self._search.bands(bands, signatures, on_progress)), columns, signatures)

    def groups(self, candidates: Sequence[Candidates], on_progress: OnProgress | None = None) -> Ints:
        """Return the group of each text, from the candidates in all bands."""
        labels = np.arange(len(self._first), dtype=np.int64)
        signatures = np.zeros((len(self._first), SIGNATURE), dtype=np.uint8)
        for part in candidates:
            signatures[:, part.columns] = part.signatures
        every = {band: found for part in candidates for band, found in part.bands.items()}
        for band in sorted(every):
            members, sizes = every[band]
            labels = self._search.joined_in_band(members.astype(np.int64), sizes.astype(np.int64), signatures, labels)
            if on_progress is not None:
                on_progress(BANDS + band + 1, 2 * BANDS)
        return self._first[labels[self._places]]


def _first_of_each(digests: Hashes) -> tuple[Ints, Ints]:
    """Return the indices of texts that are not equal to an earlier one, ascending, and which of them each text equals.

    Both are int64, `[unique]` and `[texts]`.
    """
    order = np.lexsort((np.arange(len(digests)), digests[:, 1], digests[:, 0]))
    new = np.ones(len(order), dtype=np.bool_)
    new[1:] = (digests[order[1:]] != digests[order[:-1]]).any(axis=1)
    # The first of equal digests is the earliest text: the sort is by index last.
    firsts = order[new]
    rank = np.empty(len(firsts), dtype=np.int64)
    rank[np.argsort(firsts)] = np.arange(len(firsts))
    places = np.empty(len(order), dtype=np.int64)
    places[order] = rank[np.cumsum(new) - 1]
    return np.sort(firsts), places


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
    """The set of grams of each text, one after another: `kinds[starts[i]:starts[i + 1]]`, ascending, each once.

    A kind is the index of a gram in `hashes`, which are ascending. `weights` int64 are those of the kinds. `numbers`
    int64 `[texts]` is the same for texts with the same numbers in the same order.
    """

    kinds: Kinds
    hashes: Hashes
    weights: Ints
    starts: Ints
    numbers: Ints

    @classmethod
    def of(cls, texts: Iterable[str]) -> _Grams:
        lengths, numbers = array("q"), array("q")
        known: dict[tuple[str, ...], int] = {}
        blocks: list[Hashes] = []
        block: list[Hashes] = []
        gathered = 0
        for text in texts:
            block.append(_gram_set(text))
            gathered += len(block[-1])
            lengths.append(len(block[-1]))
            numbers.append(known.setdefault(_numbers(text), len(known)))
            if gathered >= GRAMS_AT_ONCE:
                blocks.append(np.concatenate(block))
                block, gathered = [], 0
        blocks.append(np.concatenate([*block, np.zeros(0, dtype=np.uint64)]))
        hashes = np.unique(np.concatenate([np.unique(part) for part in blocks]))
        starts = np.concatenate([[0], np.cumsum(np.array(lengths, dtype=np.int64))])
        kinds, counts = np.zeros(starts[-1], dtype=np.int32), np.zeros(len(hashes), dtype=np.int64)
        end = len(kinds)
        while blocks:
            # A block of hashes is given back as soon as its kinds are known.
            part = np.searchsorted(hashes, blocks.pop())
            kinds[end - len(part) : end] = part
            counts += np.bincount(part, minlength=len(hashes))
            end -= len(part)
        weights = LEAST_WEIGHT + np.log2((len(lengths) + PRIOR) / (counts + PRIOR))
        return cls(kinds, hashes, np.rint(STEPS * weights).astype(np.int64), starts, np.array(numbers))

    @cached_property
    def lengths(self) -> Ints:
        """Return the number of grams of each text."""
        return np.diff(self.starts)

    @cached_property
    def sizes(self) -> Ints:
        """Return the weight of each text's grams together."""
        return _reduced(np.add, self.weights, self.kinds, self.starts)

    def places(self, texts: Ints) -> tuple[Ints, Ints]:
        """Return for each gram of `texts`, in order, which of `texts` has it, and its place in `kinds`."""
        lengths = self.lengths[texts]
        owner = np.repeat(np.arange(len(texts)), lengths)
        # The position in the whole, less the position at which the text starts, counts from 0 in each text.
        within = np.arange(len(owner)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        return owner, self.starts[texts[owner]] + within

    def sketch(self) -> tuple[Kinds, Ints]:
        """Return the kinds of at most `SKETCH` grams per text, and where each text starts and the last one ends.

        The smallest hashes are a random choice.
        """
        if self.lengths.max() <= SKETCH:
            return self.kinds, self.starts
        # Each set is sorted, so its first grams are those with the smallest hashes.
        kept = np.minimum(self.lengths, SKETCH)
        parts = []
        for first, end in _text_blocks(self.starts):
            within = np.arange(kept[first:end].sum())
            before = self.starts[first:end] - (np.cumsum(kept[first:end]) - kept[first:end])
            parts.append(self.kinds[within + np.repeat(before, kept[first:end])])
        return np.concatenate(parts), np.concatenate([[0], np.cumsum(kept)])


def _text_blocks(starts: Ints) -> Iterator[tuple[int, int]]:
    """Yield ranges of texts that have about `GRAMS_AT_ONCE` grams together. A text has grams up to the next start."""
    limits = np.searchsorted(starts, np.arange(0, starts[-1], GRAMS_AT_ONCE))
    yield from pairwise([*dict.fromkeys(limits.tolist()), len(starts) - 1])


def _reduced(operation: np.ufunc, values: NDArray[Any], kinds: Kinds, starts: Ints) -> NDArray[Any]:
    """Reduce the values of each text's kinds, `[kinds]` to `[texts]`, without an array of all texts' values."""
    return np.concatenate(
        [
            operation.reduceat(values[kinds[starts[first] : starts[end]]], starts[first:end] - starts[first])
            for first, end in _text_blocks(starts)
        ]
    )


def _gram_set(text: str) -> Hashes:
    """Return 64-bit hashes of the 4-grams of a text with a space on either side, or of the whole if it is shorter."""
    # Padding gives each text a gram: for an empty set `reduceat` would read the next text's first gram.
    codes = np.frombuffer(f" {text} ".ljust(GRAM).encode("utf-32-le"), dtype=np.uint32).astype(np.uint64)
    grams = codes[: len(codes) - GRAM + 1].copy()
    for offset in range(1, GRAM):
        # A character has 21 bits: four of them do not fit 64, so the sum is mixed as it grows.
        grams = mixed(grams) + codes[offset : len(codes) - GRAM + 1 + offset]
    return np.unique(mixed(grams))


class _Search:
    """The search for near-duplicates: signatures, the buckets of each band, and the comparison of candidates."""

    def __init__(self, grams: _Grams) -> None:
        self._grams = grams

    def bands(
        self, bands: Collection[int], signatures: Signatures, on_progress: OnProgress
    ) -> Iterator[tuple[int, tuple[NDArray[np.int32], NDArray[np.int32]]]]:
        """Yield the texts of each band that share their part of the signature, bucket by bucket, and bucket sizes.

        `signatures` `[texts, columns]` receive bits of the values.
        """
        kinds, starts = self._grams.sketch()
        hashes, weights = self._grams.hashes, self._grams.weights.astype(np.float64)
        column = 0
        # A fixed seed finds the same groups in the same data, so a split can be repeated.
        rng = np.random.default_rng(0)
        # All of them are drawn, so that a band is the same whoever searches it.
        draws = [rng.integers(0, 2**64, 2, dtype=np.uint64) for _ in range(BANDS * ROWS)]
        for number, band in enumerate(bands):
            # Texts with different numbers are never near-duplicates, so the numbers are part of the bucket's key.
            keys = mixed(self._grams.numbers.astype(np.uint64))
            for place in range(band * ROWS, (band + 1) * ROWS):
                least = _reduced(np.minimum, _ranks(hashes, weights, *draws[place]), kinds, starts)
                keys = mixed(keys + least.view(np.uint64))
                if place < SIGNATURE:
                    # Of unequal values one in 256 seems equal, so that a few more pairs are compared exactly.
                    signatures[:, column] = mixed(least.view(np.uint64)) >> np.uint64(56)
                    column += 1
            _, bucket, counts = np.unique(keys, return_inverse=True, return_counts=True)
            order = np.argsort(bucket, kind="stable")
            on_progress(number + 1, 2 * len(bands))
            shared = counts[bucket[order]] > 1
            yield band, (order[shared].astype(np.int32), counts[counts > 1].astype(np.int32))

    def joined_in_band(self, members: Ints, sizes: Ints, signatures: Signatures, labels: Ints) -> Ints:
        """Join the groups of near-duplicates among the texts of each bucket of a band."""
        large = np.repeat(sizes >= LARGE_BUCKET, sizes)
        small = sizes[sizes < LARGE_BUCKET]
        labels = self._joined_if_near(_pairs_within(members[~large], small), signatures, labels)
        # In a large bucket each text is compared with the bucket's first. Those that it joins are done with, and the
        # first of the others is compared next.
        rest, bucket = members[large], np.repeat(np.arange(len(sizes)), sizes)[large]
        for _ in range(ROUNDS):
            if not len(rest):
                break
            _, first, which = np.unique(bucket, return_index=True, return_inverse=True)
            leaders = rest[first][which]
            labels = self._joined_if_near(np.stack([leaders, rest], axis=1), signatures, labels)
            apart = labels[rest] != labels[leaders]
            rest, bucket = rest[apart], bucket[apart]
        return labels

    def _joined_if_near(self, pairs: Ints, signatures: Signatures, labels: Ints) -> Ints:
        """Compare the pairs that are in different groups exactly, and join the groups of near-duplicates."""
        # Groups are transitive, so a pair that earlier portions put in one group need not be compared any more.
        while len(pairs := pairs[labels[pairs[:, 0]] != labels[pairs[:, 1]]]):
            now, pairs = pairs[:SIGNED_AT_ONCE], pairs[SIGNED_AT_ONCE:]
            first, second = signatures[now[:, 0]], signatures[now[:, 1]]
            now = now[np.count_nonzero(first == second, axis=1) >= SIGNATURE_LEAST]
            for start in range(0, len(now), CHECKED_AT_ONCE):
                part = now[start : start + CHECKED_AT_ONCE]
                labels = joined(labels, part[_near(self._grams, part)])
        return labels


def _ranks(hashes: Hashes, weights: Float64, factor: np.uint64, offset: np.uint64) -> Float64:
    """Draw the ranks of all kinds of grams, float64 `[kinds]`: the gram of a text with the least is its MinHash.

    A gram of weight w gets an exponential variate of rate w. The least of several is that of one of them with a
    probability in proportion to its weight, so two texts share theirs with the probability of their weighted Jaccard
    similarity (Chum, Philbin & Zisserman 2008, Near Duplicate Image Detection: min-Hash and tf-idf Weighting).
    """
    # Multiplication by an odd number is invertible modulo 2^64, so this is a permutation of all hashes.
    bits = mixed(hashes * (factor | np.uint64(1)) + offset) >> np.uint64(11)
    # Half a step above zero, whose logarithm would be infinite.
    ranks: Float64 = -np.log((bits.astype(np.float64) + 0.5) * 2.0**-53) / weights
    return ranks


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


def _near(grams: _Grams, pairs: Ints) -> Bool:
    """Return which pairs are near-duplicates: bool `[pairs]`."""
    owner, places = grams.places(pairs[:, 0])
    kinds = grams.kinds[places]
    there = _contains(grams, pairs[owner, 1], kinds)
    # Sums of whole numbers far below 2^53 are exact in float64.
    weights = grams.weights[kinds[there]]
    shared = np.bincount(owner[there], weights=weights, minlength=len(pairs)).astype(np.int64)
    (first, second), (number, other) = grams.sizes[pairs].T, grams.numbers[pairs].T
    near: Bool = _alike(shared, first, second) & (number == other)
    return near


def _contains(grams: _Grams, texts: Ints, kinds: Kinds) -> Bool:
    """Return whether each kind of gram is in its text's set, by a bisection of all of them at once."""
    low, high = grams.starts[texts], grams.starts[texts + 1]
    end = high
    # A bisection of n grams ends within as many steps as n has bits. The largest set decides for all.
    for _ in range(int(grams.lengths.max()).bit_length()):
        middle = (low + high) // 2
        # A bisection that has ended can point past the last gram. Its index is clipped, and its value does not count.
        below = (middle < high) & (grams.kinds[np.minimum(middle, len(grams.kinds) - 1)] < kinds)
        low, high = np.where(below, middle + 1, low), np.where(below, high, middle)
    there: Bool = (low < end) & (grams.kinds[np.minimum(low, len(grams.kinds) - 1)] == kinds)
    return there


def _alike(shared: Ints, first: Ints, second: Ints) -> Bool:
    """Return whether |A ∩ B| / |A ∪ B| ≥ 0.7, in whole numbers: 10 · shared ≥ 7 · union."""
    # |A ∪ B| = |A| + |B| - shared. Whole numbers keep the comparison exact at the threshold itself.
    tenths = round(THRESHOLD * 10)
    alike: Bool = (10 + tenths) * shared >= tenths * (first + second)
    return alike


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
