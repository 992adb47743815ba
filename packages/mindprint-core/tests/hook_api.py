"""The public signatures of the hook API, as values that a test compares with those written down for its version.

python packages/mindprint-core/tests/hook_api.py      # writes down a new version, never an old one
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

from mindprint import contract, events, hookspecs, losses

Written = dict[str, dict[str, Any]]


def pinned(version: int) -> Path:
    return Path(__file__).with_name(f"hook_api_{version}.json")


def signatures() -> Written:
    """Every hook with its signature, and every dataclass that crosses with its fields in order."""
    hooks = {
        name: str(inspect.signature(function))
        for name, function in inspect.getmembers(hookspecs, inspect.isfunction)
        if hasattr(function, f"{hookspecs.PROJECT}_spec")
    }
    types = {
        f"{module.__name__}.{name}": [_field(field) for field in dataclasses.fields(kind)]
        for module in (contract, events, losses)
        for name, kind in inspect.getmembers(module, inspect.isclass)
        if dataclasses.is_dataclass(kind) and kind.__module__ == module.__name__
    }
    return {"hooks": hooks, "types": types}


def _field(field: dataclasses.Field[Any]) -> str:
    optional = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
    return f"{field.name}: {field.type}" + (" (optional)" if optional else "")


def breaking_changes(before: Written, now: Written, required: set[str]) -> list[str]:
    """What changed that a plugin of this version could notice. `required` are the hooks every backend implements."""
    found = [f"{name}{before['hooks'][name]} is now {name}{now['hooks'].get(name, ' (gone)')}"
             for name in before["hooks"] if now["hooks"].get(name) != before["hooks"][name]]  # fmt: skip
    found += [f"{name} is new and every backend must have it" for name in required - set(before["hooks"])]
    for name, fields in before["types"].items():
        present = now["types"].get(name, [])
        if present[: len(fields)] != fields:
            found.append(f"{name} was {fields}, is {present}")
        found += [f"{name}.{field} is new and has no default"
                  for field in present[len(fields) :] if "(optional)" not in field]  # fmt: skip
    return found


if __name__ == "__main__":
    target = pinned(hookspecs.HOOK_API)
    if target.exists():
        raise SystemExit(f"{target.name} stands: raise hookspecs.HOOK_API to write down another version")
    target.write_text(json.dumps(signatures(), indent=1) + "\n", encoding="utf-8")
