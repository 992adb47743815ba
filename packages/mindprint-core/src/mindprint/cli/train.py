"""`mindprint train`: from a configuration to an adapter."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from contextlib import suppress
from os import PathLike
from pathlib import Path

import click

from mindprint.api import TrainResult, load_config, train
from mindprint.api.training import config_to_resume
from mindprint.cli.output import json_option, notice, say, show
from mindprint.cli.settings import SettingsCommand, complete_setting, project_and_overrides
from mindprint.config import FILE_NAME, ConfigFile
from mindprint.errors import MindprintError
from mindprint.plugins.launched import launched
from mindprint.printing import short_path
from mindprint.runs.folder import Resume, RunFolder, newest_run
from mindprint.runs.opened import sample_prompt

# A longer prompt would wrap in the terminal, and could not be copied as one line.
LONGEST_PROMPT = 100


class Resumable(SettingsCommand):
    """A command whose `--resume` takes no value but `latest`: in `--resume my-voice`, the word names a project."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, _with_resume_value(args))


@click.command("train", cls=Resumable, short_help="Train.")
@click.argument("config", metavar="[CONFIG] [KEY=VALUE]...", nargs=-1, shell_complete=complete_setting)
@click.option("--run", type=click.Path(path_type=Path), help="The run's folder; default: a new one under runs/.")
@click.option(
    "--resume",
    type=click.Choice(["last", "latest"]),
    metavar="[latest]",
    help="Continue the newest run (or --run) from its last checkpoint; with `latest` from the last sound one.",
)
@click.option("--backend", help="auto, torch, mlx, or any installed backend: short for backend.type=NAME.")
@click.option("--topic", "topics", multiple=True, help="Train only this topic, chapter or unit; may be given again.")
@click.option("--max-topics", type=click.IntRange(min=1), help="Train only the first N topics.")
@json_option
def command(
    *,
    config: tuple[str, ...],
    run: Path | None,
    resume: Resume | None,
    backend: str | None,
    topics: tuple[str, ...],
    max_topics: int | None,
    as_json: bool,
) -> int:
    """Train SFT, then DPO, topic by topic, and write one adapter.

    CONFIG is a folder with mindprint.yaml (default: this one), a YAML file, or the folder of a run. KEY=VALUE changes
    a setting for this run: `backend.type=mlx`, `sft.learning_rate=1e-4`.

    A topic (chapter, unit, or the run) that misses a threshold of the configuration has failed: it is named, and the
    exit code is 1. The adapter is written all the same. A threshold that could not be evaluated is named too, and is
    not a failure.
    """
    path, overrides = project_and_overrides(config)
    if backend:
        overrides.append(f"backend.type={backend}")
    if topics:
        # JSON is valid YAML, so names with commas or colons survive the parsing of the setting.
        overrides.append(f"curriculum.topics={json.dumps(topics)}")
    if max_topics:
        overrides.append(f"curriculum.max_topics={max_topics}")
    file, folder = _named_run(path, overrides, run, resumed=resume is not None)
    result = train(file, run=folder, resume=resume or False, progress=True)
    (rank, _), _ = launched()
    # Of several processes that trained one adapter, the first one prints.
    if rank:
        return 1 if result.failed else 0
    show(result, as_json=as_json)
    if not as_json:
        say(f"try it:  mindprint generate {_project_or_run(result, path)} --prompt {_prompt(file)}")
    for caution in result.cautions():
        notice(caution, warning=True)
    return 1 if result.failed else 0


def _with_resume_value(arguments: Sequence[str]) -> list[str]:
    result: list[str] = []
    for argument in arguments:
        # click cannot know whether the word after `--resume` is its value or a project. Only `latest` is a value.
        if argument == "latest" and result and result[-1] == "--resume=last":
            result[-1] = "--resume=latest"
        else:
            result.append("--resume=last" if argument == "--resume" else argument)
    return result


def _named_run(
    path: Path, overrides: Sequence[str], run: Path | None, *, resumed: bool
) -> tuple[ConfigFile, str | PathLike[str] | None]:
    """Return the configuration, and the run's folder where one is named. A run's folder names its configuration."""
    if resumed:
        return config_to_resume(path, run, notice, overrides)
    folder = RunFolder(path)
    # A run's folder lends its settings only, and the new run gets a new folder.
    own = not (path / FILE_NAME).exists() and folder.holds_run
    return load_config(folder.config if own else path, overrides), run


def _project_or_run(result: TrainResult, path: Path) -> str:
    """Return the project's folder if `generate` would find this run in it, else the run's."""
    newest = newest_run(path / "runs")
    if path.is_dir() and newest is not None and newest.resolve() == result.run:
        return shlex.quote(str(path))
    return shlex.quote(short_path(result.run))


def _prompt(file: ConfigFile) -> str:
    with suppress(MindprintError):
        prompt = sample_prompt(file)
        # A prompt with control characters could change the terminal when the suggested line is shown.
        if prompt and len(prompt) <= LONGEST_PROMPT and prompt.isprintable():
            return shlex.quote(prompt)
    return '"…"'
