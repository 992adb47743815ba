"""One loader for plugins of every kind, with one set of messages.

Listing reads installed metadata only (`entries.py`). A plugin is imported when the configuration, the command line or
auto-selection names it, so a broken plugin that nobody chose cannot break anything. Every failure names the plugin, its
distribution and version, the cause and the remedy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from importlib.metadata import EntryPoint
from typing import TypeVar

from mindprint.errors import BackendError, MindprintError, PluginError, ScorerError
from mindprint.hookspecs import SUPPORTED_HOOK_APIS
from mindprint.plugins.entries import (
    BACKENDS,
    COMMANDS,
    DISABLE,
    OUR_BACKENDS,
    READERS,
    SCORERS,
    TRACKERS,
    Plugin,
    canonical_name,
    described,
    install_commands,
    installed,
    installed_names,
    is_turned_off,
    kind_of,
)

T = TypeVar("T")

ERRORS: dict[str, type[MindprintError]] = {
    BACKENDS: BackendError,
    SCORERS: ScorerError,
    TRACKERS: PluginError,
    COMMANDS: PluginError,
    READERS: PluginError,
}
"""The error of each group."""

ALTERNATIVES = {
    BACKENDS: "choose another backend",
    SCORERS: "take it out of voice.scorers",
    TRACKERS: "take it out of `trackers`",
    COMMANDS: "uninstall its distribution",
    READERS: "turn it off (MINDPRINT_DISABLE_PLUGINS)",
}
"""The remedy for who can do without the plugin."""


def find_plugin(group: str, name: str) -> Plugin:
    """Return the installed plugin of this group and name.

    Args:
        group: One of `entries.GROUPS`.
        name: The entry point's name. For a backend also an alias, in any case of letters.

    Raises:
        BackendError, ScorerError or PluginError: The plugin is not installed, is turned off, or two distributions claim
            its name.
    """
    # Only backends have aliases, and only their names are compared without regard to case: users type them daily.
    wanted = canonical_name(name) if group == BACKENDS else name
    claims = [plugin for plugin in installed(group) if plugin.name == wanted]
    if len(claims) == 1:
        return claims[0]
    subject, error = f"{kind_of(group)} {name!r}", ERRORS[group]
    if claims:
        claimants = " and ".join(plugin.origin for plugin in claims)
        raise error(f"{subject} is claimed by {claimants}; uninstall one of them")
    if is_turned_off(group, wanted):
        raise error(f"{subject} is turned off by {DISABLE}: take its name out of that variable")
    remedy = f"install the distribution that provides it, or {ALTERNATIVES[group]}"
    if group == BACKENDS and wanted in OUR_BACKENDS:
        remedy = f"install it: {install_commands([wanted])}"
    raise error(f"{subject} is not installed (installed: {', '.join(installed_names(group)) or 'none'}); {remedy}")


def load_plugin(plugin: Plugin) -> object:
    """Import a plugin and return the object that its entry point names: a module, a class, a command.

    Raises:
        BackendError, ScorerError or PluginError: The import raised anything but KeyboardInterrupt.
    """
    try:
        # Made from the listed metadata: a second look at the environment could find another distribution.
        return EntryPoint(plugin.name, plugin.module, plugin.group).load()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        reinstall = f"reinstall it (pip install --force-reinstall {plugin.distribution})"
        remedy = f"{reinstall} or {ALTERNATIVES[plugin.group]}"
        raise failure(plugin, f" failed to import: {cause_of(error)}", remedy) from error


def call_plugin(plugin: Plugin, subject: str, call: Callable[[], T], remedy: str | None = None) -> T:
    """Return `call()`, in which code of the plugin runs.

    A library that calls `sys.exit`, or raises another BaseException, must not end the process: with the code 0 that
    would look like success. Only KeyboardInterrupt passes, because it is the user's.

    Args:
        plugin: The plugin that messages name.
        subject: The hook, or the part of the plugin, that is called.
        call: The call.
        remedy: The last part of a message; see `failure`.

    Raises:
        MindprintError: As the plugin raised it, on purpose.
        BackendError, ScorerError or PluginError: The plugin raised anything else.
    """
    try:
        return call()
    except (MindprintError, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise failure(plugin, f": {subject} raised {cause_of(error)}", remedy) from error


def failure(plugin: Plugin, finding: str, remedy: str | None = None) -> MindprintError:
    """Return the error that names the plugin, the cause and the remedy.

    Args:
        plugin: The plugin that failed.
        finding: The rest of a sentence that begins with the plugin's description, its first space or colon included.
        remedy: The last part of the message. By default it is to upgrade the plugin, or to do without it.
    """
    upgrade = f"upgrade it (pip install --upgrade {plugin.distribution}) or {ALTERNATIVES[plugin.group]}"
    return ERRORS[plugin.group](f"{described(plugin)}{finding}; {upgrade if remedy is None else remedy}")


def cause_of(error: BaseException) -> str:
    """Return an exception's kind and message, for the middle of a sentence."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


@cache
def load_backend_plugin(name: str) -> tuple[Plugin, object]:
    """Import a backend, and check that it speaks a hook API that this core drives.

    Returns:
        The plugin and its module.

    Raises:
        BackendError: The backend is missing, broken, or of another hook API.
    """
    # Cached, because auto-selection imports every backend's module for its rank and then loads the chosen one.
    plugin = find_plugin(BACKENDS, name)
    module = load_plugin(plugin)
    hook_apis(plugin, module)
    return plugin, module


def hook_apis(plugin: Plugin, module: object) -> tuple[int, ...]:
    """Return the hook API versions that a backend's module states.

    Raises:
        BackendError: The module states none, or none that this core drives.
    """
    stated = getattr(module, "MINDPRINT_HOOK_APIS", None)
    if not isinstance(stated, tuple) or not stated or not all(isinstance(version, int) for version in stated):
        raise BackendError(
            f"{described(plugin)} does not state its hook API: its module needs MINDPRINT_HOOK_APIS = "
            f"({SUPPORTED_HOOK_APIS[-1]},), not {stated!r}"
        )
    if not set(stated) & set(SUPPORTED_HOOK_APIS):
        # The older of the two must be upgraded: the plugin cannot know a version that came after it, nor can core.
        upgrade = "mindprint-core" if min(stated) > max(SUPPORTED_HOOK_APIS) else plugin.distribution
        raise BackendError(
            f"{described(plugin)} supports hook API {_numbers(stated)}, this mindprint-core drives "
            f"{_numbers(SUPPORTED_HOOK_APIS)}; pip install --upgrade {upgrade}"
        )
    return stated


def auto_rank(plugin: Plugin, module: object) -> float:
    """Return the number by which `auto` orders backends, before it asks any for its devices; 0 if none is stated.

    Raises:
        BackendError: The module states something else than a number.
    """
    rank = getattr(module, "MINDPRINT_AUTO_RANK", 0)
    if not isinstance(rank, int | float) or not math.isfinite(rank):
        raise BackendError(
            f"{described(plugin)} states MINDPRINT_AUTO_RANK = {rank!r}, which is not a finite number; "
            f"upgrade it (pip install --upgrade {plugin.distribution})"
        )
    return rank


def _numbers(values: tuple[int, ...]) -> str:
    return ", ".join(str(value) for value in sorted(values))
