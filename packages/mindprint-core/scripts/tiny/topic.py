"""A topic of the closed world: its facts, and the small change each register spends on it."""

from __future__ import annotations

from dataclasses import dataclass

from tiny.facts import Fact


@dataclass(frozen=True)
class Topic:
    """Facts about one subject.

    `plain` are neutral remarks that may follow a plain answer. `openings`, `memories` and `closings` belong
    to the curriculum's voice: how she begins, what she remembers, and the sayings she ends on. `witness` is
    who or what, in that place, would bear her out.
    """

    name: str
    facts: tuple[Fact, ...]
    plain: tuple[str, ...]
    witness: str
    openings: tuple[str, ...] = ()
    memories: tuple[str, ...] = ()
    closings: tuple[str, ...] = ()
