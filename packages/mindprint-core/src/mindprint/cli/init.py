"""`mindprint init`: a project to start from."""

from __future__ import annotations

import json
import shlex
from importlib.resources import files
from pathlib import Path

import click

from mindprint import atomic
from mindprint.api.project import TINY, config_text, model_from
from mindprint.cli.output import emit, json_option, say
from mindprint.errors import RunError

SAMPLE_FILES = ("sft.jsonl", "preferences.jsonl", "heldout.jsonl")
STAGED = ".mindprint-init"

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
        "mindprint.yaml": config_text(model_from(target, model), backend),
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
