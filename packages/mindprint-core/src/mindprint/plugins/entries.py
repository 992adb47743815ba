"""Installed plugins as their metadata states them, without those that the user has turned off. Imports none of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.metadata import EntryPoint

BACKENDS = "mindprint.backends"
SCORERS = "mindprint.scorers"
TRACKERS = "mindprint.trackers"
COMMANDS = "mindprint.commands"
READERS = "mindprint.readers"
GROUPS = (BACKENDS, SCORERS, TRACKERS, COMMANDS, READERS)
"""The entry-point groups. A plugin's group says which kind of plugin it is, and so when it is imported."""

OUR_BACKENDS = {"torch": "mindprint-core[torch]", "mlx": "mindprint-core[mlx]", "llamacpp": "mindprint-core[llamacpp]"}
"""The requirement that installs each backend of this project. Messages quote it, and no decision depends on it."""

ALIASES = {"pytorch": "torch"}
"""Other names that a configuration may use for a backend."""

DISABLE = "MINDPRINT_DISABLE_PLUGINS"
"""Environment variable with names of plugins or distributions, separated by commas, to ignore. `*` ignores all."""


@dataclass(frozen=True)
class Plugin:
    """A plugin as its distribution's metadata states it.

    `module` is the entry point's value: `package.module`, or `package.module:attribute`.
    """

    group: str
    name: str
    module: str
    distribution: str
    version: str

    @property
    def kind(self) -> str:
        """`backend`, `scorer`, `tracker`, `command` or `reader`."""
        return kind_of(self.group)

    @property
    def origin(self) -> str:
        """Distribution and version, as messages name them."""
        return f"{self.distribution} {self.version}"


def installed(group: str) -> tuple[Plugin, ...]:
    """Return the plugins of one entry-point group, sorted by name. A name that two distributions claim is there twice.

    Args:
        group: One of `GROUPS`.
    """
    # A distribution that lies twice on `sys.path` states each of its entry points twice: hence the set.
    plugins = {_read_plugin(group, point) for point in metadata.entry_points(group=group) if not is_disabled(point)}
    return tuple(sorted(plugins, key=lambda plugin: (plugin.name, plugin.distribution)))


def installed_names(group: str) -> tuple[str, ...]:
    """Return each name of a group once, sorted."""
    return tuple(sorted({plugin.name for plugin in installed(group)}))


def is_turned_off(group: str, name: str) -> bool:
    """Return whether a plugin of this name is installed and turned off by `DISABLE`."""
    return any(point.name == name and is_disabled(point) for point in metadata.entry_points(group=group))


def is_disabled(point: EntryPoint) -> bool:
    """Return whether `DISABLE` names the entry point or its distribution."""
    # Both sides in lower case, because distributions are written either way.
    ignored = {name.strip().lower() for name in os.environ.get(DISABLE, "").split(",")}
    names = {"*", point.name.lower()} | ({point.dist.name.lower()} if point.dist else set())
    return bool(ignored & names)


def kind_of(group: str) -> str:
    """Return the word for a plugin of this group: `backend`, `scorer`, `tracker`, `command` or `reader`."""
    return group.rpartition(".")[2].removesuffix("s")


def described(plugin: Plugin) -> str:
    """Return a plugin as messages name it: kind, name, distribution and version."""
    return f"{plugin.kind} {plugin.name!r} ({plugin.origin})"


def canonical_name(name: str) -> str:
    """Return the entry-point name for a backend as a user wrote it (`PyTorch` is `torch`)."""
    return ALIASES.get(name.lower(), name.lower())


def install_commands(names: Sequence[str] = ("torch", "mlx")) -> str:
    """Return the commands that install backends of this project, those that train unless others are named."""
    return " or ".join(f'pip install "{OUR_BACKENDS[name]}"' for name in names)


def _read_plugin(group: str, point: EntryPoint) -> Plugin:
    distribution = point.dist
    # importlib.metadata has no distribution for an entry point that was made by hand.
    name = distribution.name if distribution else "unknown distribution"
    version = distribution.version if distribution else "?"
    return Plugin(group, point.name, point.value, name, version)
