"""Settings of a base that mlx-lm does not read: `rope_parameters`, as transformers 5 writes rotary embeddings.

mlx-lm reads the fields that its module for a family declares, and most modules declare `rope_theta` and `rope_scaling`
only. A base without these keys is loaded without a word and computed with the module's default.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mindprint.models.folder import model_config

_NAMES: Mapping[str, Mapping[str, str]] = {
    "gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
}
"""Names of mlx-lm's fields by family, where they are not transformers'."""

_BY_LAYER = {"full_attention": "rope_theta", "sliding_attention": "rope_local_base_freq"}
"""mlx-lm's fields for the base of each type of layer (Gemma 3)."""


@dataclass(frozen=True)
class _Module:
    """The fields that mlx-lm's module for a family declares, with their defaults, and whether it reads the new form."""

    fields: Mapping[str, Any]
    reads_parameters: bool


def missing_keys(base: Path) -> dict[str, Any]:
    """Return the keys, with their values, that mlx-lm needs in a base's config.json to compute what transformers does.

    The installed mlx-lm decides which fields are read. Without one, its release 0.32.2 is assumed.
    """
    config = model_config(base)
    return _missing(config)


def corrected_config(base: Path) -> dict[str, Any]:
    """Return a base's config.json with the keys that mlx-lm needs next to those that transformers reads."""
    config = model_config(base)
    return {**config, **_missing(config)}


def mlx_lm_note(keys: Mapping[str, Any]) -> str:
    """Return a note that names the keys to add."""
    named = ", ".join(f'"{name}": {json.dumps(value)}' for name, value in keys.items())
    return (
        f"{_release()} does not read rope_parameters and would compute another model without a word: add {named} to "
        "config.json"
    )


def _missing(config: Mapping[str, Any]) -> dict[str, Any]:
    model_type, rope = str(config["model_type"]), config.get("rope_parameters")
    module = _module(model_type)
    if not isinstance(rope, Mapping) or (module is not None and module.reads_parameters):
        return {}
    needed = _wanted(model_type, rope)
    return {
        name: value
        for name, value in needed.items()
        # A field that is left out has the module's default, which may be the right one.
        if config.get(name) != value and (name in config or module is None or module.fields.get(name) != value)
    }


def _wanted(model_type: str, rope: Mapping[str, Any]) -> dict[str, Any]:
    """Return rope parameters under mlx-lm's names."""
    names = _NAMES.get(model_type, {})
    if any(isinstance(value, Mapping) for value in rope.values()):
        wanted = {
            field: rope[kind]["rope_theta"]
            for kind, field in _BY_LAYER.items()
            if isinstance(rope.get(kind), Mapping) and "rope_theta" in rope[kind]
        }
        scaled = rope.get("full_attention")
        return {**wanted, **(_scaling(scaled) if isinstance(scaled, Mapping) else {})}
    wanted = {
        names.get(name, name): rope[name]
        for name in ("rope_theta", "partial_rotary_factor")
        if rope.get(name) is not None
    }
    return {**wanted, **_scaling(rope)}


def _scaling(rope: Mapping[str, Any]) -> dict[str, Any]:
    if rope.get("rope_type", "default") == "default":
        return {}
    apart = ("rope_theta", "partial_rotary_factor")
    return {"rope_scaling": {name: value for name, value in rope.items() if name not in apart}}


@cache
def _module(model_type: str) -> _Module | None:
    """Read mlx-lm's module for a family as text: importing it would need MLX. None if it is not installed."""
    package = find_spec("mlx_lm")
    if package is None or not package.submodule_search_locations:
        return None
    folder = Path(next(iter(package.submodule_search_locations)))
    file = folder / "models" / f"{_renamed(folder, model_type)}.py"
    if not file.is_file():
        return None
    source = file.read_text(encoding="utf-8")
    fields: dict[str, Any] = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef) and node.name == "ModelArgs":
            for entry in node.body:
                if isinstance(entry, ast.AnnAssign) and isinstance(entry.target, ast.Name):
                    fields[entry.target.id] = _literal(entry.value)
    return _Module(fields, "rope_parameters" in fields)


def _renamed(folder: Path, model_type: str) -> str:
    """Return the module that mlx-lm uses for a family: Mistral is computed by llama.py, for one."""
    for node in ast.walk(ast.parse((folder / "utils.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Assign) and any(
            isinstance(target, ast.Name) and target.id == "MODEL_REMAPPING" for target in node.targets
        ):
            return str(dict(_literal(node.value) or {}).get(model_type, model_type))
    return model_type


def _literal(node: ast.expr | None) -> Any:
    try:
        return None if node is None else ast.literal_eval(node)
    except ValueError:
        return None


def _release() -> str:
    try:
        return f"mlx-lm {version('mlx-lm')}"
    except PackageNotFoundError:
        return "mlx-lm (0.32.2 was compared)"
