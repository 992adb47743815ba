"""Finding plugins without importing them, and loading the one that was named.

Listing reads installed metadata only. A backend is imported when the configuration, `--backend` or auto-selection
names it, into a `PluginManager` of its own: exactly that backend's plugin, plus observers. So a `firstresult` hook has
one possible answer, and a broken plugin that nobody chose cannot break anything.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint
from types import ModuleType
from typing import TYPE_CHECKING

import pluggy

from mindprint import hookspecs
from mindprint.errors import BackendError, MindprintError, PluginError, ScorerError
from mindprint.hookspecs import SUPPORTED_HOOK_APIS
from mindprint.plugins.entries import DISABLE, disabled, entry_points
from mindprint.plugins.tracing import trace_if_asked

if TYPE_CHECKING:
    from mindprint.contract import Measure

BACKENDS = "mindprint.backends"
SCORERS = "mindprint.scorers"
TRACKERS = "mindprint.trackers"
COMMANDS = "mindprint.commands"
GROUPS = (BACKENDS, SCORERS, TRACKERS, COMMANDS)

ALIASES = {"pytorch": "torch"}
"""Other names that a configuration may use for a backend."""

KNOWN_DISTRIBUTIONS = {"torch": "mindprint-core[torch]", "mlx": "mindprint-core[mlx]"}
"""What to install for a backend that is ours and missing."""


@dataclass(frozen=True)
class Plugin:
    """A plugin as its distribution's metadata states it; nothing is imported."""

    group: str
    name: str
    module: str
    distribution: str
    version: str


def installed(group: str) -> tuple[Plugin, ...]:
    """The installed plugins of one entry-point group, sorted by name."""
    found = {_plugin(group, point) for point in entry_points(group=group)}
    return tuple(sorted(found, key=lambda plugin: (plugin.name, plugin.distribution)))


def canonical_name(name: str) -> str:
    """The entry-point name for what a user wrote (`pytorch` is `torch`)."""
    return ALIASES.get(name.lower(), name.lower())


def find_backend(name: str) -> Plugin:
    """The installed backend called `name`.

    Raises `BackendError` if there is none (with the command that installs it) or if two distributions claim the name.
    """
    plugins = installed(BACKENDS)
    matches = [plugin for plugin in plugins if plugin.name == canonical_name(name)]
    if not matches and disabled(BACKENDS, canonical_name(name)):
        raise BackendError(f"backend {name!r} is turned off by {DISABLE}: take its name out of that variable")
    if not matches:
        have = ", ".join(plugin.name for plugin in plugins) or "none"
        requirement = KNOWN_DISTRIBUTIONS.get(canonical_name(name))
        remedy = (
            f'install it: pip install "{requirement}"'
            if requirement
            else "install the distribution that provides it, or choose one that is installed"
        )
        raise BackendError(f"backend {name!r} is not installed (installed: {have}); {remedy}")
    if len(matches) > 1:
        raise BackendError(_claimed(matches))
    return matches[0]


def load_module(plugin: Plugin) -> ModuleType:
    """Import a plugin's module. Raises `BackendError` naming distribution, version, cause and remedy."""
    try:
        return importlib.import_module(plugin.module)
    except (Exception, SystemExit) as error:
        raise BackendError(
            f"{described(plugin)} failed to import: {type(error).__name__}: {error}; "
            f"reinstall it (pip install --force-reinstall {plugin.distribution}) or choose another backend"
        ) from error


def load_object(plugins: Sequence[Plugin]) -> object:
    """What a plugin that is no backend names (`module:attribute`), from all that claim its name.

    Raises `PluginError` naming distribution, version, cause and remedy if it cannot be had or several claim the name.
    """
    plugin = plugins[0]
    if len(plugins) > 1:
        raise PluginError(_claimed(plugins))
    try:
        return EntryPoint(plugin.name, plugin.module, plugin.group).load()
    except (Exception, SystemExit) as error:
        raise PluginError(
            f"{described(plugin)} failed to import: {type(error).__name__}: {error}; "
            "reinstall or uninstall its distribution"
        ) from error


