"""`mindprint init`: a project to start from."""

from __future__ import annotations

import json
import os
import shlex
from importlib.resources import files
from pathlib import Path

import click

from mindprint import atomic
from mindprint.cli.output import emit, json_option, say
from mindprint.errors import RunError

SAMPLE_FILES = ("sft.jsonl", "preferences.jsonl", "heldout.jsonl")
STAGED = ".mindprint-init"

TINY = "builtin:tiny"

RATES = {
    True: {"sft_rate": "2e-4", "dpo_rate": "2e-5", "dpo_steps": "15"},
    False: {"sft_rate": "3e-4", "dpo_rate": "5e-6", "dpo_steps": "100"},
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
  epochs_per_topic: 3
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

seed: 0
"""

README = """\
# {name}

A voice for `{model}`, trained with Mindprint.

| what | where |
|---|---|
| settings | `mindprint.yaml` |
| texts to imitate | `data/sft.jsonl`: a JSON object a line, with `prompt` and `completion` (or `messages`) |
| pairs to prefer by | `data/preferences.jsonl`: `prompt`, `chosen` (the voice), `rejected` (not the voice) |
| pairs to measure with | `data/heldout.jsonl`: the same, never trained on |
| order and titles of units, chapters, topics | `data/curriculum.yaml`, if you want others than the rows' |
| results | `runs/run-001/adapter/`: a PEFT adapter, next to it `metrics.jsonl`, checkpoints and the settings used |

`topic` in a row groups rows; training goes topic by topic, and every topic needs rows in both files. The texts that
are here now are a sample: one old ferrywoman's voice. Replace them with your own.

    mindprint train {path}
    mindprint generate {path} --prompt "{prompt}"
    mindprint eval {path}
    mindprint train {path} backend.type=mlx     # the same on another framework
"""


@click.command("init", short_help="Make a project.")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--model", default=TINY, show_default=True, help="Base model: a hub name, a folder, or builtin:tiny.")
@click.option("--backend", default="auto", show_default=True, help="auto, torch, mlx, or any installed backend.")
@json_option
def command(*, folder: Path, model: str, backend: str, as_json: bool) -> None:
    """Make FOLDER with a configuration, sample data, and a README of what goes where."""
    target = folder.resolve()
    # Refused before anything is written: existing files are never overwritten.
    _refuse_taken(folder)
    path = shlex.quote(str(folder))
    prompt = _first_prompt()
    texts = {
        "mindprint.yaml": config_text(_from(target, model), backend),
        "README.md": README.format(name=target.name, model=model, path=path, prompt=prompt),
    }
    _write(target, texts)
    steps = [f"mindprint train {path}", f"mindprint generate {path} --prompt {shlex.quote(prompt)}"]
    if as_json:
        emit({"folder": str(target), "config": str(target / "mindprint.yaml"), "next": steps})
        return
    say(f"{folder}: made, with the settings in mindprint.yaml and a sample voice in data/. Next:\n")
    for step in steps:
        say(f"  {step}")


def config_text(model: str, backend: str = "auto") -> str:
    """Return mindprint.yaml with the settings that suit `model`."""
    tiny = model == TINY
    return CONFIG.format(
        # JSON strings are valid YAML, and quote names that YAML would read as something else.
        model=json.dumps(model, ensure_ascii=False) if model != TINY else TINY,
        backend=json.dumps(backend) if backend != "auto" else backend,
        max_length=256 if tiny else 1024,
        **RATES[tiny],
    )


def _from(folder: Path, model: str) -> str:
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


def _refuse_taken(folder: Path) -> None:
    if folder.is_dir() and any(folder.iterdir()):
        raise RunError(f"{folder}: exists already and is not empty; name a new folder")
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder}: is a file; name a new folder")


def _write(target: Path, texts: dict[str, str]) -> None:
    """Fill `target` whole or not at all. An empty folder stays the same folder, because a shell may be in it."""
    existed = target.is_dir()
    # The files are made aside and moved when all are there, so that an error leaves no half project.
    with atomic.new_folder(target / STAGED if existed else target) as aside:
        (aside / "data").mkdir()
        for name in SAMPLE_FILES:
            (aside / "data" / name).write_bytes(_sample(name))
        for name, text in texts.items():
            (aside / name).write_text(text, encoding="utf-8")
    if existed:
        for path in (target / STAGED).iterdir():
            path.rename(target / path.name)
        (target / STAGED).rmdir()


def _sample(name: str) -> bytes:
    return files("mindprint").joinpath("resources", "curriculum", name).read_bytes()


def _first_prompt() -> str:
    prompt: str = json.loads(_sample("heldout.jsonl").splitlines()[0])["prompt"]
    return prompt
