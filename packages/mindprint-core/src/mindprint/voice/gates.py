"""Gates before the voice score: an answer must be text, as the person writes text, before its voice counts.

The measures of a voice compare frequencies, so they cannot see that words are in no order or that a sentence is said
nine times. Each gate looks for one such fault. Its limits come from the person's own passages, so that a person who
repeats herself may be imitated. What fails a gate is at the floor of the scale, and is counted with the reason.

    gates = fit_gates(own_passages, other_passages, seed=0)
    gates.reasons(answers)  # (None, "repeats itself", None, ...)

A gate is any callable from texts to a reason for each, or None where the text may pass. `Gates.gates` is a tuple, to
which a gate that needs a model, such as one on the log-probs of tokens, can be added.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mindprint.contract import Float64
from mindprint.text.ngrams import UInt64, repeated_share, word_symbols
from mindprint.text.words import words
from mindprint.voice.measures import SymbolModel

Gate = Callable[[Sequence[str]], "Sequence[str | None]"]
"""Return for each text the reason why its voice does not count, or None."""

EMPTY, ONE_WORD = "has no word", "is one word"
REPEATS, FEW_WORDS = "repeats itself", "uses very few different words"
OTHER_LANGUAGE, NO_ORDER = "is in another language", "has its words in no order"

WINDOW = 50
"""Words among which different words are counted. A longer text has fewer different ones for each of its words."""

COMMON = 200
"""The person's most frequent words, by which her language is known."""

ALLOWED = 0.15
"""How much more than in the person's own passages may be repeated, and how much less may be different words."""

ENOUGH_WORDS = 20
"""A text with fewer words is too short to tell an order or a language."""

SEPARATED = 1.5
"""Standard deviations from the limit to each side that the gate of order needs: 7 % of either side are beyond it."""

FOLDS = 5
PLACEHOLDER_ALPHABET = 20_000


@dataclass(frozen=True)
class Gates:
    """The gates of one person, in the order in which they are asked."""

    gates: tuple[Gate, ...] = ()

    def reasons(self, texts: Sequence[str]) -> tuple[str | None, ...]:
        """Return for each text the reason of the first gate that it fails, or None."""
        found: list[str | None] = [None] * len(texts)
        for gate in self.gates:
            for place, reason in enumerate(gate(texts)):
                found[place] = found[place] or reason
        return tuple(found)


NO_GATES = Gates()


def fit_gates(own: Sequence[str], background: Sequence[str], *, seed: int = 0) -> Gates:
    """Fit the limits of every gate that needs only texts.

    Args:
        own: Passages of the person.
        background: Passages of others in the same language, which add to what is known of the order of its words.
        seed: The seed of the shuffles that show how passages without an order look.
    """
    person = [words(text) for text in own]
    order = _order_gate(person, [words(text) for text in background], seed)
    gates = (too_short(person), repetition(person), variety(person), language(person))
    return Gates((*gates, order) if order else gates)


def too_short(person: Sequence[Sequence[str]]) -> Gate:
    """Return the gate against answers without a word, and of one word by a person who says more."""
    shortest = min(len(text) for text in person)

    def reason(text: Sequence[str]) -> str | None:
        if not text:
            return EMPTY
        return ONE_WORD if len(text) == 1 < shortest else None

    return _of_words(reason)


def repetition(person: Sequence[Sequence[str]]) -> Gate:
    """Return the gate against loops: the share of runs of words that the text had before."""
    most = max(repeated_share(text) for text in person) + ALLOWED
    return _of_words(lambda text: REPEATS if repeated_share(text) > most else None)


def variety(person: Sequence[Sequence[str]]) -> Gate:
    """Return the gate against a few words said over and over in changing order, such as random function words."""
    # A text shorter than the window has more different words for its length, so a limit for long ones is safe for it.
    least = min(different_share(text) for text in person) - ALLOWED
    return _of_words(lambda text: FEW_WORDS if len(text) >= ENOUGH_WORDS and different_share(text) < least else None)


