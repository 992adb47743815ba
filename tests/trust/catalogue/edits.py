"""Edits of files that several faults of the catalogue share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from artefacts import Artefact, Tensors, change_of, edit_config, edit_tensors

from mindprint.adapter.peft_format import CONFIG_FILE, WEIGHTS_FILE
from mindprint.trust.fingerprint import FILE_NAME


def with_noise(values: torch.Tensor, size: float) -> torch.Tensor:
    """Values with relative noise of this size, as an earlier or a later step has them."""
    generator = torch.Generator().manual_seed(values.numel())
    return values * (1 + size * torch.randn(values.shape, generator=generator))


def target_endings(it: Artefact) -> list[str]:
    targets = json.loads((it.adapter / CONFIG_FILE).read_text())["target_modules"]
    return sorted({target.rpartition(".")[2] for target in targets})


def move_last_tensor(file: Path, step: int) -> None:
    """Move the last tensor of a safetensors file by some bytes, and the end of the file with it."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    last = max((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"])
    header[last]["data_offsets"] = [offset + step for offset in header[last]["data_offsets"]]
    data = content[8 + length :]
    data = data[:step] if step < 0 else data + bytes(step)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def edit_fingerprint(it: Artefact, change: Callable[[dict[str, Any]], Any]) -> None:
    file = it.adapter / FILE_NAME
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def store_merge_in(it: Artefact, dtype: torch.dtype, noise: float) -> None:
    """Round the merged model to a dtype, with noise of a given multiple of the change in its adapted weights."""
    generator = torch.Generator().manual_seed(2)

    def noisy(found: Tensors) -> Tensors:
        change = change_of(it)
        random = {n: noise * v.std() * torch.randn(v.shape, generator=generator) for n, v in change.items()}
        return {name: values.to(dtype) for name, values in (found | add_changes(found, random)).items()}

    edit_tensors(it.merged / "model.safetensors", noisy)


def with_value(values: torch.Tensor, value: float) -> torch.Tensor:
    changed = values.clone()
    changed.view(-1)[7] = value
    return changed


def edit_lora_parameters(it: Artefact, **change: Any) -> None:
    config = json.loads((it.adapter / CONFIG_FILE).read_text())
    edit_config(it, lora_parameters=config["lora_parameters"] | change)


def keep_sites(it: Artefact, keep: Callable[[str], bool]) -> None:
    """Leave modules out of an adapter, its tensors and its configuration alike."""
    config = json.loads((it.adapter / CONFIG_FILE).read_text())
    edit_config(it, target_modules=[site for site in config["target_modules"] if keep(site)])
    edit_tensors(it.adapter / WEIGHTS_FILE, lambda found: {name: v for name, v in found.items() if keep(name)})


def rename_sites(it: Artefact, words: dict[str, str]) -> None:
    def renamed(found: Tensors) -> Tensors:
        return {_replaced(name, words): values for name, values in found.items()}

    edit_tensors(it.adapter / WEIGHTS_FILE, renamed)


def _replaced(name: str, words: dict[str, str]) -> str:
    return next((name.replace(old, new) for old, new in words.items() if old in name), name)


def add_changes(found: Tensors, change: Tensors) -> Tensors:
    return {name: found[name] + values.to(found[name].dtype) for name, values in change.items()}


def merge_again(it: Artefact, scale: float) -> None:
    """Add the change once more to the merged model, `scale` instead of the adapter's 2 times."""
    edit_tensors(it.merged / "model.safetensors", lambda found: found | add_changes(found, change_of(it, scale)))


def restore_base_weights(it: Artefact, lost: Callable[[str], bool]) -> None:
    """Put the base's weights back into the merged model."""
    from safetensors.torch import load_file

    base = load_file(it.base / "model.safetensors")
    edit_tensors(
        it.merged / "model.safetensors",
        lambda found: {name: base[name] if lost(name) else values for name, values in found.items()},
    )


def edit_tokenizer(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    change(tokenizer)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
