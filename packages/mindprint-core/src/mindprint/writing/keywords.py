"""Names and long words of a passage, which can be its topic where the base model finds none."""

from __future__ import annotations

import re

from mindprint.text.words import unspaced_share

NAMES, TERMS = 2, 4
"""The most names, and the most names and words together."""

SHORTEST, LONGEST = 6, 24
"""Letters of a word: shorter ones are mostly those that every text has."""

_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")


def keywords(text: str) -> list[str]:
    """Return up to four terms of a passage in the order of the text, none for a script without spaces.

    They follow from the passage alone and not from how often others have its words: writing that is added later must
    change no earlier row.
    """
    if unspaced_share([text]) > 0.5:
        return []
    places = _names(text)
    names = list(places)[:NAMES]
    in_names = {part.casefold() for name in names for part in name.split()}
    lower = (match for match in _WORD.finditer(text) if match[0].islower())
    fit = []
    for match in lower:
        word = match[0]
        if SHORTEST <= len(word) <= LONGEST and word not in in_names and word not in places:
            places[word] = match.start()
            fit.append(word)
    # The longest words carry the most of a text's subject in languages that build words from letters.
    longest = sorted(fit, key=len, reverse=True)[: TERMS - len(names)]
    return sorted([*names, *longest], key=places.__getitem__)


def _names(text: str) -> dict[str, int]:
    """Return the words with a capital letter within a sentence, neighbours together, and their places in the text.

    Neighbours may be on two lines, and have a space between them here.
    """
    names: list[tuple[str, int]] = []
    end = -1
    for match in _WORD.finditer(text):
        before = text[: match.start()].rstrip()
        within = bool(before) and (before[-1].isalnum() or before[-1] in ",;")
        if not within or not match[0][0].isupper() or len(match[0]) < 3:
            continue
        if names and end == match.start() - 1:
            name, start = names[-1]
            names[-1] = f"{name} {match[0]}", start
        else:
            names.append((match[0], match.start()))
        end = match.end()
    places: dict[str, int] = {}
    for name, start in names:
        places.setdefault(name, start)
    return places
