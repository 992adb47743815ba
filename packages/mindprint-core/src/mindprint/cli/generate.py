"""`mindprint generate`: the same prompts without and with the adapter."""

from __future__ import annotations

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
from mindprint.cli.output import json_option, say, show, tell_notice
from mindprint.errors import DataError

WIDE = 80
"""Columns of a terminal from which answers are shown side by side."""

Only = Literal["base", "adapter"]


@click.command("generate", short_help="Answer prompts.")
@click.argument("path", type=click.Path(path_type=Path), default=".")
@click.option("--prompt", "prompts", multiple=True, required=True, help="What to answer; repeatable; - reads it.")
@click.option("--only", type=click.Choice(["base", "adapter"]), help="Answer with one of the two alone.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), help="Longest answer; default: the run's setting.")
@click.option("--temperature", type=click.FloatRange(min=0), help="0 is greedy; default: the run's setting.")
@click.option("--top-p", type=click.FloatRange(min=0, max=1, min_open=True), help="Nucleus sampling; likewise.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the draws.")
@click.option("--backend", help="auto, torch, mlx, ...; default: the run's.")
@click.option("--device", help="auto, cpu, cuda, mps, metal; default: the run's.")
@click.option("--model", help="Where the base model is, if not where the run or the adapter says.")
@json_option
def command(
    *,
    path: Path,
    prompts: tuple[str, ...],
    only: Only | None,
    max_new_tokens: int | None,
    temperature: float | None,
    top_p: float | None,
    seed: int,
    backend: str | None,
    device: str | None,
    model: str | None,
    as_json: bool,
) -> None:
    """Answer prompts without and with the adapter, side by side.

    PATH is a project (its newest complete run), the folder of a run, or that of an adapter.
    """
    texts = read_prompts(prompts)
    result = generate(
        path, texts, only=only, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed,
        backend=backend, device=device, model=model, on_notice=tell_notice,
    )  # fmt: skip
    console = Console()
    # Side by side needs two answers and room for both. Pipes and narrow terminals get plain text.
    if not as_json and only is None and console.is_terminal and console.width >= WIDE:
        for answered in result.answers:
            console.print(side_by_side(answered))
        return
    show(result, as_json=as_json)
    if not as_json:
        say()


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