def language(person: Sequence[Sequence[str]]) -> Gate:
    """Return the gate against answers with hardly any of the person's common words, which make up half of a text.

    A person who writes in two languages has passages in either, and common words of both.
    """
    counts = Counter(word for text in person for word in text)
    common = {word for word, _ in counts.most_common(COMMON)}

    def share(text: Sequence[str]) -> float:
        return sum(word in common for word in text) / max(len(text), 1)

    least = min(share(text) for text in person) / 2
    return _of_words(lambda text: OTHER_LANGUAGE if len(text) >= ENOUGH_WORDS and share(text) < least else None)


@dataclass(frozen=True, eq=False)
class OrderGate:
    """A gate against words in no order.

    The gain of a text is how much better its words are predicted from the word before than alone, in nats per word. It
    is positive in text, and negative in shuffled text, whatever the subject. Punctuation does not count, because a
    shuffle leaves it at its word.
    """

    model: SymbolModel
    limit: float
    least_words: int

    def __call__(self, texts: Sequence[str]) -> Sequence[str | None]:
        symbols = [word_symbols(words(text)) for text in texts]
        gains = order_gains(self.model, symbols)
        return [
            NO_ORDER if len(text) >= self.least_words and gain < self.limit else None
            for text, gain in zip(symbols, gains, strict=True)
        ]


def _order_gate(person: Sequence[Sequence[str]], others: Sequence[Sequence[str]], seed: int) -> OrderGate | None:
    """Return the gate of order, or None if the texts are too few to tell shuffled passages from others."""
    rng = np.random.default_rng([seed, 2])
    texts = [word_symbols(text) for text in (*person, *others)]
    kept, shuffled = [], []
    for fold in range(FOLDS):
        # The person's passages only are tested, each by a model without it.
        tested = [text for text in texts[fold : len(person) : FOLDS] if len(text) > 1]
        model = _bigrams([text for index, text in enumerate(texts) if index >= len(person) or index % FOLDS != fold])
        kept.append(order_gains(model, tested))
        shuffled.append(order_gains(model, [rng.permutation(text) for text in tested]))
    limit = _between(np.concatenate(shuffled), np.concatenate(kept))
    if limit is None:
        return None
    typical = int(np.median([len(text) for text in person]))
    return OrderGate(_bigrams(texts), limit, max(ENOUGH_WORDS, typical // 2))


def order_gains(model: SymbolModel, texts: Sequence[UInt64]) -> Float64:
    """Return the log-prob of words after the word before them less that of the words alone, in nats: `[texts]`."""
    alone, after = model.log_probs(texts)
    gains: Float64 = after - alone
    return gains


def _bigrams(texts: Sequence[UInt64]) -> SymbolModel:
    return SymbolModel.of(texts, 1, PLACEHOLDER_ALPHABET)


def _between(low: Float64, high: Float64) -> float | None:
    """Return the value with the same distance from both samples in their standard deviations, or None if too near."""
    if len(low) < 2:
        return None
    # Shuffles that all have one gain have no spread. The bound keeps the division possible.
    spread = float(low.std() + high.std()) + 1e-9
    distance = float(high.mean() - low.mean()) / spread
    return float(low.mean() + distance * low.std()) if distance >= SEPARATED else None


def different_share(text: Sequence[str]) -> float:
    """Return the mean share of different words in windows of `WINDOW` words (Covington & McFall 2010)."""
    if len(text) <= WINDOW:
        return len(set(text)) / max(len(text), 1)
    starts = range(0, len(text) - WINDOW + 1, 10)
    return float(np.mean([len(set(text[start : start + WINDOW])) / WINDOW for start in starts]))


def _of_words(reason: Callable[[Sequence[str]], str | None]) -> Gate:
    return lambda texts: [reason(words(text)) for text in texts]
