"""The language of each passage, by py3langid (Lui & Baldwin 2012, langid.py)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

MARGIN = 20.0
"""How much more probable than the main language another must be, in nats, before a passage counts as of the other."""


def languages_of(texts: Sequence[str]) -> tuple[str, list[str]]:
    """Return the main language of texts (ISO 639-1, by characters), and that of each text.

    A text that is nearly as probable in the main language counts as of that: names and short texts mislead.
    """
    import py3langid  # noqa: PLC0415 (0.3 s)

    scores = [dict(py3langid.rank(text)) for text in texts]
    best = [max(ranked, key=lambda language: ranked[language]) for ranked in scores]
    sizes: Counter[str] = Counter()
    for text, language in zip(texts, best, strict=True):
        sizes[language] += len(text)
    main = sizes.most_common(1)[0][0] if sizes else ""
    return main, [
        language if ranked[language] > ranked[main] + MARGIN else main
        for language, ranked in zip(best, scores, strict=True)
    ]
