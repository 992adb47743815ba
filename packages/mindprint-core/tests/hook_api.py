"""Everything that plugins import from core, as values that a test compares with those written down for its version.

    python packages/mindprint-core/tests/hook_api.py

writes down a new version, or the additions to the present one. It never changes an entry that is written down.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args, get_origin

import numpy as np

from mindprint import contract, errors, events, hookspecs, layouts, losses
from mindprint.plugins import entries

Written = dict[str, Any]

MODULES = (contract, events, losses, layouts, errors)
"""The modules whose public names are all pinned."""

PAYLOADS = {
    "mindprint.runs.records": (
        "Decision",
        "DecisionKind",
        "EvaluationRecord",
        "Figures",
        "Forgetting",
        "Interval",
        "Outcome",
    ),
    "mindprint.config": ("Level",),
}
"""The types that events carry, in modules that are otherwise core's own."""

CLI = {"mindprint.cli.output": ("emit", "json_option", "say")}
"""The functions that commands of other distributions use."""

CORES_OWN = ("PairwiseLoss", "PAIRWISE_LOSSES", "default_sft_weight", "takes_label_smoothing", "first_line")
"""Names of those modules that plugins have no use for. They may change."""

ATTRIBUTES = ("MINDPRINT_HOOK_APIS", "MINDPRINT_AUTO_RANK")
"""The attributes that core reads of a backend's module."""


def pinned(version: int) -> Path:
    """Return the file of a version."""
    return Path(__file__).with_name(f"hook_api_{version}.json")


def signatures() -> Written:
    """Return the public API: hooks, types with their fields, methods, functions, errors, choices and constants."""
    hooks = {
        name: str(inspect.signature(function))
        for name, function in inspect.getmembers(hookspecs, inspect.isfunction)
        if hasattr(function, f"{hookspecs.PROJECT}_spec")
    }
    constants = {
        "mindprint.hookspecs.PROJECT": hookspecs.PROJECT,
        "entry-point groups": list(entries.GROUPS),
        "attributes of a backend's module": list(ATTRIBUTES),
        "capabilities": sorted(contract.CAPABILITIES),
    }
    api: Written = {"hooks": hooks, "required": list(hookspecs.REQUIRED_HOOKS), "constants": constants}
    return api | public_names([*_public(), (hookspecs, "hookimpl")])


def public_names(names: list[tuple[ModuleType, str]]) -> Written:
    """Return the signatures of these names, by kind."""
    api: Written = {kind: {} for kind in ("types", "methods", "functions", "errors", "choices", "aliases")}
    api |= {"protocols": [], "values": []}
    for module, name in names:
        value, full = getattr(module, name), f"{module.__name__}.{name}"
        if inspect.isclass(value) and issubclass(value, BaseException):
            api["errors"][full] = sorted(base.__name__ for base in value.__mro__[1:-1])
        elif inspect.isclass(value):
            if dataclasses.is_dataclass(value):
                api["types"][full] = [_field(field) for field in dataclasses.fields(value)]
            elif hasattr(value, "_fields"):
                api["types"][full] = [f"{field}: {value.__annotations__[field]}" for field in value._fields]
            if getattr(value, "_is_protocol", False):
                api["protocols"].append(full)
            api["methods"] |= {f"{full}.{method}": text for method, text in _methods(value)}
        elif inspect.isfunction(value):
            api["functions"][full] = str(inspect.signature(value))
        elif get_origin(value) is Literal:
            api["choices"][full] = list(get_args(value))
        elif get_origin(value) is not None:
            api["aliases"][full] = f"array of {np.dtype(get_args(get_args(value)[1])[0]).name}"
        else:
            api["values"].append(full)
    return api


def _public() -> Iterator[tuple[ModuleType, str]]:
    for module in MODULES:
        yield from ((module, name) for name in _own_names(module) if name not in CORES_OWN)
    for names in (PAYLOADS, CLI):
        for module_name, chosen in names.items():
            yield from ((importlib.import_module(module_name), name) for name in chosen)


def _own_names(module: ModuleType) -> Iterator[str]:
    """Yield the public names that a module defines or assigns itself."""
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names = [node.name]
        else:
            targets = getattr(node, "targets", [getattr(node, "target", None)])
            names = [
                name.id for target in targets for name in ast.walk(target or ast.Pass()) if isinstance(name, ast.Name)
            ]
        yield from (name for name in names if not name.startswith("_"))


def _methods(kind: type) -> Iterator[tuple[str, str]]:
    """Yield the public methods and properties that the class itself defines."""
    for name, value in vars(kind).items():
        if name.startswith("_") and name != "__call__":
            continue
        if isinstance(value, property):
            yield name, f"property -> {inspect.signature(value.fget).return_annotation}"  # type: ignore[arg-type]
        elif inspect.isfunction(value):
            yield name, str(inspect.signature(value))


def _field(field: dataclasses.Field[Any]) -> str:
    optional = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
    return f"{field.name}: {field.type}" + (" (optional)" if optional else "")


def breaking_changes(before: Written, now: Written) -> list[str]:
    """Return the changes that a plugin of this version could notice. Additions are none."""
    changes = [f"{name} is new and every backend must have it"
               for name in now["required"] if name not in before["required"]]  # fmt: skip
    changes += [f"{name} is no longer required" for name in before["required"] if name not in now["required"]]
    for kind in ("hooks", "methods", "functions"):
        changes += [f"{name}{text} is now {name}{now[kind].get(name, ' (gone)')}"
                    for name, text in before[kind].items()
                    if not _is_compatible(text, now[kind].get(name, ""), hook=kind == "hooks")]  # fmt: skip
    for name in set(now["methods"]) - set(before["methods"]):
        if name.rpartition(".")[0] in before["protocols"]:  # plugins implement these: none has the new method
            changes.append(f"{name} is new and every implementation must have it")
    for kind in ("errors", "choices", "aliases", "constants"):
        for name, values in before[kind].items():
            present = now[kind].get(name, [])
            missing = values != present if isinstance(values, str) else set(values) - set(present)
            if missing:
                changes.append(f"{name} was {values}, is {present}")
    changes += [f"{name} is gone" for name in before["values"] if name not in now["values"]]
    for name, fields in before["types"].items():
        present = now["types"].get(name, [])
        if present[: len(fields)] != fields:
            changes.append(f"{name} was {fields}, is {present}")
        changes += [f"{name}.{field} is new and has no default"
                    for field in present[len(fields) :] if "(optional)" not in field]  # fmt: skip
    return changes


def _is_compatible(before: str, now: str, *, hook: bool) -> bool:
    """Return whether callers of a function may stay as they are: it is the same, or has further optional arguments.

    A hook takes no further argument: pluggy passes those that an implementation names, and an older core passes none.
    """
    if before == now or hook or not now:
        return before == now
    (given, result), (present, result_now) = (text.rsplit(")", 1) for text in (before, now))
    added = present.removeprefix(given).removeprefix(", ").removeprefix("*, ")
    return (
        present.startswith(given) and result == result_now and all(" = " in part for part in added.split(", ") if part)
    )


def write_down(target: Path, present: Written) -> None:
    """Write a version, or what was added to it. Exit with the list of changes that its plugins could notice."""
    if target.exists():
        found = breaking_changes(json.loads(target.read_text(encoding="utf-8")), present)
        if found:
            lines = "\n  ".join(found)
            raise SystemExit(f"{target.name} is written down: raise hookspecs.HOOK_API for these changes:\n  {lines}")
    target.write_text(json.dumps(present, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_down(pinned(hookspecs.HOOK_API), signatures())
