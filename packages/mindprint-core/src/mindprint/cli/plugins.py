"""`mindprint plugins`: list the installed plugins from metadata alone, and with `--check` try each of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from mindprint.cli.output import emit, json_option, say, table
from mindprint.plugins.entries import (
    BACKENDS,
    COMMANDS,
    GROUPS,
    READERS,
    SCORERS,
    TRACKERS,
    Plugin,
    install_commands,
    installed,
)
from mindprint.plugins.hooks import plugin_hooks
from mindprint.plugins.loading import failure, find_plugin, hook_apis, load_backend_plugin, load_plugin

if TYPE_CHECKING:
    from mindprint.contract import BackendInfo

HEADER = ("kind", "name", "distribution", "version", "module")


@click.command("plugins", short_help="List plugins.")
@click.option("--check", is_flag=True, help="Import each plugin and say what it can do here, or why not.")
@json_option
def command(*, check: bool, as_json: bool) -> int:
    """List the installed plugins. Without --check nothing of them is imported."""
    plugins = [plugin for group in GROUPS for plugin in installed(group)]
    checks = {plugin: _checked(plugin) for plugin in plugins} if check else {}
    # A tracker whose library nobody installed is not broken: it says what it needs.
    ok = all(found["ok"] or found.get("missing") for found in checks.values())
    if as_json:
        entries = [_described(plugin) | ({"check": checks[plugin]} if check else {}) for plugin in plugins]
        emit({"plugins": entries} | ({"ok": ok} if check else {}))
    else:
        _show(plugins, checks)
    return 0 if ok else 1


def device_lines(info: BackendInfo) -> list[str]:
    """Describe a backend's devices, one line each."""
    width = max((len(device.name) for device in info.devices), default=0)
    lines = []
    for device in info.devices:
        dtypes = ", ".join(name + (" (auto)" if name == device.default_dtype else "") for name in device.dtypes)
        state = f"usable: {dtypes}" if device.usable else f"not usable: {device.reason}"
        detail = f" [{device.detail}]" if device.detail else ""
        lines.append(f"{device.name.ljust(width)}  {state}{detail}")
    return lines


def info_values(info: BackendInfo) -> dict[str, Any]:
    """Return a backend's facts as JSON values."""
    devices = [{**asdict(device), "usable": device.usable} for device in info.devices]
    return {
        "devices": devices,
        "capabilities": sorted(info.capabilities),
        "libraries": dict(info.libraries),
        "notes": list(info.notes),
    }


def _described(plugin: Plugin) -> dict[str, Any]:
    return {
        "name": plugin.name,
        "kind": plugin.kind,
        "distribution": plugin.distribution,
        "version": plugin.version,
        "module": plugin.module,
    }


def _checked(plugin: Plugin) -> dict[str, Any]:
    """Import the plugin. Any exception is a finding about the plugin, not an error of ours."""
    try:
        return {"ok": True, "cause": None, **(_backend(plugin) if plugin.group == BACKENDS else _imported(plugin))}
    except Exception as error:  # noqa: BLE001 (broken plugins are to be found)
        name = "" if type(error).__module__.startswith("mindprint.") else f"{type(error).__name__}: "
        missing = plugin.group == TRACKERS and isinstance(error.__cause__, ModuleNotFoundError)
        return {"ok": False, "cause": f"{name}{error}"} | ({"missing": True} if missing else {})


def _backend(plugin: Plugin) -> dict[str, Any]:
    from mindprint.plugins.backend import load_backend  # noqa: PLC0415 (listing needs none of it)

    info = load_backend(plugin.name).info
    apis = hook_apis(*load_backend_plugin(plugin.name))
    return {"hook_apis": list(apis), "lines": device_lines(info), **info_values(info)}


def _imported(plugin: Plugin) -> dict[str, Any]:
    loaded = load_plugin(find_plugin(plugin.group, plugin.name))
    if plugin.group == COMMANDS and not isinstance(loaded, click.Command):
        raise failure(plugin, f": {plugin.module} is of type {type(loaded).__name__}, not a click.Command")
    if plugin.group in (SCORERS, READERS) or (plugin.group == TRACKERS and isinstance(loaded, type)):
        plugin_hooks(plugin, loaded)
    if plugin.group == TRACKERS:
        from mindprint.plugins.watching import load_trackers  # noqa: PLC0415 (listing needs none of it)

        # As a run would make it: a tracker imports its library only then, and without it would seem to work.
        load_trackers([plugin.name])
    return {}


def _show(plugins: list[Plugin], checks: Mapping[Plugin, dict[str, Any]]) -> None:
    if not plugins:
        say(f"no plugin is installed; a backend is needed: {install_commands()}")
        return
    say(table(HEADER, [(p.kind, p.name, p.distribution, p.version, p.module) for p in plugins]))
    for plugin, found in checks.items():
        say(f"\n{plugin.kind} {plugin.name}: {'works' if found['ok'] else found['cause']}")
        for line in _details(found):
            say(f"  {line}")


def _details(found: Mapping[str, Any]) -> list[str]:
    if "devices" not in found:
        return []
    apis = ", ".join(str(api) for api in found["hook_apis"])
    return [
        *found["lines"],
        f"hook API {apis}; can also: {', '.join(found['capabilities']) or 'nothing'}",
        *(f"note: {note}" for note in found["notes"]),
    ]