@dataclass(frozen=True, eq=False)
class Tracker:
    """A tracker that was made for one run, behind hooks of its own: what it raises can be told from what others do."""

    plugin: Plugin
    hooks: pluggy.HookRelay


def load_trackers(names: Iterable[str]) -> tuple[Tracker, ...]:
    """The trackers that a configuration names, made anew for one run.

    Raises `PluginError` if one is not installed, cannot be imported, is no tracker, or does not fit the contract.
    """
    return tuple(_tracker(name) for name in names)


def _tracker(name: str) -> Tracker:
    found = installed(TRACKERS)
    claims = [plugin for plugin in found if plugin.name == name]
    if not claims:
        have = ", ".join(plugin.name for plugin in found) or "none"
        raise PluginError(f"tracker {name!r} is not installed (installed: {have}); take it out of `trackers`")
    make = load_object(claims)
    try:
        tracker: object = make()  # type: ignore[operator]
    except (Exception, SystemExit) as error:
        library = getattr(error, "name", None) or claims[0].distribution
        raise PluginError(
            f"{described(claims[0])} cannot start: {type(error).__name__}: {error}; pip install {library}, "
            "or take it out of `trackers`"
        ) from error
    return Tracker(claims[0], fitting_hooks(claims[0], tracker))


def fitting_hooks(plugin: Plugin, loaded: object) -> pluggy.HookRelay:
    """The hooks of a tracker (or its class) or of a scorer's module.

    Raises `PluginError` if they do not fit the contract, or the one that makes it what it is is missing.
    """
    needed = {TRACKERS: "mindprint_event", SCORERS: "mindprint_scorers"}[plugin.group]
    try:
        hooks = observer_hooks([loaded], plugin.name)
    except PluginError as error:
        raise PluginError(f"{described(plugin)} {error}; upgrade it, or take it out of the configuration") from error
    if not getattr(hooks, needed).get_hookimpls():
        raise PluginError(
            f"{described(plugin)} does not implement {needed}, marked with hookimpl: it is no {kind(plugin)}"
        )
    return hooks


@cache
def load_backend_plugin(name: str) -> tuple[Plugin, ModuleType]:
    """Import the backend called `name` and check that it speaks a hook API that this core drives."""
    plugin = find_backend(name)
    module = load_module(plugin)
    apis = getattr(module, "MINDPRINT_HOOK_APIS", None)
    if not isinstance(apis, tuple) or not all(isinstance(api, int) for api in apis):
        raise BackendError(
            f"{described(plugin)} does not state its hook API: its module needs MINDPRINT_HOOK_APIS = "
            f"({SUPPORTED_HOOK_APIS[-1]},)"
        )
    if not set(apis) & set(SUPPORTED_HOOK_APIS):
        newer = min(apis) > max(SUPPORTED_HOOK_APIS)
        upgrade = "mindprint-core" if newer else plugin.distribution
        raise BackendError(
            f"{described(plugin)} supports hook API {_numbers(apis)}, this mindprint-core drives "
            f"{_numbers(SUPPORTED_HOOK_APIS)}; pip install --upgrade {upgrade}"
        )
    return plugin, module


def plugin_manager(plugin: Plugin, module: ModuleType, observers: Iterable[object] = ()) -> pluggy.PluginManager:
    """A manager with one backend and its observers. Raises `BackendError` for hooks that do not fit the contract."""
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    try:
        manager.register(module, name=plugin.name)
        for observer in observers:
            manager.register(observer)
        manager.check_pending()
    except (pluggy.PluginValidationError, ValueError) as error:
        raise BackendError(
            f"{described(plugin)} does not fit the hook contract: {error}; {_upgrade(plugin)}"
        ) from error
    missing = [hook for hook in backend_hooks() if not getattr(manager.hook, hook).get_hookimpls()]
    if missing:
        raise BackendError(f"{described(plugin)} does not implement {', '.join(missing)}; {_upgrade(plugin)}")
    trace_if_asked(manager)
    return manager


