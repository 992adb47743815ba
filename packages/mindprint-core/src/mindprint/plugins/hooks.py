"""Register plugins with pluggy, and check that their hooks fit the contract.

Each backend in use has a plugin manager with exactly that backend's plugin and the observers. So a hook of which the
first result counts has one possible answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pluggy

from mindprint import hookspecs
from mindprint.errors import PluginError
from mindprint.plugins.entries import READERS, SCORERS, TRACKERS, Plugin
from mindprint.plugins.loading import failure
from mindprint.plugins.tracing import trace_if_asked

NEEDED_HOOKS = {TRACKERS: "mindprint_event", SCORERS: "mindprint_scorers", READERS: "mindprint_read_documents"}
"""The hook that makes a plugin of each group a plugin of that kind. A backend needs `hookspecs.REQUIRED_HOOKS`."""

MISFIT = "does not fit the hook contract: "


def backend_hooks(plugin: Plugin, module: object, observers: Iterable[object] = ()) -> pluggy.HookRelay:
    """Return the hooks of one backend and of the observers of its calls.

    Raises:
        BackendError: A hook is missing, misspelt, or takes arguments that the contract does not know.
    """
    manager = _new_manager()
    try:
        manager.register(module, name=plugin.name)
        for observer in observers:
            manager.register(observer)
        # pluggy ignores a function that is marked and that it does not know: a misspelt hook would never be called.
        manager.check_pending()
    except (pluggy.PluginValidationError, ValueError) as error:
        raise failure(plugin, f" {MISFIT}{error}") from error
    # pluggy takes a hook without an implementation for a call that nobody answers, and returns None.
    missing = missing_hooks(manager.hook)
    # Whether a backend trains is known only when it has been asked, which `Backend` does next.
    if set(missing) - set(hookspecs.TRAINING_HOOKS):
        raise failure(plugin, f" does not implement {', '.join(missing)}")
    trace_if_asked(manager)
    return manager.hook


def missing_hooks(hooks: pluggy.HookRelay) -> tuple[str, ...]:
    """Return the required hooks that a backend does not implement."""
    return tuple(hook for hook in hookspecs.REQUIRED_HOOKS if not getattr(hooks, hook).get_hookimpls())


def plugin_hooks(plugin: Plugin, loaded: object) -> pluggy.HookRelay:
    """Return the hooks of a tracker, of a tracker's class, or of the module of a scorer or a reader.

    Raises:
        PluginError: A hook does not fit the contract, or the one that makes it a plugin of its kind is missing.
            `ScorerError`, a kind of it, for a scorer.
    """
    needed = NEEDED_HOOKS[plugin.group]
    try:
        hooks = observer_hooks([loaded], plugin.name)
    except PluginError as error:
        raise failure(plugin, f" {error}") from error
    if not getattr(hooks, needed).get_hookimpls():
        raise failure(plugin, f" does not implement {needed}, marked with hookimpl: it is not a {plugin.kind}")
    return hooks


def observer_hooks(observers: Sequence[object], name: str | None = None) -> pluggy.HookRelay:
    """Return the hooks of observers alone, for events outside any backend.

    Args:
        observers: Objects or modules with hooks.
        name: The name of a single observer in a trace.

    Raises:
        PluginError: A hook does not fit the contract.
    """
    manager = _new_manager()
    try:
        for observer in observers:
            manager.register(observer, name=name)
        manager.check_pending()
    except (pluggy.PluginValidationError, ValueError) as error:
        raise PluginError(f"{MISFIT}{error}") from error
    if observers:
        trace_if_asked(manager)
    return manager.hook


def _new_manager() -> pluggy.PluginManager:
    # A new manager each time: in a shared one, hooks of two backends would answer the same call.
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    return manager
