"""The final adapter folder: the PEFT files, the fingerprint and the model card."""

from __future__ import annotations

from pathlib import Path

from mindprint import atomic
from mindprint._version import __version__
from mindprint.adapter.peft_format import write_adapter
from mindprint.config import Config
from mindprint.contract import AdapterState
from mindprint.models.folder import ModelFolder
from mindprint.training.objectives import OBJECTIVES
from mindprint.trust.fingerprint import FILE_NAME as FINGERPRINT_FILE
from mindprint.trust.fingerprint import Fingerprint, fingerprint_json


def write_final_adapter(
    folder: Path, adapter: AdapterState, model: ModelFolder, config: Config, fingerprint: Fingerprint | None
) -> None:
    """Write `RUN/adapter/`, whole or not at all."""
    with atomic.new_folder(folder) as aside:
        write_adapter(aside, adapter, model.name, model.revision)
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
{len(lora.target_modules)} modules, {adapter.elements:,} elements in float32.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{model.name}")
model = PeftModel.from_pretrained(base, "path/to/this/folder")
```

`{FINGERPRINT_FILE}` records its digests, and the log-probs that it computed where it was trained.
You can recompute them anywhere with `mindprint verify path/to/this/folder`.
"""
