"""Good artefacts to break: a small base, an adapter with its fingerprint, and the base with the adapter merged in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from mindprint.adapter import mlx_lm_format
from mindprint.adapter.base_facts import read_base_facts
from mindprint.adapter.formats import read_any_adapter
from mindprint.adapter.initial import initial_adapter
from mindprint.adapter.peft_format import CONFIG_FILE, WEIGHTS_FILE, write_adapter
from mindprint.adapter.targets import resolve_targets
from mindprint.contract import AdapterState, Dtype, LoraConfig
from mindprint.data.tokenizer import load_tokenizer
from mindprint.models.engine import Engine, Placement
from mindprint.models.folder import ModelFolder, model_config
from mindprint.plugins.backend import load_backend
from mindprint.trust.fingerprint import FILE_NAME, fingerprint_json
from mindprint.trust.measurement import take_fingerprint
from mindprint.trust.probe import synthetic_probe
from parity_cases import stirred
from random_models import save_model, save_tokenizer

Tensors = dict[str, torch.Tensor]

SMALL: Mapping[str, Any] = {
    "vocab_size": 400,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,  # as sharp as trained models: attention is no mere average
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}


@dataclass(frozen=True)
class Artefact:
    """Folders of a base, of an adapter for it, and of a merge of both, which may not be there."""

    root: Path

    @property
    def base(self) -> Path:
        return self.root / "base"

    @property
    def adapter(self) -> Path:
        return self.root / "adapter"

    @property
    def merged(self) -> Path:
        return self.root / "merged"

    def copy(self, root: Path) -> Artefact:
        shutil.copytree(self.root, root, dirs_exist_ok=True)
        return Artefact(root)


def make_base(folder: Path, model_type: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Path:
    """A random base of a family, with a tokenizer; norms and biases moved off their defaults."""
    folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer(folder)
    return save_model(folder, CONFIG_MAPPING[model_type](**{**SMALL, **changes}), seed, dtype)


def make_adapter(
    artefact: Artefact, backend: str = "torch", dtype: Dtype = "float32", size: float = 0.05
) -> AdapterState:
    """An adapter whose B is drawn with deviation `size`, written with the fingerprint that a run would write."""
    place = placement(backend, dtype)
    base, tokenizer = ModelFolder(artefact.base, str(artefact.base)), load_tokenizer(artefact.base)
    engine = Engine(base)
    engine.load(place)
    try:
        sites = place.backend.adapter_sites(engine.model)
        lora = LoraConfig(4, 8.0, resolve_targets(sites, "all-linear"))
        adapter = stirred(initial_adapter(sites, lora, seed=3), size=size)
        probe = synthetic_probe(tokenizer, model_config(artefact.base))
        fingerprint = take_fingerprint(engine, place, adapter, tokenizer, probe)
    finally:
        engine.release()
    artefact.adapter.mkdir(exist_ok=True)
    write_adapter(artefact.adapter, adapter, base.name)
    (artefact.adapter / FILE_NAME).write_text(fingerprint_json(fingerprint), encoding="utf-8")
    return adapter


def merge_with_peft(artefact: Artefact, dtype: torch.dtype = torch.float32) -> None:
    """Merge as PEFT does, and save as transformers does; the tokenizer's files are copied."""
    model = AutoModelForCausalLM.from_pretrained(artefact.base, dtype=dtype)
    PeftModel.from_pretrained(model, artefact.adapter).merge_and_unload().save_pretrained(artefact.merged)
    copy_tokenizer(artefact.base, artefact.merged)


def copy_tokenizer(base: Path, folder: Path) -> None:
    for file in base.iterdir():
        if "token" in file.name or "template" in file.name:
            shutil.copy(file, folder / file.name)


def convert_to_mlx_lm(artefact: Artefact) -> None:
    """Write the adapter anew as mlx-lm does, in the same folder; its fingerprint goes along."""
    adapter, named = read_any_adapter(artefact.adapter, artefact.base)
    fingerprint = (artefact.adapter / FILE_NAME).read_text()
    shutil.rmtree(artefact.adapter)
    artefact.adapter.mkdir()
    mlx_lm_format.write_adapter(artefact.adapter, adapter, read_base_facts(artefact.base), named)
    (artefact.adapter / FILE_NAME).write_text(fingerprint)


def convert_to_peft(artefact: Artefact) -> None:
    """Write the adapter anew as PEFT does, in the same folder; its fingerprint goes along."""
    adapter, named = read_any_adapter(artefact.adapter, artefact.base)
    fingerprint = (artefact.adapter / FILE_NAME).read_text()
    shutil.rmtree(artefact.adapter)
    artefact.adapter.mkdir()
    write_adapter(artefact.adapter, adapter, named)
    (artefact.adapter / FILE_NAME).write_text(fingerprint)


def placement(backend: str, dtype: Dtype = "float32") -> Placement:
    return Placement(load_backend(backend), "cpu", dtype)


# --- breaking --------------------------------------------------------------------------------------------------------


def edit_json(file: Path, change: Mapping[str, Any], remove: tuple[str, ...] = ()) -> None:
    """Change values of a JSON file and remove others."""
    values = json.loads(file.read_text(encoding="utf-8")) | dict(change)
    file.write_text(json.dumps({name: value for name, value in values.items() if name not in remove}))


def edit_config(artefact: Artefact, **change: Any) -> None:
    """Change values of adapter_config.json."""
    edit_json(artefact.adapter / CONFIG_FILE, change)


def edit_tensors(file: Path, change: Callable[[Tensors], Tensors]) -> None:
    """Rewrite a safetensors file with what `change` makes of its tensors."""
    tensors = {name: value.contiguous() for name, value in change(load_file(file)).items()}
    save_file(tensors, file, metadata={"format": "pt"})


def edit_factors(artefact: Artefact, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    """Rewrite every tensor of the adapter, `change(name, values)`."""
    edit_tensors(artefact.adapter / WEIGHTS_FILE, lambda found: {name: change(name, found[name]) for name in found})


def change_of(artefact: Artefact, scale: float = 2.0) -> Tensors:
    """`s · B · A` of every adapted weight, by the weight's name."""
    factors = load_file(artefact.adapter / WEIGHTS_FILE)
    sites = sorted({name.partition(".lora_")[0] for name in factors})
    return {
        f"{site.removeprefix('base_model.model.')}.weight": scale
        * (factors[f"{site}.lora_B.weight"] @ factors[f"{site}.lora_A.weight"])
        for site in sites
    }
