"""Write `transformers_facts.json`: the values that transformers uses for absent fields of a config.json.

Run with the transformers version that is to be matched (it may import torch, which the backend must not):

    python packages/mindprint-mlx/scripts/write_transformers_facts.py

For every family that both libraries have, it holds the defaults of its configuration class, other names that the class
accepts for a field, names that its modelling code asks for though the class does not know them, and its rope parameters
where the configuration states none.
"""

from __future__ import annotations

import json
import pkgutil
import re
from dataclasses import MISSING, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import transformers
from transformers import CONFIG_MAPPING

from mindprint_mlx.architectures import MODULES
from mindprint_mlx.families import own_families

TARGET = Path(__file__).parents[1] / "src" / "mindprint_mlx" / "transformers_facts.json"


def families() -> list[str]:
    """Return the model types that mlx-lm has a class for and transformers a configuration."""
    spec = find_spec("mlx_lm")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    folder = Path(spec.submodule_search_locations[0]) / "models"
    modules = {module.name for module in pkgutil.iter_modules([str(folder)])} | set(MODULES) | own_families()
    return sorted(modules & set(CONFIG_MAPPING))


def facts(model_type: str) -> dict[str, Any]:
    """Return one family's entry."""
    kind = CONFIG_MAPPING[model_type]
    defaults = {field.name: default(field) for field in fields(kind)}
    # Of an instance: transformers completes rope parameters when a configuration is made.
    rope = getattr(kind(), "rope_parameters", None)
    return {
        "defaults": {name: value for name, value in sorted(defaults.items()) if is_json(value)},
        "aliases": dict(sorted(kind.attribute_map.items())),
        "optional": sorted(asked_for(kind) - defaults.keys()),
        "rope_theta": getattr(kind, "default_theta", None),
        "rope_parameters": rope,
    }


def asked_for(kind: type) -> set[str]:
    """Return the names in `getattr(config, "name", ...)` in the family's modelling code."""
    # Read as text: importing every family's modelling code would take minutes.
    spec = find_spec(kind.__module__.replace(".configuration_", ".modeling_"))
    if spec is None or spec.origin is None:
        return set()
    return set(re.findall(r'getattr\((?:self\.)?config,\s*"(\w+)"', Path(spec.origin).read_text(encoding="utf-8")))


def default(field: Any) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


def is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True


def main() -> None:
    """Write the file."""
    families_facts = {}
    for model_type in families():
        try:
            families_facts[model_type] = facts(model_type)
        # A configuration that cannot be made without arguments has no defaults to write down.
        except Exception as error:  # noqa: BLE001
            print(f"{model_type}: left out ({type(error).__name__}: {error})")
    content = {"transformers": transformers.__version__, "families": families_facts}
    TARGET.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(f"{len(families_facts)} families, {TARGET.stat().st_size} bytes")


if __name__ == "__main__":
    main()
