"""The one adapter file: PEFT's folder of `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from mindprint.contract import AdapterState, LoraConfig, LoraFactors
from mindprint.errors import AdapterError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_PREFIX = "base_model.model."


def tensor_names(site: str) -> tuple[str, str]:
    """The names of a site's A `[r, in]` and B `[out, r]` in PEFT's file."""
    return f"{_PREFIX}{site}.lora_A.weight", f"{_PREFIX}{site}.lora_B.weight"


def to_tensors(factors: Mapping[str, LoraFactors], prefix: str = "") -> dict[str, np.ndarray]:
    """Flatten factors by site into named tensors, each name with `prefix` before PEFT's."""
    flat = {}
    for site, pair in factors.items():
        for name, values in zip(tensor_names(site), pair, strict=True):
            flat[prefix + name] = np.ascontiguousarray(values, np.float32)
    return flat


def from_tensors(flat: Mapping[str, np.ndarray], sites: tuple[str, ...], prefix: str = "") -> dict[str, LoraFactors]:
    """The inverse of `to_tensors` for the given sites. Raises `AdapterError` naming a tensor that is not there."""
    factors = {}
    for site in sites:
        missing = [name for name in tensor_names(site) if prefix + name not in flat]
        if missing:
            raise AdapterError(f"tensor {prefix + missing[0]} is missing")
        factors[site] = LoraFactors(*(flat[prefix + name] for name in tensor_names(site)))
    return factors


def write_adapter(folder: Path, adapter: AdapterState, base_model: str, revision: str | None = None) -> None:
    """Write the two files into an existing folder."""
    (folder / WEIGHTS_FILE).write_bytes(save(to_tensors(adapter.tensors), metadata={"format": "pt"}))
    config = peft_config(adapter.config, base_model, revision)
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def peft_config(config: LoraConfig, base_model: str, revision: str | None = None) -> dict[str, Any]:
    """`adapter_config.json` as PEFT reads it; every target module is written out."""
    alpha = int(config.alpha) if float(config.alpha).is_integer() else config.alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "revision": revision,
        "r": config.r,
        "lora_alpha": alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.use_rslora,
        "target_modules": list(config.target_modules),
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": dict(config.alpha_pattern),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
    }


def read_adapter(folder: Path) -> tuple[AdapterState, str]:
    """Read a folder that `write_adapter` wrote: the adapter, and the base model it names.

    Raises `AdapterError` naming the file and what is wrong with it.
    """
    values = _read_config(folder / CONFIG_FILE)
    config = LoraConfig(
        r=values["r"],
        alpha=float(values["lora_alpha"]),
        target_modules=tuple(values["target_modules"]),
        dropout=float(values["lora_dropout"]),
        use_rslora=bool(values["use_rslora"]),
        rank_pattern=values["rank_pattern"],
        alpha_pattern=values["alpha_pattern"],
    )
    weights = folder / WEIGHTS_FILE
    try:
        tensors = from_tensors(load_file(weights), config.target_modules)
    except FileNotFoundError:
        raise AdapterError(f"{weights}: no such file; an adapter is a folder with it and {CONFIG_FILE}") from None
    except (SafetensorError, AdapterError, OSError) as error:
        raise AdapterError(f"{weights}: {error}") from error
    return AdapterState(config, tensors), str(values["base_model_name_or_path"])


def adapter_digest(adapter: AdapterState) -> str:
    """Digest of an adapter's values and of what they are multiplied with, independent of files and their order."""
    digest = hashlib.blake2b(digest_size=16)
    for name, values in sorted(to_tensors(adapter.tensors).items()):
        digest.update(f"{name} {values.shape}\n".encode())
        digest.update(values.tobytes())
    scales = {site: adapter.config.scale(site) for site in sorted(adapter.tensors)}
    digest.update(json.dumps(scales).encode())
    return digest.hexdigest()


def _read_config(file: Path) -> dict[str, Any]:
    needed = (
        "r", "lora_alpha", "target_modules", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern",
        "base_model_name_or_path",
    )  # fmt: skip
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterError(f"{file}: no such file; an adapter is a folder with it and {WEIGHTS_FILE}") from None
    except (ValueError, OSError) as error:
        raise AdapterError(f"{file}: cannot be read as JSON: {error}") from error
    missing = [key for key in needed if not isinstance(values, dict) or key not in values]
    if missing:
        raise AdapterError(f"{file}: {missing[0]} is missing")
    return dict(values)