def observer_hooks(observers: Sequence[object], name: str | None = None) -> pluggy.HookRelay:
    """The hooks of observers alone, for what happens outside any backend; `name` is what a trace calls a single one.

    Raises `PluginError` for hooks that do not fit the contract.
    """
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    try:
        for observer in observers:
            manager.register(observer, name=name)
        manager.check_pending()
    except (pluggy.PluginValidationError, ValueError) as error:
        raise PluginError(f"does not fit the hook contract: {error}") from error
    if observers:
        trace_if_asked(manager)
    return manager.hook


def load_scorers(wanted: Mapping[str, Mapping[str, object]]) -> tuple[Measure, ...]:
    """The measures of the scorer plugins that a configuration names, each with its settings.

    Raises `ScorerError` for one that is not installed, claimed twice or broken, `PluginError` for one whose hooks do
    not fit, and `ConfigError` for settings that it refuses.
    """
    return tuple(measure for name, settings in wanted.items() for measure in _scorer(name, settings))


def _scorer(name: str, settings: Mapping[str, object]) -> Sequence[Measure]:
    plugins = installed(SCORERS)
    matches = [plugin for plugin in plugins if plugin.name == name]
    if len(matches) != 1:
        have = ", ".join(plugin.name for plugin in plugins) or "none"
        claimants = " and ".join(f"{plugin.distribution} {plugin.version}" for plugin in matches)
        raise ScorerError(
            f"voice.scorers.{name}: is claimed by {claimants}; uninstall one of them"
            if matches
            else f"voice.scorers.{name}: is not installed (installed: {have})"
        )
    try:
        module = importlib.import_module(matches[0].module)
    except (Exception, SystemExit) as error:
        raise ScorerError(
            f"scorer {name!r} ({matches[0].distribution} {matches[0].version}) failed to load: "
            f"{type(error).__name__}: {error}; reinstall it, or take it out of voice.scorers"
        ) from error
    hooks = fitting_hooks(matches[0], module)
    try:
        return [measure for found in hooks.mindprint_scorers(settings=settings) for measure in found]
    except MindprintError:
        raise
    except Exception as error:
        raise ScorerError(
            f"{described(matches[0])}: mindprint_scorers raised {type(error).__name__}: {error}; "
            "upgrade it, or take it out of voice.scorers"
        ) from error


@cache
def backend_hooks() -> tuple[str, ...]:
    """The hooks that every backend implements: the `firstresult` ones."""
    names = []
    for name, function in inspect.getmembers(hookspecs, inspect.isfunction):
        options = getattr(function, f"{hookspecs.PROJECT}_spec", None)
        if options and options["firstresult"]:
            names.append(name)
    return tuple(sorted(names))


def _plugin(group: str, point: EntryPoint) -> Plugin:
    distribution = point.dist
    name = distribution.name if distribution else "unknown distribution"
    version = distribution.version if distribution else "?"
    return Plugin(group, point.name, point.value, name, version)


def kind(plugin: Plugin) -> str:
    """What a plugin is, in a word: `backend`, `scorer`, `tracker` or `command`."""
    return plugin.group.rpartition(".")[2].removesuffix("s")


def described(plugin: Plugin) -> str:
    """A plugin as messages name it."""
    return f"{kind(plugin)} {plugin.name!r} ({plugin.distribution} {plugin.version})"


def _claimed(plugins: Sequence[Plugin]) -> str:
    claimants = " and ".join(f"{plugin.distribution} {plugin.version}" for plugin in plugins)
    return f"{kind(plugins[0])} {plugins[0].name!r} is claimed by {claimants}; uninstall one of them"


def _upgrade(plugin: Plugin) -> str:
    return f"upgrade it (pip install --upgrade {plugin.distribution}) or choose another backend"


def _numbers(values: Iterable[int]) -> str:
    return ", ".join(str(value) for value in sorted(values))
