"""An adapter's folder in whichever format it is."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from mindprint.adapter import mlx_lm_format, peft_format
from mindprint.adapter.base_facts import read_base_facts
from mindprint.adapter.module_names import from_file
from mindprint.adapter.peft_settings import read_config
from mindprint.contract import AdapterState
from mindprint.errors import AdapterError, ModelError
from mindprint.models.quantized import dense_weights

Format = Literal["peft", "mlx-lm"]
"""Whose adapters are read."""

TargetFormat = Literal["peft", "mlx-lm", "gguf"]
"""Whose adapters are written: in addition llama.cpp's."""

WEIGHTS_FILES = {"peft": peft_format.WEIGHTS_FILE, "mlx-lm": mlx_lm_format.WEIGHTS_FILE}


def adapter_format(folder: Path) -> Format:
    """Return the tool that wrote an adapter's folder. Raises `AdapterError` where both or neither could have."""
    if not folder.is_dir():
        raise AdapterError(f"{folder}: no such folder" if not folder.exists() else f"{folder}: is not a folder")
    config = folder / peft_format.CONFIG_FILE
    values = read_config(config)
    claims = "peft_type" in values, "lora_parameters" in values or "fine_tune_type" in values
    if claims == (True, False):
        return "peft"
    if claims == (False, True):
        return "mlx-lm"
    what = "both" if all(claims) else "neither"
    raise AdapterError(f"{config}: names {what} of peft_type (PEFT) and lora_parameters (mlx-lm)")


def named_base(folder: Path) -> str:
    """Return the name of the base model that an adapter states, empty if it states none."""
    key = {"peft": "base_model_name_or_path", "mlx-lm": "model"}[adapter_format(folder)]
    return str(read_config(folder / peft_format.CONFIG_FILE).get(key) or "")


def read_any_adapter(folder: Path, base: Path | None = None) -> tuple[AdapterState, str]:
    """Read a LoRA adapter that PEFT, mlx-lm or Mindprint wrote: the adapter, and the base model it names.

    `base` is the folder of the base (its config.json is enough). Without it mlx-lm's adapters are read only where their
    names cannot mean anything else. Raises `AdapterError` naming the file and the fault in it.
    """
    if adapter_format(folder) == "peft":
        return peft_format.read_adapter(folder, None if base is None else _modules(base))
    return mlx_lm_format.read_adapter(folder, None if base is None else read_base_facts(base))


def unmatched_targets(folder: Path, base: Path) -> tuple[str, ...]:
    """Return the names in an adapter's `target_modules` that its base lacks, none for an adapter of mlx-lm's."""
    modules = _modules(base)
    if modules is None or adapter_format(folder) != "peft":
        return ()
    return peft_format.unmatched_targets(folder, modules)


def unmatched_note(folder: Path, base: Path) -> str | None:
    """Return a note on names in an adapter's `target_modules` that its base lacks, None if there are none."""
    names = unmatched_targets(folder, base)
    if not names:
        return None
    return f"target_modules also names {', '.join(sorted(names)[:5])}, which this base does not have: PEFT ignores it"


def _modules(base: Path) -> frozenset[str] | None:
    """Return the base's modules that have a matrix, by transformers' names, None for a folder without weights."""
    try:
        stored = dense_weights(base)
        family = read_base_facts(base).family
        names = (name.removesuffix(".weight") for name, info in stored.items() if len(info.shape) > 1)
        # PEFT matches its targets with the names of modules, and some families have other names in their files.
        return frozenset(from_file(name, family) for name in names)
    except ModelError:
        return None
