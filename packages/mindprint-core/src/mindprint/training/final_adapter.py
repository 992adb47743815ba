"""The final adapter folder: the PEFT files, the rendering of prompts, the fingerprint and the model card."""

from __future__ import annotations

from pathlib import Path

from mindprint import atomic
from mindprint._version import __version__
from mindprint.adapter.peft_format import write_adapter
from mindprint.adapter.prompting import write_prompting
from mindprint.adapter.targets import is_stack
from mindprint.config import Config
from mindprint.contract import AdapterState, LoraConfig
from mindprint.models.folder import ModelFolder
from mindprint.models.quantized import read_quantization
from mindprint.training.objectives import OBJECTIVES
from mindprint.trust.fingerprint import FILE_NAME as FINGERPRINT_FILE
from mindprint.trust.fingerprint import Fingerprint, fingerprint_json


def write_final_adapter(
    folder: Path, adapter: AdapterState, model: ModelFolder, config: Config, fingerprint: Fingerprint | None
) -> None:
    """Write `RUN/adapter/`, whole or not at all."""
    with atomic.new_folder(folder) as aside:
        write_adapter(aside, adapter, model.name, model.revision)
        write_prompting(aside, config.data)
        if fingerprint is not None:
            (aside / FINGERPRINT_FILE).write_text(fingerprint_json(fingerprint), encoding="utf-8")
        (aside / "README.md").write_text(model_card(adapter, model, config), encoding="utf-8")


def model_card(adapter: AdapterState, model: ModelFolder, config: Config) -> str:
    """Write a model card in the Hub's format: front matter, a description, and how to load the adapter."""
    lora = adapter.config
    stages = [stage.upper() for stage, objective in OBJECTIVES.items() if objective.settings(config).enabled]
    base = "" if model.name.startswith("builtin:") or Path(model.name).exists() else f"base_model: {model.name}\n"
    return f"""---
{base}library_name: peft
tags: [lora, mindprint]
---

# A voice for {model.name}

A LoRA adapter trained by Mindprint {__version__} with {" then ".join(stages)}: rank {lora.r}, alpha {lora.alpha:g},
{_targets(lora)}, {adapter.elements:,} elements in float32.

{_loading(model)}
`{FINGERPRINT_FILE}` records its digests, and the log-probs that it computed where it was trained.
You can recompute them anywhere with `mindprint verify path/to/this/folder`.
"""


_PEFT = """```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{name}")
model = PeftModel.from_pretrained(base, "path/to/this/folder")
```
"""

_MLX_LM = """```
mindprint convert path/to/this/folder converted --to mlx-lm
mlx_lm.generate --model {name} --adapter-path converted --prompt "..."
```
"""


def _loading(model: ModelFolder) -> str:
    """Return how to load the adapter, with a word on the bits of a quantized base."""
    stated = read_quantization(model.path)
    if stated is None:
        return _PEFT.format(name=model.name)
    # transformers does not read the folders that mlx-lm quantized.
    example = _MLX_LM if stated.family == "mlx" else _PEFT
    bits = (
        f"\nThe base was quantized in training ({stated}). On other bits the adapter has another effect.\n"
        "`mindprint verify path/to/this/folder --any-quantization --model BASE` measures how much of it is there.\n"
    )
    return example.format(name=model.name) + bits


def _targets(lora: LoraConfig) -> str:
    stacks = sum(is_stack(site) for site in lora.target_modules)
    modules = f"{len(lora.target_modules) - stacks} modules"
    return f"{modules} and {stacks} stacks of experts" if stacks else modules
