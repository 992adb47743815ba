"""The settings that a new project begins with."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from mindprint.sampling import ENOUGH_PENALTY

TINY = "builtin:tiny"

RATES = {
    True: {"sft_epochs": "3", "sft_rate": "2e-4", "dpo_rate": "2e-5", "dpo_steps": "15"},
    False: {"sft_epochs": "3", "sft_rate": "3e-4", "dpo_rate": "5e-6", "dpo_steps": "100"},
}
"""Settings that suit the embedded model of 3 million parameters (True), and one of billions (False)."""

CONFIG = """\
# What `mindprint train` does. Settings can be given on its command line too: sft.learning_rate=1e-4.
# Paths are relative to this file. docs/configuration.md lists all settings with their defaults.

model:
  name: {model}  # a model on the Hugging Face hub, a folder, or builtin:tiny

backend:
  type: {backend}  # auto, torch, mlx: nothing else has to change
  device: auto
  dtype: auto

data:
  path: data  # sft.jsonl, preferences.jsonl, heldout.jsonl, and curriculum.yaml for titles and order
  max_length: {max_length}  # in tokens: longer rows are cut at their end, and counted

adapter:
  r: 8
  alpha: 16
  target_modules: all-linear

sft:  # first: imitate the voice
  epochs_per_topic: {sft_epochs}
  learning_rate: {sft_rate}
  batch_size: 4

dpo:  # then: prefer it to the plain answer
  steps_per_topic: {dpo_steps}
  learning_rate: {dpo_rate}
  batch_size: 4
  beta: 0.1
  loss: sigmoid

evaluation:  # on held-out text, while it trains
  levels: [topic, chapter, unit, final]
  prompts_per_topic: 8
  topic: {{perplexity_ratio: 1.1}}  # held-out text must not become less probable than that, or the topic failed
  final: {{perplexity_ratio: 1.1, copy_rate: 0.5}}  # with voice.background, voice: 0.5 asks for more (1: the person)

curriculum:
  dpo: always  # always, never, or a number: only where the voice after SFT is below it
  retries: 1  # train a failed topic again from where it began, at half the learning rate
  roll_back: true  # undo a stage after which the answers have collapsed

checkpoints:
  every: 50  # optimizer steps
  keep: 2

{generation}seed: 0
"""

GENERATION = f"""\
generation:  # how `generate`, `chat` and `serve` answer
  repetition_penalty: {ENOUGH_PENALTY}  # small models repeat themselves without one

"""

PENALISES = ("auto", "torch", "mlx", "llamacpp")
"""Backends that are known to have a repetition penalty. Any other one may refuse the setting."""


def config_text(model: str, backend: str = "auto", proposed: Mapping[str, str] | None = None) -> str:
    """Return mindprint.yaml with the settings that suit `model`, or those that are `proposed` for its rows."""
    tiny = model == TINY
    return CONFIG.format(
        # JSON strings are valid YAML, and quote names that YAML would read as something else.
        model=json.dumps(model, ensure_ascii=False) if model != TINY else TINY,
        backend=json.dumps(backend) if backend != "auto" else backend,
        max_length=256 if tiny else 1024,
        # The embedded model does not loop.
        generation=GENERATION if backend in PENALISES and not tiny else "",
        **{**RATES[tiny], **({} if tiny else proposed or {})},
    )


def model_from(folder: Path, model: str) -> str:
    """Return a model folder as the new configuration names it, and any other name as it is.

    Paths in a configuration start from its own folder, not from where the command ran. A folder below the working
    directory is named from the project, so that both can be moved together. One that lies elsewhere is named from the
    root or from home: a path that climbs out of the project breaks when the project is moved.
    """
    given = Path(model).expanduser()
    if not given.is_dir():
        return model
    if not given.is_absolute() and given.parts[:1] != ("..",):
        return os.path.relpath(given.resolve(), folder)
    target, home = given.resolve(), Path.home().resolve()
    below_home = home != Path(home.anchor) and target.is_relative_to(home)
    return f"~/{target.relative_to(home).as_posix()}" if below_home else str(target)
