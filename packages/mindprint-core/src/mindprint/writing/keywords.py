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
    names = _names(text)[:NAMES]
    in_names = {part.casefold() for name in names for part in name.split()}
    lower = (match[0] for match in _WORD.finditer(text) if match[0].islower())
    fit = [word for word in dict.fromkeys(lower) if SHORTEST <= len(word) <= LONGEST and word not in in_names]
    # The longest words carry the most of a text's subject in languages that build words from letters.
    longest = sorted(fit, key=len, reverse=True)[: TERMS - len(names)]
    return sorted([*names, *longest], key=text.index)


def _names(text: str) -> list[str]:
    """Return the words with a capital letter within a sentence, neighbours together, in their order."""
    names: list[str] = []
    end = -1
    for match in _WORD.finditer(text):
        before = text[: match.start()].rstrip()
        within = bool(before) and (before[-1].isalnum() or before[-1] in ",;")
        if not within or not match[0][0].isupper() or len(match[0]) < 3:
            continue
        if names and end == match.start() - 1:
            names[-1] += f" {match[0]}"
        else:
            names.append(match[0])
        end = match.end()
    return list(dict.fromkeys(names))
