"""Entry points of installed distributions, without those that the user has turned off. Imports nothing of them."""

from __future__ import annotations

import os
from importlib import metadata
from importlib.metadata import EntryPoint

DISABLE = "MINDPRINT_DISABLE_PLUGINS"
"""Names of plugins or of distributions, separated by commas, that are as good as not installed; `*` is all of them."""


def entry_points(group: str) -> list[EntryPoint]:
    """The entry points of a group that are not disabled."""
    return [point for point in metadata.entry_points(group=group) if not is_disabled(point)]


def is_disabled(point: EntryPoint) -> bool:
    off = {name.strip().lower() for name in os.environ.get(DISABLE, "").split(",")}
    names = {"*", point.name.lower()} | ({point.dist.name.lower()} if point.dist else set())
    return bool(off & names)


def disabled(group: str, name: str) -> bool:
    """Whether a plugin of this name is installed, and disabled."""
    return any(point.name == name and is_disabled(point) for point in metadata.entry_points(group=group))
