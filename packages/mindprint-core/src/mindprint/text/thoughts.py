"""Thoughts in a model's answers: found by the markers around them, and left out before an answer is shown or scored.

A thought is not written in anybody's voice, and its markers are not words.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

Markers = tuple[str, str]
"""The texts that open and close a thought."""

COMMON: tuple[Markers, ...] = (("<think>", "</think>"),)
"""Markers that are looked for whatever the template says: models write them that were only trained to."""

NAMED: tuple[Markers, ...] = (
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),
    ("<|channel>thought", "<channel|>"),
)
"""Markers of model families that have no closing form of the opening one. They count where a template has them."""

# A tag whose name speaks of thinking, in any of the brackets that chat templates use.
_TAG = re.compile(r"(<\|?|\[|◁)([\w:-]*(?:think|thought|reason|reflect)[\w:-]*)(\|?>|\]|▷)", re.IGNORECASE)


def thought_markers(template: str) -> tuple[Markers, ...]:
    """Return the markers of thoughts in answers to a chat template: the common ones, and those that it names."""
    named = [pair for pair in NAMED if any(marker in template for marker in pair)]
    tags = [(match[0], f"{match[1]}/{match[2]}{match[3]}") for match in _TAG.finditer(template)]
    return tuple(dict.fromkeys([*COMMON, *named, *(pair for pair in tags if pair[1] in template)]))


def without_thoughts(text: str, markers: Sequence[Markers], *, opened: bool = False) -> str:
    """Return the text without thoughts and their markers. `opened`: it begins within a thought.

    A thought that is not closed reaches to the end: the answer was cut off before it began.
    """
    for start, end in markers:
        head, found, rest = text.partition(end)
        # Closed and never opened: the prompt had opened it.
        if found and start not in head:
            text, opened = rest, False
        text = re.sub(f"{re.escape(start)}.*?(?:{re.escape(end)}|$)", "", text, flags=re.DOTALL)
    return "" if opened else text.strip()


def opens_thought(prompt: str, markers: Sequence[Markers]) -> bool:
    """Return whether a prompt ends with the opening of a thought, which the answer then continues."""
    return prompt.rstrip().endswith(tuple(start for start, _ in markers))
