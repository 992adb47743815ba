"""Choose a backend for `auto`, by the answers of the backends. No backend or device is named here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mindprint.errors import BackendError, MindprintError
from mindprint.plugins.backend import Backend, load_backend
from mindprint.plugins.entries import BACKENDS, install_commands, installed_names
from mindprint.plugins.loading import auto_rank, load_backend_plugin


@dataclass(frozen=True)
class Choice:
    """The backend that `auto` chose, and the reason in words for the user.

    `left_out` holds the reason of each backend that could not be used; `reason` quotes them.
    """

    name: str
    reason: str
    left_out: tuple[str, ...] = ()


def choose_backend(load: Callable[[str], Backend] = load_backend, rank: Callable[[str], float] | None = None) -> Choice:
    """Choose the first backend with an accelerator that `auto` may take, else the first that works at all.

    Backends are asked in falling order of their rank, then by name. A backend is asked for its devices, for which it
    imports its framework, only if none before it has an accelerator. A backend that is broken is left out, whatever it
    raises or states.

    Args:
        load: Loads a backend by name.
        rank: Returns a backend's rank by name. By default its module is imported and states it.

    Raises:
        BackendError: No backend is installed, or none of them works here.
    """
    names = installed_names(BACKENDS)
    if not names:
        raise BackendError(f"no backend is installed; {install_commands()}")
    if len(names) == 1:
        return Choice(names[0], "the only backend installed")
    left_out: list[str] = []
    # Two passes: modules are cheap to import, frameworks are not. So every module states its rank first, and then only
    # as many frameworks are imported as it takes to find an accelerator.
    ranked: list[tuple[float, str]] = []
    for name in names:
        try:
            # Negative, so that one ascending sort gives the highest rank first and equal ranks by name.
            ranked.append((-(rank or stated_rank)(name), name))
        except MindprintError as error:
            left_out.append(str(error))
    working: list[str] = []
    for _, name in sorted(ranked):
        try:
            device = load(name).device("auto")
        except MindprintError as error:
            left_out.append(str(error))
            continue
        if device.accelerator:
            return _explained(name, f"it can use {device.detail or device.name} here", left_out)
        working.append(name)
    if not working:
        raise BackendError("no installed backend works here: " + "; ".join(left_out))
    return _explained(working[0], "no accelerator is usable here, and it comes first of those that work", left_out)


def stated_rank(name: str) -> float:
    """Return the rank that a backend's module states. Imports the module, which imports no framework.

    Raises:
        BackendError: The backend cannot be loaded, or states something else than a number.
    """
    return auto_rank(*load_backend_plugin(name))


def _explained(name: str, reason: str, left_out: list[str]) -> Choice:
    excluded = f" (left out: {'; '.join(left_out)})" if left_out else ""
    return Choice(name, f"{reason}{excluded}", tuple(left_out))
