"""`mindprint generate`: the same prompts without and with the adapter."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mindprint.api import AnsweredPrompt, generate
from mindprint.api.results import SIDES, shown_answer
from mindprint.cli.options import (
    backend_option,
    device_option,
    max_new_tokens_option,
    min_p_option,
    model_option,
    repetition_penalty_option,
    seed_option,
    temperature_option,
    top_k_option,
    top_p_option,
)
from mindprint.cli.output import json_option, say, show, tell_notice
from mindprint.cli.settings import SETTING
from mindprint.config import FILE_NAME
from mindprint.errors import DataError, RunError

WIDE = 80
"""Columns of a terminal from which answers are shown side by side."""

Only = Literal["base", "tuned", "adapter"]

OPTIONS = {
    "max_new_tokens": "--max-new-tokens",
    "temperature": "--temperature",
    "top_p": "--top-p",
    "top_k": "--top-k",
    "min_p": "--min-p",
    "repetition_penalty": "--repetition-penalty",
    "seed": "--seed",
    "backend": "--backend",
    "backend.type": "--backend",
    "backend.device": "--device",
    "device": "--device",
    "model": "--model",
    "model.name": "--model",
}
"""The settings that this command takes as options. Who types them as settings means the same."""

FLAGS = ("--json",)


class Generate(click.Command):
    """A command that takes settings too, as the options that they mean."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        words, before = [], ""
        for word in args:
            # The word after an option is its value, whatever it looks like.
            is_value = before.startswith("--") and "=" not in before and before not in FLAGS
            is_setting = not is_value and SETTING.fullmatch(word) and not Path(word).exists()
            words.append(_as_option(word) if is_setting else word)
            before = "" if is_value else word
        return super().parse_args(ctx, words)


@click.command("generate", cls=Generate, short_help="Answer prompts.")
@click.argument("words", metavar="[PATH] [PROMPT]...", nargs=-1)
@click.option("--prompt", "prompts", multiple=True, help="What to answer; repeatable; - reads it.")
@click.option("--only", type=click.Choice(["base", "tuned", "adapter"]), help="One of the two alone (adapter: tuned).")
@max_new_tokens_option
@temperature_option
@top_p_option
@top_k_option
@min_p_option
@repetition_penalty_option
@seed_option
@backend_option
@device_option
@model_option
@json_option
def command(
    *,
    words: tuple[str, ...],
    prompts: tuple[str, ...],
    only: Only | None,
    max_new_tokens: int | None,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    min_p: float | None,
    repetition_penalty: float | None,
    seed: int,
    backend: str | None,
    device: str | None,
    model: str | None,
    as_json: bool,
) -> None:
    """Answer prompts without and with the adapter, side by side.

    PATH is a project (its newest complete run), the folder of a run, or that of an adapter. The folder of a whole
    model, such as a merged one, answers alone. `--only base` needs no training. A prompt can
    also follow PATH as a word.
    """
    path, more = path_and_prompts(words, given=bool(prompts))
    texts = read_prompts([*prompts, *more])
    result = generate(
        path,
        texts,
        only=only,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        backend=backend,
        device=device,
        model=model,
        on_notice=tell_notice,
    )
    console = Console()
    # Side by side needs two answers and room for both. Pipes and narrow terminals get plain text.
    both = all(answer is not None for answered in result.answers for answer in answered.sides.values())
    if not as_json and both and console.is_terminal and console.width >= WIDE:
        for answered in result.answers:
            console.print(side_by_side(answered))
        return
    show(result, as_json=as_json)
    if not as_json:
        say()


def path_and_prompts(words: Sequence[str], *, given: bool) -> tuple[Path, Sequence[str]]:
    """Split the words into a path and prompts, `given` whether there are others. Raises `click.UsageError`."""
    # In a project's own folder the first word can be a prompt. A folder that exists is meant as one.
    is_prompt = bool(words) and not given and not Path(words[0]).exists() and (len(words) == 1) and _in_project()
    path, prompts = (Path(), words) if is_prompt or not words else (Path(words[0]), words[1:])
    if not prompts and not given and (path.exists() or not words):
        shown = "" if path == Path() else f" {shlex.quote(str(path))}"
        raise click.UsageError(f"Missing option '--prompt': mindprint generate{shown} --prompt \"Who are you?\"")
    if not path.exists():
        raise RunError(f"{path}: no such folder")
    return path, prompts


def _in_project() -> bool:
    return Path(FILE_NAME).is_file()


def _as_option(word: str) -> str:
    name, _, value = word.partition("=")
    option = OPTIONS.get(name.removeprefix("generation."))
    if option is None:
        known = ", ".join(f"{setting}=" for setting in OPTIONS)
        raise click.UsageError(f"{word!r}: not a setting of generate, which takes {known}; a prompt follows --prompt")
    return f"{option}={value}"


def read_prompts(prompts: Sequence[str]) -> list[str]:
    """Return the prompts as text, with `-` read from standard input. Raise `DataError` for an empty one."""
    if prompts.count("-") > 1:
        raise click.UsageError("--prompt - reads standard input, which can be read once")
    # The final line break of a pipe or a here-document is not part of the prompt.
    texts = [sys.stdin.read().strip() if prompt == "-" else prompt for prompt in prompts]
    if not all(text.strip() for text in texts):
        raise DataError("--prompt: is empty")
    return texts


def side_by_side(answered: AnsweredPrompt) -> Table:
    """Put the two answers to a prompt next to each other."""
    shown = Table(title=Text(answered.prompt), title_justify="left", expand=True, show_lines=False)
    texts = []
    for name, answer in answered.sides.items():
        assert answer is not None
        shown.add_column(SIDES[name], ratio=1)
        texts.append(Text(shown_answer(answer)))
    shown.add_row(*texts)
    return shown
