"""Checks of texts that the base model wrote: as a prompt, and as an answer that is not the person's."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mindprint.text.ngrams import is_loop
from mindprint.text.words import words

PROMPT_WORDS = 3, 60
COPIED = 8
"""Words that prompt and passage may not have in common in a row: the model would learn to recite its prompt."""

LENGTHS = 0.5, 2.0
"""Words of a rejected answer, divided by those of the passage."""

ECHOED = 7
"""Words that a prompt may not have in common in a row with the template that asked for it."""

LABEL_ECHOED, REWRITING_ECHOED = 3, 5
"""The same for the words before a colon at the beginning of a rewriting, and for the rest of it: its template is short,
and a person's text hardly has five of its words in a row."""

SAME_EXAMPLE = 0.6
"""Share of the words of a prompt and of an example, each, from which on one is the other with some words replaced."""

ALIKE = 0.5
"""Share of a passage's 4-grams in the answer to its prompt, from which on both say the same."""

PLAIN_ALIKE = 0.3
"""The same for a passage that the model was asked to rewrite, which shares its names and facts in any case."""

_LABEL = re.compile(
    r"^(?:(?:the )?(?:user(?:'s)? )?(?:request|question|prompt|topic|title|instruction|answer)\b[^:\n]{0,40}:"
    r"|[-*•]|\d+[.)])\s*",
    re.IGNORECASE,
)
# A prompt that speaks of the text it belongs to was not written as one. Small models describe their task.
_SPEAKS_OF_TEXT = re.compile(
    r"\b(?:the|this|that|following|above|given|your) "
    r"(?:text|passage|excerpt|story|writing|user|request|instructions?|question)\b",
    re.IGNORECASE,
)
# Summaries announce their text. The rest of the sentence is a topic.
_SUMMARY = re.compile(
    r"^(?:the|this) (?:text|passage|excerpt|story|narrative) "
    r"(?:is about|describes|discusses|tells (?:the story )?of|is) ",
    re.IGNORECASE,
)
# Small models answer the text, or continue it, where they should ask for it. A request does not begin like this.
_STATES = re.compile(
    r"^(?:(?:I|you|we|he|she|it|they)(?:['’]\w+| (?:am|are|is|was|were|have|has|had|will|would|can|could|do|did)\b)"
    r"|(?:here|there) (?:is|are|was|were)\b|(?:sure|certainly|of course|thank you|sorry|hello|hi|dear)\b|as an? AI\b)",
    re.IGNORECASE,
)
_QUOTES = "\"'“”‘’«»„ *_`"


def clean_prompt(reply: str) -> str:
    """Return the first sentence of a reply without a label (`Request:`) and without quotation marks around it."""
    lines = [line.strip() for line in reply.strip().splitlines() if line.strip()]
    # Small models announce their answer on a line by itself.
    while len(lines) > 1 and lines[0].endswith(":"):
        lines = lines[1:]
    text = _LABEL.sub("", lines[0]) if lines else ""
    return first_sentence(text.strip(_QUOTES))


def clean_topic(reply: str) -> str:
    """Return the topic that a reply names, or the rest of the sentence that summarises the text."""
    return _SUMMARY.sub("", clean_prompt(reply))


def is_prompt(prompt: str, passage: str, template: str = "") -> bool:
    """Return whether a text is of a prompt's length, copies neither passage nor template, asks, and is not a loop."""
    asked = words(prompt)
    if not PROMPT_WORDS[0] <= len(asked) <= PROMPT_WORDS[1] or _SPEAKS_OF_TEXT.search(prompt) or _STATES.match(prompt):
        return False
    echoed = longest_common(asked, words(template)) >= min(ECHOED, len(asked)) or _is_example(asked, template)
    return not echoed and longest_common(asked, words(passage)) < COPIED and not is_loop(asked)


def _is_example(asked: Sequence[str], template: str) -> bool:
    own = set(asked)
    for line in template.splitlines():
        example = set(words(line))
        if len(own & example) >= SAME_EXAMPLE * max(len(own), len(example)):
            return True
    return False


def unfit(answer: str, passage: str, alike: float = ALIKE) -> str | None:
    """Return why an answer cannot be the rejected one, None if it can. `alike` is the share of common 4-grams."""
    said, own = words(answer), words(passage)
    if not LENGTHS[0] * len(own) <= len(said) <= LENGTHS[1] * len(own):
        return "of another length than the passage"
    if is_loop(said):
        return "a loop"
    grams = set(_grams(own))
    if grams and len(grams & set(_grams(said))) > alike * len(grams):
        return "too like the passage"
    return None


def longest_common(first: Sequence[str], second: Sequence[str]) -> int:
    """Return the length of the longest run of words that both texts have."""
    # One row of the table of dynamic programming: `row[j]` is the run that ends at word j of the second text.
    longest, row = 0, [0] * (len(second) + 1)
    for word in first:
        row = [0, *(row[place] + 1 if other == word else 0 for place, other in enumerate(second))]
        longest = max(longest, *row)
    return longest


def up_to_sentence(text: str) -> str:
    """Return a text up to the end of its last whole sentence, or all of it if it has none."""
    ends = list(re.finditer(r"[.!?…][\"'”’»)]*(?=\s|$)", text))
    return text[: ends[-1].end()] if ends else text


def without_label(reply: str, template: str) -> str:
    """Return a reply without a beginning such as `Here is the text in plain English:`, which repeats the template."""
    label, colon, rest = reply.partition(":")
    repeats = longest_common(words(label), words(template)) >= LABEL_ECHOED
    return rest.lstrip() if colon and rest.strip() and repeats else reply


def unfit_rewriting(plain: str, passage: str, template: str) -> str | None:
    """Return why a text cannot be the plain form of a passage, None if it can."""
    if longest_common(words(plain), words(template)) >= REWRITING_ECHOED:
        return "an echo of the question"
    return unfit(plain, passage, PLAIN_ALIKE)


def first_sentence(text: str) -> str:
    """Return the first sentence of a text, all of it if no sentence ends in it."""
    # Three small letters before it: `Mr.` and `St.` end no sentence.
    end = re.search(r"(?<=[a-zß-ÿ]{3})[.!?…][\"'”’»)]*(?=\s+[A-ZÀ-Þ\"“])", text)
    return text[: end.end()] if end else text


def _grams(said: Sequence[str]) -> list[tuple[str, ...]]:
    return [tuple(said[place : place + 4]) for place in range(len(said) - 3)]
